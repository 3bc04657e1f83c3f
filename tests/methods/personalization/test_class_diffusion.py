"""ClassDiffusion and its baselines: golden vectors, what trains, tokens, and runs that resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from personalizing_toy import pictures, subject, tiny_pipeline

from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.pipelines.new_tokens import add_tokens
from conceptax.flax_models.pipelines.tokenizers import TokenError, token_ids
from conceptax.methods.personalization import (
    METHODS,
    DreamBoothConfig,
    draw_class_images,
    method_of,
    personalize,
)
from conceptax.methods.personalization import class_diffusion as cd
from conceptax.methods.personalization.class_images import with_class_images
from conceptax.methods.sampling import add_noise
from conceptax.methods.subjects.images import Concept, ConceptListError
from conceptax.methods.text.new_tokens import encode_with_rows, initial_rows
from conceptax.methods.text.phrases import ConceptError
from conceptax.methods.training import (
    RULES,
    TrainState,
    compile_step,
    leaf_paths,
    make_mesh,
    matches,
    step_key,
    train,
)

RUN = {"steps": 2, "batch_size": 2, "weight_decay": 0.5, "learning_rate": 0.01, "scale_lr": False}
PATTERNS = {
    "class-diffusion": "crossattn_kv",
    "custom-diffusion": "crossattn_kv",
    "dreambooth": "unet",
    "textual-inversion": "nothing",
}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def changed_paths(before, after):
    old, new = params_of(before), params_of(after)
    pairs = zip(leaf_paths(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return {path for path, a, b in pairs if a.tobytes() != b.tobytes()}


# ---- losses ----


def test_masked_reconstruction_agrees_with_the_reference(golden):
    vectors = np.load(golden("class_diffusion_masked_reconstruction.npz"))
    prediction, target, mask = (
        jnp.asarray(vectors[name].transpose(0, 2, 3, 1))
        for name in ("in.prediction_bchw", "in.target_bchw", "in.mask_b1hw")
    )
    loss, gradient = jax.value_and_grad(cd.masked_reconstruction_loss)(prediction, target, mask)
    assert float(loss) == pytest.approx(float(vectors["out.loss"]), rel=1e-6)
    expected = vectors["grad.prediction_bchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    empty = cd.masked_reconstruction_loss(prediction, target, jnp.zeros_like(mask))
    assert float(empty) == 0.0


def test_semantic_preservation_agrees_with_the_reference(golden):
    vectors = dict(np.load(golden("class_diffusion_spl.npz")))
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=16,
        eos_token_id=int(vectors["meta.eos_token_id"]),
    )
    encoder = CLIPTextModel(config, rngs=nnx.Rngs(0))
    slots = dict(nnx.iter_graph(encoder))
    for spec in tensor_specs(encoder):
        slots[spec.path].set_value(jnp.asarray(spec.to_nnx(vectors[f"param.{spec.key}"])))
    modifier, plain = (
        jnp.asarray(vectors[f"in.{side}_ids"], jnp.int32) for side in ("modifier", "class")
    )
    ids = jnp.asarray([int(vectors["meta.modifier_token_id"])])
    ends = cd.spl_positions(np.asarray(modifier), np.array([modifier.shape[1]]), config, "eos")

    def loss_of(row):
        first = encode_with_rows(encoder, modifier, row[None], ids, jnp.asarray(ends)).pooled
        second = encoder(plain).pooled
        return cd.semantic_preservation_loss(first, second), (first, second)

    row = encoder.embeddings.token_embedding.embedding[...][ids[0]]
    with jax.default_matmul_precision("highest"):
        (loss, pooled), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(row)
    assert float(loss) == pytest.approx(float(vectors["out.loss"]), abs=1e-6)
    for received, name in zip(pooled, ("modifier", "class"), strict=True):
        np.testing.assert_allclose(received, vectors[f"out.pooled_{name}"], atol=2e-5)
    expected = vectors["grad.modifier_embedding"]
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_reference_pooling_stops_at_the_new_token_where_the_model_declares_2(pipeline):
    concept = subject()
    encoder = pipeline.text_encoder
    old = dataclasses.replace(encoder.config, eos_token_id=2)
    extended = add_tokens(pipeline, cd.new_rows(pipeline, [concept], cd.ClassDiffusionConfig()))
    phrase = "a photo of a <new1> seven"
    ids = np.asarray(extended.tokenizer([phrase])["input_ids"], np.int32)
    (new,) = token_ids(extended.tokenizer, ["<new1>"])
    where = int(np.argmax(ids[0] == new))
    lengths = np.array([ids.shape[1]])
    assert cd.spl_positions(ids, lengths, old, "eos").tolist() == [ids.shape[1] - 1]
    assert cd.spl_positions(ids, lengths, old, "reference").tolist() == [where]
    own = cd.spl_positions(ids, lengths, encoder.config, "reference")
    assert own.tolist() == [ids.shape[1] - 1]


# ---- what trains ----


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_part_alone_under_weight_decay(pipeline, name):
    method = METHODS[name]
    config = method.config(**RUN)
    assert method_of(config) is method
    before = {
        part: jax.tree.map(np.array, params_of(getattr(pipeline, part)))
        for part in ("unet", "text_encoder", "vae")
    }
    concepts = [subject(), subject("<new2>", "three", initializer="red")]
    result = personalize(pipeline, concepts, config, seed=1, progress=False)

    changed = changed_paths(pipeline.unet, result.unet)
    patterns = cd.TRAINED[PATTERNS[name]]
    expected = {
        path for path in leaf_paths(before["unet"]) if any(matches(p, path) for p in patterns)
    }
    assert changed == expected
    assert result.vae is pipeline.vae

    encoder = params_of(result.text_encoder)
    table = np.asarray(encoder["embeddings"]["token_embedding"].pop("embedding"))
    old = before["text_encoder"]["embeddings"]["token_embedding"].pop("embedding")
    for one, other in zip(
        jax.tree.leaves(encoder), jax.tree.leaves(before["text_encoder"]), strict=True
    ):
        assert one.tobytes() == other.tobytes()
    assert table[: len(old)].tobytes() == old.tobytes() and len(table) == len(old) + 2
    ids = token_ids(result.tokenizer, ["<new1>", "<new2>"])
    assert ids == [len(old), len(old) + 1]
    tokens = pipeline.tokenizer(["seven", "red"], add_special_tokens=False)["input_ids"]
    for row, (start,) in zip(table[ids], tokens, strict=True):
        assert (row == old[start]).all() == (name == "dreambooth")

    for part, params in before.items():  # the pipeline itself stays as it is
        now = params_of(getattr(pipeline, part))
        if part == "text_encoder":
            assert now["embeddings"]["token_embedding"].pop("embedding").tobytes() == old.tobytes()
        for one, other in zip(jax.tree.leaves(now), jax.tree.leaves(params), strict=True):
            assert one.tobytes() == other.tobytes()
    assert len(pipeline.tokenizer) == len(result.tokenizer) - 2


def test_parameters_keep_the_dtype_they_are_stored_in(pipeline):
    half = dataclasses.replace(pipeline)
    for part in ("unet", "text_encoder"):
        graphdef, state = nnx.split(getattr(pipeline, part))
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.to_pure_dict(state))
        setattr(half, part, nnx.merge(graphdef, params))
    config = cd.ClassDiffusionConfig(**RUN)
    static, state, frozen, _ = cd.prepare(half, [subject()], config)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    result = cd.personalized(half, [subject()], config, static, state, frozen)
    for part in (result.unet, result.text_encoder):
        assert {leaf.dtype for leaf in jax.tree.leaves(params_of(part))} == {np.dtype(jnp.bfloat16)}


# ---- the step ----


BOTH = cd.ClassDiffusionConfig(**RUN, spl_weight=0.7, prior_weight=0.3)


@pytest.fixture(scope="module")
def run(pipeline):
    """Custom Diffusion's prior preservation and the semantic preservation loss together."""
    return cd.prepare(pipeline, [subject()], BOTH)


