"""The training loop, checkpoints, path predicates and the sharding table, on a toy model."""

import importlib
import io
import json
import math
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_toy as toy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from conceptax.converters.architectures import MODULES
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.layers.remat import recomputed
from conceptax.methods import training
from conceptax.methods.training.reporting import Reporter
from conceptax.methods.training.sharding import RULES
from conceptax.methods.training.tensorboard import TensorBoardWriter, _masked_crc32c

# Whose shapes alone take seconds to make.
LARGE = {
    "Blip2ForImageTextRetrieval",
    "MaftPlus",
    "MotionAdapter",
    "OpenCLIP",
    "UNetMotionModel",
}
_TOY = toy.__file__


def identical(left, right):
    """True if two pytrees have the same structure, dtypes and bits."""
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        left,
        right,
    )
    return jax.tree.all(same)


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Final state and losses of the uninterrupted run on one device."""
    path = tmp_path_factory.mktemp("reference") / "metrics.jsonl"
    state = toy.run(metrics_path=path)
    return state, [record["loss"] for record in records(path)]


class TestLoop:
    def test_exactly_the_trainable_parameters_change(self):
        graphdef, state, frozen = toy.start()
        before = jax.tree.map(np.array, (state, frozen))
        kept = frozen["scale"]
        final = training.train(
            toy.step, graphdef, state, frozen, key=jax.random.key(1), num_steps=3, progress=False
        )
        assert int(final.step) == 3
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), before[0].params, final.params)
        assert jax.tree.all(changed)
        assert training.leaf_paths(final.params) == [
            "layers.0.bias",
            "layers.0.kernel",
            "layers.1.bias",
            "layers.1.kernel",
        ]
        assert identical(before[1], frozen) and frozen["scale"] is kept
        assert identical(before[0], state), "the caller's state must survive the donation"

    def test_the_loop_is_the_step_with_folded_keys(self):
        graphdef, state, frozen = toy.start()
        final = training.train(
            toy.step, graphdef, state, frozen, key=jax.random.key(1), num_steps=3, progress=False
        )
        step = jax.jit(toy.step, static_argnums=0)
        for n in range(3):
            key = jax.random.fold_in(jax.random.key(1), n)
            state, _ = step(graphdef, state, frozen, None, key)
        assert identical(final, state)

    def test_metrics_file(self, tmp_path, reference):
        losses = reference[1]
        assert len(losses) == toy.NUM_STEPS and losses[-1] < losses[0]
        path = tmp_path / "deep" / "metrics.jsonl"
        toy.run(num_steps=5, metrics_path=path, log_every=2)
        rows = records(path)
        assert [row["step"] for row in rows] == [2, 4, 5]
        assert [row["loss"] for row in rows] == [losses[1], losses[3], losses[4]]
        assert all(set(row) == {"step", "loss", "steps_per_second", "seconds"} for row in rows)
        assert rows[-1]["steps_per_second"] > 0

    def test_plain_lines_without_a_terminal(self):
        text = io.StringIO()
        with Reporter(0, 2, console=Console(file=text, width=80)) as reporter:
            reporter.step(1, {"loss": 0.5})
            reporter.step(2, {"loss": 0.25})
        lines = text.getvalue().splitlines()
        assert lines[0] == "step 1/2  loss 0.5"
        assert re.fullmatch(r"step 2/2  loss 0\.25  \S+ steps/s", lines[1])

    def test_progress_bar_on_a_terminal(self):
        text = io.StringIO()
        console = Console(file=text, force_terminal=True, width=100)
        with Reporter(0, 2, console=console) as reporter:
            reporter.start()
            reporter.step(1, {"loss": 0.5})
            reporter.step(2, {"loss": 0.25})
        assert "2/2" in text.getvalue() and "loss 0.25" in text.getvalue()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_steps": 0}, "num_steps must be at least 1"),
            ({"checkpoint_every": 2}, "needs a checkpoint_dir"),
            ({"batches": [{"x": np.zeros((16, 8), np.float32)}]}, "ended after 1 steps"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            toy.run(**options)

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (lambda state: (state, {"loss": jnp.ones(())}), "step number 0, expected 1"),
            (lambda state: (state, {"cost": jnp.ones(())}), "need 'loss'"),
            (lambda state: (state, {"loss": jnp.ones(3)}), "must be scalars"),
        ],
    )
    def test_bad_steps(self, result, message):
        def step(static, state, frozen, batch, key):
            return result(state)

        state = training.init_state({"w": jnp.ones(2)}, optax.sgd(1.0))
        with pytest.raises(ValueError, match=message):
            training.train(step, None, state, key=jax.random.key(0), num_steps=3, progress=False)


class TestAccumulation:
    def test_two_half_batches_are_one(self):
        x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
        graphdef, start, frozen = toy.start()

        def step(optimizer, state, frozen, batch, key):
            def loss(params):
                return jnp.mean((nnx.merge(graphdef, params, frozen)(batch["x"]) - 1) ** 2)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return training.apply_gradients(state, gradients, optimizer), {"loss": value}

        def run(parts):
            optimizer = training.accumulated(toy.OPTIMIZER, parts)
            assert training.accumulated(toy.OPTIMIZER, parts) is optimizer
            return training.train(
                step,
                optimizer,
                training.init_state(start.params, optimizer),
                frozen,
                [{"x": part} for part in np.split(x, parts) * 3],
                key=jax.random.key(0),
                num_steps=3 * parts,
                progress=False,
            ).params

        whole, halves = run(1), run(2)
        assert not identical(whole, start.params)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)

    def test_takes_the_memory_of_one_part_and_gives_the_gradient_of_all(self):
        """Plain descent at rate 1, whose update is the gradient itself."""
        x = np.random.default_rng(0).normal(size=(8192, 8)).astype(np.float32)
        graphdef, start, frozen = toy.start()

        def step(optimizer, state, frozen, batch, key):
            def loss(params):
                return jnp.mean((nnx.merge(graphdef, params, frozen)(batch) - 1) ** 2)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return training.apply_gradients(state, gradients, optimizer), {"loss": value}

        def run(batches, parts):
            optimizer, key = training.accumulated(optax.sgd(1.0), parts), jax.random.key(0)
            state = training.init_state(jax.tree.map(jnp.copy, start.params), optimizer)
            compiled = training.compile_step(step, optimizer)
            compiled = compiled.lower(state, frozen, batches[0], key).compile()
            needs = compiled.memory_analysis()
            for batch in batches:
                state, _ = compiled(state, frozen, batch, key)
            return needs.argument_size_in_bytes + needs.temp_size_in_bytes, state.params

        parts = np.split(x, 4)
        (whole, expected), (one, _), (four, found) = run([x], 1), run(parts[:1], 1), run(parts, 4)
        assert whole > 3 * one
        assert four < 1.1 * one
        assert not identical(expected, start.params)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)

    def test_the_sum_lies_where_the_parameters_lie(self):
        _, state, _ = toy.start()
        optimizer = training.accumulated(toy.OPTIMIZER, 2)
        state = training.init_state(state.params, optimizer)
        found = training.shard_state(state, training.make_mesh(1, 8))
        kernel = found.params["layers"][0]["kernel"]
        assert kernel.spec != PartitionSpec()
        assert found.opt_state.acc_grads["layers"][0]["kernel"] == kernel


class TestNonFinite:
    def test_stops_and_leaves_the_last_checkpoint(self, tmp_path):
        folder, log = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
        with pytest.raises(training.NonFiniteLossError, match="loss is nan at step 5") as caught:
            toy.run(
                batches=toy.batches(poison=4),
                checkpoint_dir=folder,
                checkpoint_every=1,
                metrics_path=log,
            )
        assert caught.value.step == 5 and np.isnan(caught.value.value)
        assert "checkpoint is the one after step 4" in str(caught.value)
        assert "Batch 4, counted from 0, holds NaN or infinite values in x, rows [3]" in str(
            caught.value
        )
        assert [row["loss"] for row in records(log)][4] == "nan"
        with training.Checkpoints(folder) as checkpoints:
            assert checkpoints.steps == [2, 3, 4]
            restored = checkpoints.restore(toy.start()[1])
        assert identical(restored, toy.run(num_steps=4))

    def test_gradients_that_are_nan_name_their_step(self):
        def step(static, state, frozen, batch, key):
            gradients = {"w": jnp.where(state.step == 2, jnp.nan, 1.0) * jnp.ones(2)}
            state = training.apply_gradients(state, gradients, optax.sgd(1.0))
            return state, {"loss": jnp.ones(())}

        state = training.init_state({"w": jnp.ones(2)}, optax.sgd(1.0))
        with pytest.raises(training.NonFiniteLossError) as caught:
            training.train(
                step,
                None,
                state,
                None,
                [{"x": np.ones((2, 3), np.float32)}] * 9,
                key=jax.random.key(0),
                num_steps=9,
                progress=False,
            )
        assert caught.value.step == 3
        assert "a parameter is NaN or infinite at step 3" in str(caught.value)
        assert "Batch 2, counted from 0, is finite." in str(caught.value)

    def test_without_checkpoints(self):
        with pytest.raises(training.NonFiniteLossError, match="No checkpoint was written"):
            toy.run(batches=toy.batches(poison=0))

    def test_bad_parameters_are_not_saved_though_the_loss_is_finite(self, tmp_path):
        def step(static, state, frozen, batch, key):
            gradients = {"w": jnp.full(2, jnp.nan)}
            state = training.apply_gradients(state, gradients, optax.sgd(1.0))
            return state, {"loss": jnp.ones(())}

        state = training.init_state({"w": jnp.ones(2)}, optax.sgd(1.0))
        with pytest.raises(training.NonFiniteLossError, match=r"a parameter is NaN .* at step 1"):
            training.train(
                step,
                None,
                state,
                key=jax.random.key(0),
                num_steps=1,
                checkpoint_dir=tmp_path / "run",
                progress=False,
            )
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.steps == []


class TestCheckpoints:
    def run_and_die(self, folder, name, step):
        return subprocess.run(
            [sys.executable, str(_TOY), str(folder), name, str(step)],
            capture_output=True,
            text=True,
            check=False,
        )

    def test_resume_after_a_kill_is_bit_identical(self, tmp_path, reference):
        killed = self.run_and_die(tmp_path / "run", "SIGKILL", 8)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            # the checkpoint after step 6 is complete, or the kill came before its rename
            assert checkpoints.steps in ([3], [3, 6])
        half = tmp_path / "run" / "6.orbax-checkpoint-tmp"
        (half / "state").mkdir(parents=True, exist_ok=True)
        final = toy.run(checkpoint_dir=tmp_path / "run", checkpoint_every=3)
        assert identical(final, reference[0])
        assert not half.exists()

    def test_sigterm_saves_and_exits_cleanly(self, tmp_path, reference):
        ended = self.run_and_die(tmp_path / "run", "SIGTERM", 4)
        assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.steps == [3, 5]
        final = toy.run(checkpoint_dir=tmp_path / "run", checkpoint_every=3)
        assert identical(final, reference[0])

    def test_signal_handlers_are_restored(self, tmp_path):
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

        def interrupted():
            for n, batch in enumerate(toy.batches()):
                if n == 2:
                    signal.raise_signal(signal.SIGINT)
                yield batch

        with pytest.raises(training.TrainingInterrupted) as caught:
            toy.run(batches=interrupted())
        assert caught.value.step == 3 and caught.value.code == 130
        assert str(caught.value).startswith("SIGINT received; stopped after step 3 (no checkpoint")
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    def test_keeps_the_newest(self, tmp_path, reference):
        log = tmp_path / "metrics.jsonl"
        options = {"checkpoint_dir": tmp_path / "run", "keep": 2, "metrics_path": log}
        toy.run(num_steps=7, checkpoint_every=2, **options)
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.steps == [6, 7]
        log.write_text(log.read_text() + '{"step": 8, "loss": 9}\n{"step": 9, "lo')
        final = toy.run(**options)
        assert identical(final, reference[0])
        assert [(row["step"], row["loss"]) for row in records(log)] == list(
            enumerate(reference[1], 1)
        )
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.steps == [7, 10]
            params = checkpoints.restore(final).params
            assert identical(params, final.params)
            assert list(params["layers"]) == [0, 1]
            with pytest.raises(ValueError, match=r"no checkpoint after step 8 .* \[7, 10\]"):
                checkpoints.restore(final, step=8)
            wrong = training.init_state({"layers": final.params["layers"][0]}, toy.OPTIMIZER)
            with pytest.raises(ValueError, match="does not fit this model"):
                checkpoints.restore(wrong)
            narrow = jax.tree.map(lambda leaf: leaf[..., :4] if leaf.ndim else leaf, final)
            line = r"params\.layers\.0\.bias: saved float32\(256,\), needed float32\(4,\)"
            with pytest.raises(ValueError, match=line):
                checkpoints.restore(narrow)
        with pytest.raises(ValueError, match="already holds checkpoints"):
            toy.run(resume=False, **options)
        with pytest.raises(ValueError, match="beyond num_steps=4"):
            toy.run(num_steps=4, **options)

    def test_a_schedule_is_not_stretched(self, tmp_path):
        """Two lengths in one run would be two schedules, of which neither is followed."""
        options = {"checkpoint_dir": tmp_path / "run", "fixed_length": True}
        toy.run(num_steps=2, **options)
        with pytest.raises(ValueError, match=r"of a run of 2 steps, and this one is to have 3"):
            toy.run(num_steps=3, **options)
        toy.run(num_steps=2, **options)
        toy.run(num_steps=3, checkpoint_dir=tmp_path / "run")

    def test_the_last_step_need_not_be_saved(self, tmp_path):
        toy.run(num_steps=3, checkpoint_every=2, save_last=False, checkpoint_dir=tmp_path / "run")
        with training.Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.steps == [2]

    def test_a_folder_that_is_none(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(training.CheckpointError, match=r"kept in .*file/run: .*not a folder"):
            toy.run(checkpoint_dir=tmp_path / "file" / "run")

    def test_data_position_is_saved(self, tmp_path):
        def data():
            rows = grain.MapDataset.source(np.arange(16 * 8 * 5, dtype=np.float32).reshape(-1, 8))
            rows = rows.shuffle(seed=3).map(lambda row: {"x": row / 640}).repeat()
            return rows.to_iter_dataset().batch(16)

        whole = toy.run(batches=data())
        toy.run(batches=data(), num_steps=4, checkpoint_dir=tmp_path / "run")
        final = toy.run(batches=data(), checkpoint_dir=tmp_path / "run")
        assert identical(final, whole)

    def test_bytes_positions(self, tmp_path):
        class Source:
            def __init__(self):
                self.n = 0

            def __iter__(self):
                return self

            def __next__(self):
                self.n += 1
                return next(toy.batches(self.n))

            def get_state(self):
                return bytes([255, self.n])

            def set_state(self, state):
                self.n = state[1]

        toy.run(batches=Source(), num_steps=2, checkpoint_dir=tmp_path / "run")
        source = Source()
        final = toy.run(batches=source, num_steps=3, checkpoint_dir=tmp_path / "run")
        assert source.n == 3
        assert identical(final, toy.run(batches=Source(), num_steps=3))


class TestPaths:
    def test_patterns(self):
        path = "encoder.layers.3.self_attn.q_proj.kernel"
        for pattern in ("encoder.layers.*.self_attn.*", "encoder", "*.[qk]_proj.kernel", "*"):
            assert training.matches(pattern, path), pattern
        for pattern in ("layers", "enc", "*.bias", re.compile("encoder"), "*.self_attn.kernel"):
            assert not training.matches(pattern, path), pattern
        assert training.matches(re.compile(r"encoder\.layers\.\d+\..*"), path)

    def test_in_nnx_split(self):
        model = toy.Toy(nnx.Rngs(0))
        chosen = training.path_filter("layers", "*.bias", among=model)
        _, train, rest = nnx.split(model, chosen, ...)
        assert training.leaf_paths(train) == ["layers.0.kernel", "layers.1.kernel"]
        assert training.leaf_paths(rest) == ["layers.0.bias", "layers.1.bias", "scale"]

    def test_split_and_merge(self):
        model = toy.Toy(nnx.Rngs(0))
        graphdef, train, frozen = training.split_trainable(model, "layers.0")
        assert training.leaf_paths(train) == ["layers.0.bias", "layers.0.kernel"]
        merged = nnx.merge(graphdef, train, frozen)
        assert identical(nnx.state(model), nnx.state(merged))

    def test_errors_name_near_paths(self):
        model = toy.Toy(nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"'layers.0.kernal' matches none.*layers\.0\.kernel"):
            training.path_filter("layers.0.kernal", among=model)
        with pytest.raises(ValueError, match="'text' matches none of the 5"):
            training.split_trainable(model, exclude="text")
        with pytest.raises(ValueError, match="no parameter is selected"):
            training.split_trainable(model, "layers", "*")


class TestSharding:
    @pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
    def test_meshes_give_the_losses_of_one_device(self, shape, reference, tmp_path):
        mesh = training.make_mesh(*shape)
        assert mesh.shape == {"data": shape[0], "fsdp": shape[1], "tensor": 1}
        state = toy.run(mesh=mesh, metrics_path=tmp_path / "metrics.jsonl")
        losses = [record["loss"] for record in records(tmp_path / "metrics.jsonl")]
        np.testing.assert_allclose(losses, reference[1], rtol=0, atol=1e-5)

        kernel = state.params["layers"][0]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (8, 256 // shape[1])
        moment = state.opt_state[0].mu["layers"][0]["kernel"]
        assert moment.sharding == kernel.sharding

    def test_data_free_steps_shard_what_they_make(self, tmp_path):
        losses = []
        for mesh in (None, training.make_mesh(4, 2)):
            path = tmp_path / f"{mesh is None}.jsonl"
            toy.run(batches=None, mesh=mesh, num_steps=4, metrics_path=path)
            losses.append([record["loss"] for record in records(path)])
        np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)

        seen = []

        def probe(x):
            x = training.constrain_batch({"x": x, "scalar": jnp.zeros(())})["x"]
            jax.debug.inspect_array_sharding(x, callback=seen.append)
            return x

        with jax.set_mesh(training.make_mesh(4, 2)):
            jax.jit(probe)(jnp.zeros((16, 3)))
            jax.jit(probe)(jnp.zeros((12, 3)))
        assert [s.shard_shape((48, 3)) for s in seen] == [(6, 3), (12, 3)]

    def test_checkpoints_move_between_meshes(self, reference, tmp_path):
        folder = tmp_path / "run"
        toy.run(mesh=training.make_mesh(2, 4), num_steps=4, checkpoint_dir=folder)
        with training.Checkpoints(folder) as checkpoints:
            on_one = checkpoints.restore(toy.start()[1])
            mesh = training.make_mesh(4, 2)
            target = training.shard_state(toy.start()[1], mesh)
            on_mesh = checkpoints.restore(training.abstract_state(toy.start()[1], target))
        assert identical(on_one, on_mesh)
        assert len(on_one.params["layers"][0]["kernel"].devices()) == 1
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, on_mesh, target))
        final = toy.run(mesh=mesh, checkpoint_dir=folder)
        for ours, theirs in zip(
            jax.tree.leaves(final.params), jax.tree.leaves(reference[0].params), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    def test_bytes_per_device_fall_with_fsdp(self):
        tree = {
            "conv_in": {"kernel": jnp.zeros((3, 3, 8, 64)), "bias": jnp.zeros(64)},
            "blocks": {0: {"kernel": jnp.zeros((64, 128))}, 1: {"kernel": jnp.zeros((128, 96))}},
        }
        big = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) - 64 * 4
        for fsdp in (1, 2, 4, 8):
            mesh = training.make_mesh(fsdp=fsdp)
            placed = jax.device_put(tree, training.shard_tree(tree, mesh))
            here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
            assert here == big // fsdp + 64 * 4  # the small bias is everywhere

    @pytest.mark.parametrize(
        ("family", "path", "shape", "spec"),
        [
            (
                "UNet2DConditionModel",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.kernel",
                (768, 640),
                ("fsdp", "tensor"),
            ),
            (
                "UNet2DConditionModel",
                "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.kernel",
                (1280, 1280),
                ("tensor", "fsdp"),
            ),
            ("UNet2DConditionModel", "conv_in.kernel", (3, 3, 4, 320), (None,) * 3 + ("fsdp",)),
            ("UNet2DConditionModel", "conv_norm_out.scale", (320,), ()),
            ("UNet2DConditionModel", "time_embedding.linear_2.bias", (1280,), ()),
            (
                "AutoencoderKL",
                "encoder.down_blocks.0.resnets.1.conv1.kernel",
                (3, 3, 128, 128),
                (None, None, "fsdp", "tensor"),
            ),
            (
                "CLIPTextModel",
                "encoder.layers.0.mlp.fc2.kernel",
                (3072, 768),
                ("tensor", "fsdp"),
            ),
            (
                "CLIPTextModel",
                "embeddings.token_embedding.embedding",
                (49408, 768),
                ("tensor", "fsdp"),
            ),
            ("CLIPTextModel", "encoder.layers.0.mlp.fc1.kernel", (6, 8), (None, "tensor")),
            ("CLIPModel", "logit_scale", (), ()),
            (
                "T5EncoderModel",
                "encoder.block.3.layer.1.DenseReluDense.wi_1.kernel",
                (4096, 10240),
                ("fsdp", "tensor"),
            ),
            (
                "UMT5EncoderModel",
                "encoder.block.1.layer.0.SelfAttention.o.kernel",
                (4096, 4096),
                ("tensor", "fsdp"),
            ),
            (
                "T5EncoderModel",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.embedding",
                (32, 24),
                (),
            ),
            ("T5EncoderModel", "shared.embedding", (32128, 4096), ("tensor", "fsdp")),
            (
                "Qwen3ForCausalLM",
                "layers.26.self_attn.k_proj.kernel",
                (2560, 1024),
                ("fsdp", "tensor"),
            ),
            ("Qwen3ForCausalLM", "layers.26.self_attn.q_norm.scale", (128,), ()),
            ("Qwen3Model", "layers.0.mlp.down_proj.kernel", (9728, 2560), ("tensor", "fsdp")),
            (
                "SD3Transformer2DModel",
                "transformer_blocks.2.attn.to_add_out.kernel",
                (1536, 1536),
                ("tensor", "fsdp"),
            ),
            (
                "SD3Transformer2DModel",
                "transformer_blocks.2.attn2.to_q.kernel",
                (1536, 1536),
                ("fsdp", "tensor"),
            ),
            (
                "SD3Transformer2DModel",
                "transformer_blocks.2.ff_context.net.0.proj.kernel",
                (1536, 6144),
                ("fsdp", "tensor"),
            ),
            (
                "SD3Transformer2DModel",
                "transformer_blocks.2.norm1_context.linear.kernel",
                (1536, 9216),
                ("tensor", "fsdp"),
            ),
            (
                "SD3Transformer2DModel",
                "pos_embed.pos_embed",
                (1, 36864, 1536),
                (None, None, "fsdp"),
            ),
            (
                "FluxTransformer2DModel",
                "single_transformer_blocks.0.proj_out.kernel",
                (15360, 3072),
                ("tensor", "fsdp"),
            ),
            ("FluxTransformer2DModel", "proj_out.kernel", (3072, 64), ("fsdp",)),
            (
                "Flux2Transformer2DModel",
                "transformer_blocks.0.ff_context.linear_in.kernel",
                (3072, 18432),
                ("fsdp", "tensor"),
            ),
            (
                "HunyuanVideoTransformer3DModel",
                "context_embedder.token_refiner.refiner_blocks.0.ff.net.2.kernel",
                (12288, 3072),
                ("tensor", "fsdp"),
            ),
            (
                "WanTransformer3DModel",
                "blocks.3.attn2.to_out.0.kernel",
                (5120, 5120),
                ("tensor", "fsdp"),
            ),
            (
                "WanTransformer3DModel",
                "blocks.3.ffn.net.0.proj.kernel",
                (5120, 13824),
                ("fsdp", "tensor"),
            ),
            (
                "WanTransformer3DModel",
                "condition_embedder.time_proj.kernel",
                (5120, 30720),
                ("tensor", "fsdp"),
            ),
            ("WanTransformer3DModel", "blocks.3.scale_shift_table", (1, 6, 5120), ()),
            (
                "StableDiffusionPipeline",
                "text_encoder.encoder.layers.0.self_attn.q_proj.kernel",
                (768, 768),
                ("fsdp", "tensor"),
            ),
        ],
    )
    def test_table(self, family, path, shape, spec):
        mesh = training.make_mesh(1, 4, 2)
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        tree = leaf
        for part in reversed(path.split(".")):
            tree = {part: tree}
        (found,) = jax.tree.leaves(training.shard_tree(tree, mesh, RULES[family]))
        assert found == NamedSharding(mesh, PartitionSpec(*spec))

    @pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in sorted(MODULES)],
    )
    def test_published_sizes_split_evenly(self, name):
        """Every family: an eighth of the parameters on each of eight devices."""
        model = getattr(importlib.import_module(f"conceptax.flax_models.{MODULES[name]}"), name)
        rngs = OneKey()
        abstract = nnx.eval_shape(lambda: model(model.config_class(), rngs=rngs))
        params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
        shardings = training.shard_tree(params, training.make_mesh(1, 8), RULES[name])
        leaves, places = jax.tree.leaves(params), jax.tree.leaves(shardings)
        total = sum(leaf.size for leaf in leaves)
        here = [s.shard_shape(leaf.shape) for leaf, s in zip(leaves, places, strict=True)]
        assert total / 8 <= sum(map(math.prod, here)) <= 1.015 * total / 8  # biases, norms

    def test_errors(self):
        mesh = training.make_mesh(4, 2)
        tree = {"a": {0: jnp.zeros((4, 4))}}
        with pytest.raises(ValueError, match=r"no sharding row matches parameter a\.0"):
            training.shard_tree(tree, mesh, (("b", PartitionSpec()),))
        with pytest.raises(ValueError, match="names 3 dimensions"):
            training.shard_tree(tree, mesh, (("a", PartitionSpec(None, None, "fsdp")),))
        with pytest.raises(ValueError, match=r"batch leaf a\.0 has shape \(4, 4\).*multiple of 8"):
            training.shard_batch(tree, mesh)
        with pytest.raises(ValueError, match="needs positive sizes and 16 devices; 8 are there"):
            training.make_mesh(4, 4)


class TestTensorBoard:
    def test_checksum(self):
        crc = 0xE3069283  # CRC-32C of "123456789", the check value of RFC 3720's polynomial
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        assert _masked_crc32c(b"123456789") == masked

    def test_records(self, tmp_path):
        writer = TensorBoardWriter(tmp_path)
        writer.scalars(300, {"loss": 0.5})
        writer.close()
        (path,) = tmp_path.iterdir()
        data, payloads = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            payloads.append(data[12 : 12 + length])
            data = data[16 + length :]
        assert payloads[0].endswith(b"\x1a\x0dbrain.Event:2")
        value = b"\x0a\x04loss\x15" + struct.pack("<f", 0.5)
        assert payloads[1][9:] == b"\x10\xac\x02\x2a\x0d\x0a\x0b" + value


# ---- memory ----


def test_a_compiled_step_does_recompute():
    """On a CPU, too, where XLA would merge what is computed twice."""
    optimizer = optax.sgd(0.1)

    def step(remat, state, frozen, batch, key):
        layer = recomputed(lambda x, weight: x + jnp.tanh(x @ weight) @ weight.T, remat)

        def loss_of(params):
            x = batch
            for weight in params:
                x = layer(x, weight)
            return jnp.mean(x**2)

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        return training.apply_gradients(state, gradient, optimizer), {"loss": loss}

    keys = jax.random.split(jax.random.key(0), 8)
    params = [0.1 * jax.random.normal(key, (16, 256)) for key in keys]
    batch = jax.random.normal(jax.random.key(1), (512, 16))
    sizes, found = [], []
    for remat in (False, True):
        state = training.init_state(jax.tree.map(jnp.copy, params), optimizer)
        run = training.compile_step(step, remat).lower(state, None, batch, keys[0]).compile()
        sizes.append(run.memory_analysis().temp_size_in_bytes)
        found.append(run(state, None, batch, keys[0])[0].params)
    assert sizes[1] < sizes[0] / 3
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