def test_step_follows_the_equations(pipeline, run):
    static, state, frozen, data = run
    batch = next(iter(data))
    params = jax.tree.map(
        lambda p: p + 0.05 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), state.params
    )
    moved = TrainState(state.step, params, state.opt_state)
    key = jax.random.key(3)
    merged = cd.personalized(pipeline, [subject()], BOTH, static, moved, frozen)
    once = compile_step(cd.personalize_step, static)
    _, metrics = once(jax.tree.map(jnp.array, moved), frozen, batch, key)

    # The same with the whole models.
    latent_key, noise_key, time_key = jax.random.split(step_key(key, 0), 3)
    pixels = np.concatenate([batch["pixels"], batch["prior"]["pixels"]])
    tokens = np.concatenate([batch["tokens"], batch["prior"]["tokens"]])
    phrases = [
        merged.tokenizer(text)["input_ids"]
        for text in ("a photo of a <new1> seven", "a photo of a seven")
    ]

    @jax.jit
    def whole(pixels, tokens):
        mean, logvar = merged.vae.encode(pixels)
        draw, noise = (jax.random.normal(k, mean.shape) for k in (latent_key, noise_key))
        latents = merged.vae.scale(mean + jnp.exp(logvar / 2) * draw)
        times = jax.random.randint(time_key, (4,), 0, 1000)
        noisy = add_noise(static.schedule, latents, noise, times)
        states = merged.text_encoder(tokens).last_hidden_state
        ends = [merged.text_encoder(jnp.array([p])).last_hidden_state[0, -1] for p in phrases]
        return (merged.unet(noisy, times, states) - noise) ** 2, ends

    error, (one, other) = jax.tree.map(np.asarray, whole(pixels, tokens))
    reconstruction = np.mean(
        [(error[i] * batch["mask"][i]).sum() / batch["mask"][i].sum() for i in range(2)]
    )
    spl = 1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    wanted = {"reconstruction": reconstruction, "spl": spl, "prior": error[2:].mean()}
    wanted["loss"] = reconstruction + 0.7 * spl + 0.3 * wanted["prior"]
    assert metrics.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=2e-4, abs=2e-6), name


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    static, state, frozen, data = run
    run_to = lambda steps, **options: train(  # noqa: E731
        cd.personalize_step,
        static,
        state,
        frozen,
        data,
        key=jax.random.key(5),
        num_steps=steps,
        progress=False,
        **options,
    )
    straight = run_to(4)
    run_to(2, checkpoint_dir=tmp_path)
    resumed = run_to(4, checkpoint_dir=tmp_path)
    for one, other in zip(
        jax.tree.leaves(straight.params), jax.tree.leaves(resumed.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_mesh_of_devices_learns_the_same(pipeline):
    config = dataclasses.replace(BOTH, batch_size=4, steps=1)
    options = {"seed": 2, "progress": False}
    alone = personalize(pipeline, [subject()], config, **options)
    mesh, rules = make_mesh(data=2, fsdp=2), RULES["StableDiffusionPipeline"]
    spread = personalize(pipeline, [subject()], config, mesh=mesh, rules=rules, **options)
    for part in ("unet", "text_encoder"):
        first, second = (params_of(getattr(each, part)) for each in (alone, spread))
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)  # Adam's first step is 0.01 long


def test_semantic_loss_reaches_the_new_rows_alone(run):
    static, state, frozen, _ = run
    text = nnx.merge(static.text, frozen["text"])

    def drift(params):
        output = encode_with_rows(
            text, frozen["spl_tokens"], params["rows"], frozen["ids"], frozen["spl_positions"]
        )
        return cd.semantic_preservation_loss(output.pooled, frozen["class_pooled"])

    loss, gradient = jax.jit(jax.value_and_grad(drift))(state.params)
    assert float(loss) > 1e-4 and float(jnp.abs(gradient["rows"]).max()) > 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["unet"]))


# ---- tokens, settings, requests ----


def test_tokens_that_cannot_be_added_are_refused(pipeline):
    row = np.zeros(16, np.float32)
    for token, message in (
        ("seven", "already has the token 'seven'"),
        ("<|endoftext|>", "already has"),
        ("two words", "one word"),
        ("", "one word"),
    ):
        with pytest.raises(TokenError, match=message.replace("|", r"\|")):
            add_tokens(pipeline, {token: row})
    with pytest.raises(TokenError, match="another model"):
        add_tokens(pipeline, {"<new1>": np.zeros(8, np.float32)})
    extended = add_tokens(pipeline, {"<new1>": row, "<new10>": row + 1})
    text = extended.tokenizer("a <new10> on <new1>, brick", add_special_tokens=False)["input_ids"]
    first, second = token_ids(extended.tokenizer, ["<new1>", "<new10>"])
    assert text.index(second) < text.index(first)
    with pytest.raises(TokenError, match="already has"):
        add_tokens(extended, {"<new1>": row})


def test_initializers_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(TokenError, match=r"2 tokens.*1 initializers"):
        initial_rows(pipeline, ["<new1>", "<new2>"], ["red"])
    with pytest.raises(TokenError, match="a token of its own"):
        initial_rows(pipeline, ["<new1>", "<new1>"], ["red", "blue"])
    with pytest.raises(TokenError, match=r"'zebra' of '<new1>' is [0-9]+ tokens.*one token"):
        initial_rows(pipeline, ["<new1>"], ["zebra"])


def test_requests_are_checked(pipeline):
    config = cd.ClassDiffusionConfig(**RUN)
    for changes, concepts, error, message in (
        ({}, [], ConceptError, "no concept"),
        ({"size": 0}, [subject()], ValueError, "size must be a multiple"),
        ({"prior_weight": 1.0}, [Concept("<n>", "seven", pictures(1))], ConceptError, "class of"),
        ({}, [subject(prompt="<new1> " + "on a red seven " * 9)], ConceptError, "Shorten it"),
    ):
        with pytest.raises(error, match=message):
            cd.prepare(pipeline, concepts, dataclasses.replace(config, **changes))
    for changes, message in (
        ({"images": []}, "no images"),
        ({"images": [np.zeros((4, 4), np.uint8)]}, "uint8"),
        ({"word": " "}, "word of its class"),
        ({"prompt": "a seven"}, "lacks the concept's token"),
    ):
        with pytest.raises(ConceptListError, match=message):
            dataclasses.replace(subject(), **changes)
    for name, make in (
        ("steps", lambda: cd.ClassDiffusionConfig(steps=0)),
        ("trained", lambda: cd.ClassDiffusionConfig(trained="attention")),
        ("train_tokens", lambda: cd.ClassDiffusionConfig(trained="nothing", train_tokens=False)),
        ("prompt", lambda: cd.ClassDiffusionConfig(prompt="a dog")),
    ):
        with pytest.raises((ValueError, TypeError), match=name):  # or the type checker
            make()
    with pytest.raises(ValueError, match="received int"):
        method_of(3)


def test_class_images_are_drawn_where_there_are_none(pipeline, monkeypatch):
    monkeypatch.setattr("conceptax.methods.personalization.class_images.CLASS_IMAGES", 2)
    config = DreamBoothConfig(steps=1, batch_size=2, learning_rate=0.01)
    alone = Concept("<n>", "seven", pictures(2), class_prompt="a seven")
    with pytest.warns(
        UserWarning, match=r"2 class images .* each of <n> \(seven\), which has none"
    ):
        learnt = personalize(pipeline, [alone], config, seed=3)
    images = list(draw_class_images(pipeline, "a seven", 2, seed=3))
    given = dataclasses.replace(alone, class_images=images)
    again = personalize(pipeline, [given], config, seed=3)
    assert not changed_paths(learnt.unet, again.unet) and changed_paths(pipeline.unet, again.unet)
    rest = draw_class_images(pipeline, "a seven", 1, seed=3, first=1)[0]
    assert np.abs(rest.astype(int) - images[1]).max() <= 1  # batches of other sizes round otherwise
    taken = dataclasses.replace(alone, token="seven")
    with pytest.raises(TokenError, match="already has"):  # and no warning: nothing is drawn
        personalize(pipeline, [taken], config)
    assert with_class_images(pipeline, [alone], cd.ClassDiffusionConfig()) == [alone]


def test_captions_and_phrases_hold_the_new_token(run):
    _, _, frozen, data = run
    (new,) = frozen["ids"].tolist()
    batch = next(iter(data))
    assert (batch["tokens"] == new).sum(axis=1).tolist() == [1, 1]
    assert not (batch["prior"]["tokens"] == new).any()
