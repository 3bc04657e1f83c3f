"""The command line end to end, on a tiny pipeline of the real classes."""

import ast
import codecs
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from conceptax.cli import bars, main, programs
from conceptax.cli.commands import COMMANDS, load, module_name
from conceptax.cli.describe import described
from conceptax.cli.failures import in_flags, sentence
from conceptax.cli.runs import kept_run
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.files.weights import read_json
from conceptax.errors import ConceptaxError
from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.glyph_classifier import GlyphClassifier, GlyphClassifierConfig
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.interrupts import _remove_temporary
from conceptax.methods.diffusion.text_to_image import TextToImage, image_keys
from conceptax.methods.erasing import METHODS
from conceptax.methods.evaluation.unsafe_prompts import read_unsafe_prompts
from conceptax.methods.glyphs import recipe
from conceptax.methods.glyphs.judge import Judge, save_judge
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.sage import SageConfig
from conceptax.methods.seeds import SeedError, check_seed
from conceptax.methods.segmentation.vocabulary import Vocabulary
from conceptax.methods.subjects.images import read_class_folders
from conceptax.methods.text.phrases import read_phrases
from conceptax.reporting.gallery import Images, read_report
from conceptax.reporting.instruments import load_classifier

# 64 pixels from an 8x8 latent, so that the judge can look at them.
UNET = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    cross_attention_dim=16,
    attention_head_dim=2,
)
VAE = AutoencoderKLConfig(
    block_out_channels=(8, 8, 8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=64,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
ERASE = [
    *("--cycles", "2", "--check-steps", "1", "--prompts", "2", "--global-rows", "4"),
    *("--local-rows", "2", "--learning-rate", "0.01", "--similarity-cap", "1"),
]


def random_model(model_class, config, rng, dtype=jnp.float16):
    abstract = nnx.eval_shape(
        lambda: model_class(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)

    def fill(path, leaf):
        fan_in = 1 if path[-1].key == "embedding" else np.prod(leaf.shape[:-1])
        values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(values if len(leaf.shape) > 1 else 1 + 0.1 * values, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A pipeline folder in float16 with a judge beside it, as the bundled model has."""
    rng = np.random.default_rng(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    pipeline = StableDiffusionPipeline(
        unet=random_model(UNet2DConditionModel, UNET, rng),
        vae=random_model(AutoencoderKL, VAE, rng),
        text_encoder=random_model(CLIPTextModel, text, rng),
        tokenizer=tokenizer,
        scheduler_config=dict(recipe.SCHEDULER),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pytorch(pipeline, folder)
    classifier = GlyphClassifierConfig(channels=(4, 4), strides=(4, 4), groups=2, features=4)
    eye = random_model(GlyphClassifier, classifier, rng, jnp.float32)
    save_judge(Judge(eye, {"digit": {"accuracy": 0.1}}), folder / "judge")
    return folder


@pytest.fixture(scope="session")
def erased(model, tmp_path_factory):
    """The tiny pipeline with `three` erased for two cycles."""
    folder = tmp_path_factory.mktemp("erasing") / "out"
    arguments = ["erase", "--model", str(model), "--concept", "three", "--output", str(folder)]
    assert main([*arguments, "--seed", "3", *ERASE]) == 0
    return folder


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the tiny pipeline to damage."""
    return Path(shutil.copytree(model, tmp_path / "broken", ignore=lambda *_: ["judge"]))


def refused(capsys, arguments, text, status=1):
    """Run a command that must fail with one sentence on stderr."""
    assert main([str(argument) for argument in arguments]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("conceptax"), err
    assert "Traceback" not in err
    assert text in err, err


def read_png(file):
    with Image.open(file) as image:
        image.load()
    return image


def tensors_of(folder):
    return {
        f"{file.parent.name}/{key}": value
        for file in folder.rglob("*.safetensors")
        for key, value in safetensors.numpy.load_file(file).items()
    }


# ---- the command itself ----


def test_help_lists_the_commands_and_imports_nothing_heavy():
    script = (
        "import sys; from conceptax.cli import main; assert main(['--help']) == 0;"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'tyro'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


def test_doctor_tells_what_is_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    sections = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert sections == [
        *("Versions", "Optional packages", "Devices", "Compilers"),
        *("Neighborhood attention", "Folders"),
    ]
    assert f"{jax.device_count()} x cpu" in out
    assert re.search(r"host +\d+ cores, .* of memory free", out)


def test_what_is_compiled_is_kept(monkeypatch, tmp_path):
    """JAX, which no command has imported by then, reads it from the environment."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["inspect", str(tmp_path)]) == 1
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "conceptax" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert main(["inspect", str(tmp_path)]) == 1
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_files_that_take_a_while_tell_how_far_they_are(monkeypatch, capsys):
    file, size = Path("folder/model.safetensors"), 4 * 10**6
    for patience, told in ((60, ""), (0, "writing model.safetensors, MB: 1 of 4")):
        monkeypatch.setattr(bars, "_PATIENCE", patience)
        with bars.Bytes() as bar:
            for done in (0, size // 4, size // 2, size):
                bar.wrote(file, done, size)
                time.sleep(0.001)
        said = capsys.readouterr().err
        assert said.startswith(told) and said.count("\n") == bool(told)


def test_what_is_kept_has_a_bound(monkeypatch, tmp_path):
    """What was read longest ago goes first; a folder of one's own is left alone."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(programs, "_LIMIT", 25)
    folder = programs.programs_folder()
    (folder / "deeper").mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    for age, name in enumerate(["new", "read", "old", "oldest"]):
        for place in (folder, mine):
            (place / name).write_bytes(bytes(10))
            os.utime(place / name, (1e9 - age, 1e9 - age))
    os.utime(folder / "read", (2e9, 1e9 - 1))
    assert main(["inspect", str(tmp_path)]) == 1
    assert sorted(os.listdir(folder)) == ["deeper", "new", "read"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(mine))
    assert main(["inspect", str(tmp_path)]) == 1
    assert len(os.listdir(mine)) == 4


def test_wrong_words_are_told(capsys):
    refused(capsys, ["erode"], "there is no command 'erode'", status=2)
    assert main(["erase", "--nonsense"]) == 2
    assert "there is no --nonsense" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert main([]) == 0


def test_whatever_goes_wrong_is_one_sentence(capsys, monkeypatch):
    """Of a command that raises what is given; a bug says where the rest is."""
    from conceptax.cli import inspect

    def told(error):
        def run(command):
            raise error

        monkeypatch.setattr(inspect, "run", run)
        refused(capsys, ["inspect", "x"], "error: ")
        with pytest.raises(type(error)):
            main(["--debug", "inspect", "x"])
        monkeypatch.setenv("CONCEPTAX_DEBUG", "1")
        with pytest.raises(type(error)):
            main(["inspect", "x"])
        monkeypatch.delenv("CONCEPTAX_DEBUG")
        return sentence(error)

    class Panic(BaseException):
        """As Rust's, which are no `Exception`s."""

    assert told(ConceptaxError("one\n  two")) == "one two"
    assert told(OSError(errno.ENOSPC, "No space left", "x")) == "x: No space left."
    assert "IndexError: out. This is a bug" in told(IndexError("out"))
    assert "--debug" in told(Panic("at the disco")) and "Panic" in told(Panic("at the disco"))
    assert "RecursionError" in told(RecursionError("too deep"))
    assert "not enough memory" in told(MemoryError())
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert "not enough memory (RESOURCE_EXHAUSTED" in told(memory)
    assert "a library is missing" in told(ModuleNotFoundError("No module named 'optax'"))
    assert len(told(ConceptaxError("long " * 1000))) == 1000
    assert "\x1b" not in told(ConceptaxError("\x1b[2J"))


def test_errors_of_ours_are_told_apart_from_those_of_libraries():
    def told(function):
        try:
            function()
        except Exception as error:
            return sentence(error)

    assert "This is a bug" in told(lambda: jnp.zeros(2).reshape(3))
    assert "This is a bug" in told(lambda: [][0])
    assert told(lambda: load_pytorch("/nowhere")).startswith("/nowhere does not exist")
    assert told(lambda: os.listdir("/nowhere/at/all")).startswith("/nowhere/at/all: No such file")
    assert told(lambda: SageConfig(cycles=0)) == "cycles must be at least 1, received 0."


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["convert", str(tmp_path / "none"), str(tmp_path / "out"), "--debug"])


def run_conceptax(*arguments, **options):
    """The command in a process of its own, its standard streams as given."""
    command = [sys.executable, "-m", "conceptax", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, **options)


def test_a_reader_that_leaves_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"capture_output": False, "stdout": writing, "stderr": subprocess.PIPE}
    try:
        ended = run_conceptax("--help", **streams)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
    with open("/dev/full", "w") as full:
        ended = run_conceptax("--version", **streams | {"stdout": full})
    assert (ended.returncode, ended.stderr) == (1, "conceptax: error: No space left on device.\n")


def test_a_terminal_that_cannot_show_a_letter_shows_another(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = run_conceptax("sample", "--prompts", tmp_path / "“drei”", env=environment)
    assert ended.returncode == 1
    assert "/?drei?: No such file or directory." in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_platforms_that_are_not_here_are_told(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    out = tmp_path / "out.png"
    options = ["--steps", "1", "--output", out]
    ended = run_conceptax("sample", "--prompt", "three", *options, env=environment)
    if ended.returncode == 0:
        pytest.skip("there is a GPU here")
    assert ended.stderr.count("\n") == 1 and "JAX_PLATFORMS is 'cuda'" in ended.stderr
    assert "It finds: cpu. Set JAX_PLATFORMS=cpu" in ended.stderr
    assert os.listdir(tmp_path) == []


def test_seeds_are_checked_alike(tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    for words in (["sample", "--prompt", "a"], ["demo"], ["erase", "--concept", "a"]):
        for seed in (-1, 2**32):
            refused(capsys, [*words, *out, "--seed", seed], "--seed must be a whole number from 0")
    refused(capsys, ["glyphs", "train", *out, "--judge.seed", "-1"], "--judge.seed must be")
    refused(capsys, ["glyphs", "train", *out, "--seed", "-1"], "--seed must be")
    with pytest.raises(SeedError, match="received -1"):
        image_keys(-1, np.arange(2))
    assert check_seed(2**32 - 1) == 2**32 - 1
    assert os.listdir(tmp_path) == []


def test_numbers_and_paths_are_checked_alike(tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    for number in ("nan", "inf", "-inf"):
        for words, flag in (
            (["sample", "--prompt", "a"], "--guidance"),
            (["evaluate", "--concept", "a"], "--guidance"),
            (["demo"], "--guidance"),
        ):
            refused(capsys, [*words, *out, flag, number], f"{flag} takes a finite number, received")
    for words in (["sample", "--prompt", "a", *out, "--model", ""], ["demo", "--model="]):
        refused(capsys, words, "error: --model is empty: it takes a path")
    refused(capsys, ["convert", "", tmp_path / "out"], "an argument is empty")
    many = "keeping 1000000000 images takes at least 200 GB of memory"
    for words, flag in (
        (["sample", "--prompt", "a"], "--count"),
        (["evaluate", "--concept", "three", "--edited", "none"], "--images"),
        (["personalize"], "--class-count"),
    ):
        refused(capsys, [*words, *out, flag, 10**9], many)
    for group in ("judge", "unet"):
        assert main(["glyphs", "train", f"--{group}.steps", "0"]) == 2
        assert f"{group}: steps must be at least 1, received 0" in capsys.readouterr().err
    refused(capsys, ["glyphs", "train", *out, "--measure", 10**9], "take a smaller --measure.")
    refused(capsys, ["glyphs", "train", *out, "--images", 0], "--images must be at least 1")
    simulate = ["gna", "simulate", "--layout", "8", "--window", "3"]
    refused(capsys, [*simulate, "--replaced", "-1"], "--replaced goes with --attention-share")
    for flag, value in (("--frames", "0"), ("--fps", "9"), ("--betas", "model")):
        refused(capsys, ["sample", "--prompt", "a", *out, flag, value], f"leave out {flag}.")
    assert os.listdir(tmp_path) == []


def test_text_files_of_people(tmp_path, capsys):
    """UTF-8 with a mark or without; other encodings are told by their place."""
    file = tmp_path / "words.txt"
    cases = {
        "a\ncafé".encode("latin-1"): "line 2, byte 4 of it is 0xe9; save it as UTF-8",
        "café".encode("utf-16"): "is in UTF-16; save it as UTF-8",
        "café".encode("utf-32"): "is in UTF-32",
        b"PK\x03\x04\0\0": "is no text: it holds zero bytes",
    }
    commands = (
        ["sample", "--prompts", file],
        ["erase", "--concept", file, "--output", tmp_path / "out"],
    )
    readers = (read_phrases, Vocabulary.read, read_unsafe_prompts, read_class_folders, read_json)
    for content, text in cases.items():
        file.write_bytes(content)
        for arguments in commands:
            refused(capsys, arguments, f"{file} {text}" if text.startswith("is") else text)
        for read in readers:
            with pytest.raises(ConceptaxError, match=re.escape(text)):
                read(file)
    for mark in (b"", codecs.BOM_UTF8):
        file.write_bytes(mark + "1:café\r\n".encode())
        assert read_phrases(file) == ["1:café"]
        assert Vocabulary.read(file).names == ("café",)
        file.write_bytes(mark + b'{"a": 1}')
        assert read_json(file) == {"a": 1}


# ---- the words of messages ----


def command_types(name):
    """The dataclasses that a command's flags can come from."""
    if not hasattr(load(name, [])[0], "command_type"):
        return [load(name, [])[1]]
    methods = ("", *METHODS, "class-diffusion", "dreambooth", "custom-diffusion")
    given = [*(f"--method={method}" for method in methods), "--suite=i2p"]
    return [load(name, [each])[1] for each in given]


def flags_of(name):
    return {flag.name for kind in command_types(name) for flag in described(kind)} - {""}


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_those_that_help_lists(name, capsys):
    assert main([*name.split(), "--help-all"]) == 0
    listed = set(re.findall(r"^  (--[a-z][\w.-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {flag.name for flag in described(command_types(name)[0])} - {""} == listed


def strings(tree):
    """The texts in a module, those of an f-string together, with an x where a value goes."""
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    for node in joined:
        yield "".join(
            getattr(part, "value", "x") if isinstance(part, ast.Constant) else "x"
            for part in node.values
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def test_messages_mention_flags_that_exist(repository):
    """A command's module those of its commands, or of a command that it names; others any."""
    own = {name: flags_of(name) for name in COMMANDS}
    always = {"--debug", "--version", "--help", "--help-all", "--offline", "--yes"}
    every = always.union(*own.values())
    found = 0
    for room in ("src/conceptax/cli", "src/conceptax/reporting", "methods", "converters"):
        for file in sorted((repository / room).rglob("*.py")):
            commands = [
                name
                for name in COMMANDS
                if room.endswith("cli") and module_name(name) in (file.stem, file.parent.name)
            ]
            here = always.union(*(own[name] for name in commands)) if commands else every
            for text in strings(ast.parse(file.read_text())):
                if "color-scheme" in text or "tensorboard --" in text:  # CSS, another program
                    continue
                named = [
                    name
                    for name in COMMANDS
                    if f"conceptax {name}" in text or text.startswith(f"{name} ")
                ]
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", text):
                    found += 1
                    known = here.union(*(own[name] for name in named))
                    assert flag in known, f"{file}: {flag} in {text!r}"
    assert found > 50


def test_messages_name_flags_where_flags_were_given(model, tmp_path, capsys):
    sample = ["sample", "--model", model, "--prompt", "a", "--output", tmp_path / "out.png"]
    refused(capsys, [*sample, "--steps", "0"], "error: --steps must be")
    refused(capsys, [*sample, "--batch-size", "0"], "error: --batch-size must be")
    refused(capsys, [*sample, "--height", "17"], "error: --height 17 must be")
    erase = ["erase", "--model", model, "--concept", "three", "--output", tmp_path / "out"]
    refused(capsys, [*erase, "--cycles", "0"], "error: --cycles must be")
    refused(capsys, [*erase, "--min-timestep", "3"], "error: --min-timestep is a fraction")
    refused(capsys, ["erase"], "no concept was given")
    train = ["segment", "train", "--data", tmp_path, "--vocabulary", "a", "--open-clip", model]
    refused(capsys, [*train, "--steps", "0"], "error: --steps must be at least 1, received 0")
    refused(capsys, [*train, "--clip", "-1"], "error: --clip must be positive, received -1")
    evaluate = ["evaluate", "--original", model, "--concept", "three"]
    evaluate += ["--edited", model / "unet"]
    evaluate += ["--output", tmp_path / "out"]
    refused(capsys, [*evaluate, "--steps", "0"], "error: --steps must be at least 1")
    evaluate += ["--classifier"]
    assert main([str(argument) for argument in [*evaluate, model]]) == 1
    told = capsys.readouterr().err
    assert f"{model} is a pipeline, no classifier: it takes a judge that" in told
    assert f"Pass {model / 'judge'}, which is in it." in told
    with pytest.raises(ConceptaxError, match="tokenizer is no classifier, for it has no config"):
        load_classifier(model / "tokenizer", None, "x")
    assert os.listdir(tmp_path) == []

    known = ["--steps", "--attack.steps", "--search.tokens", "--wide.tokens", "--no-free-word"]
    for before, after in {
        "num_inference_steps=3; got 0.": "--steps 3; got 0.",
        "tokens must be 1": "tokens must be 1",  # of two groups
        "set free_word, with force=True (--force)": "set --no-free-word, with --force",
        "/a/free_word is 'free_word'": "/a/free_word is 'free_word'",
        "Unknown. Pass architecture= if it is known.": "Unknown.",
        "pass prediction_type='epsilon'.": "pass `conceptax convert --prediction-type epsilon`.",
    }.items():
        assert in_flags(before, known) == after
        assert in_flags(before, ()) == before
    both = ["--steps", "--attack.steps", "--length"]
    told = "steps must be at least 1"
    assert in_flags(told, both) == told
    assert in_flags(told, both, ["--steps=0"]) == f"--{told}"
    assert in_flags(told, both, ["--attack.steps", "0"]) == f"--attack.{told}"
    assert in_flags(told, both, ["--attack.steps", "0", "--steps", "0"]) == told


# ---- signals ----

# A command's main thread as it may be when a signal comes; each prints a line when it is there.
MAIN_THREADS = {
    "in C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 500_000_000)",
    "swallowing": "[swallow() for _ in iter(int, 1)]",
    "finishing": "finish()",
    "replacing": "replace()",
}
STOPPED = """
import hashlib, os, pathlib, sys, time
from conceptax.interrupts import Stopper, noting, temporary, whole

def swallow():
    try:
        time.sleep(0.01)
    except BaseException:
        pass

def finish():
    received = []
    with noting(received):
        print("there", flush=True)
        while not received:
            time.sleep(0.01)
        print("noted", flush=True)
        time.sleep(60)

def replace():
    with whole():
        print("there", flush=True)
        time.sleep(0.5)
        print("replaced", flush=True)
    time.sleep(60)

work = pathlib.Path(sys.argv[1]) / "deep" / "work"
with Stopper("conceptax"), temporary(work, [work.parent]):
    work.mkdir(parents=True)
    (work / "part").write_text("half")
    if sys.argv[2] in ("in C", "swallowing"):
        print("there", flush=True)
    exec(sys.argv[3])
"""


@pytest.mark.parametrize("where", MAIN_THREADS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_whatever_it_does(where, signum, tmp_path):
    arguments = [sys.executable, "-c", STOPPED, tmp_path, where, MAIN_THREADS[where]]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signum)
    if where == "finishing":
        assert process.stdout.readline() == "noted\n"
        told = process.stderr.readline()
        assert f"{signum.name} received: finishing the step; " in told
        assert os.listdir(tmp_path) == ["deep"]
        process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert err in ("conceptax: interrupted.\n", "conceptax: ended by SIGTERM.\n")
    assert out == ("replaced\n" if where == "replacing" else "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", [0.2, 0.7, 1.5])
def test_a_command_stops_at_once_and_leaves_nothing(seconds, tmp_path):
    """Wherever it is by then: importing, loading, compiling."""
    script = "from conceptax.__main__ import main; print('there', flush=True); main()"
    out = tmp_path / "deep" / "out.png"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sample", "--prompt", "a", "--output", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""},
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    time.sleep(seconds)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert re.fullmatch(r"conceptax( sample)?: interrupted\.\n", err)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("steps", [[], ["12"]])
def test_a_signal_leaves_checkpoints_alone_that_hold_a_step(steps, tmp_path):
    out = tmp_path / "deep" / "out"
    command = types.SimpleNamespace(checkpoint_dir=None, checkpoint_every=9, output=out, mesh=None)
    with kept_run(command, 20) as kept:
        assert kept.directory is not None
        for name in ("12.orbax-checkpoint-tmp", *steps):  # the first one was being written
            (kept.directory / name).mkdir(parents=True)
        _remove_temporary()  # as a signal has it done
        assert kept.directory.exists() == bool(steps)
    assert not kept.directory.exists()


# ---- convert ----


def test_convert_keeps_every_bit(model, tmp_path, capsys):
    out = tmp_path / "deeper" / "out"
    assert main(["convert", str(model), str(out)]) == 0
    before, after = tensors_of(model), tensors_of(out)
    before = {key: value for key, value in before.items() if not key.startswith("judge/")}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert "StableDiffusionPipeline" in capsys.readouterr().out

    refused(capsys, ["convert", model, out], "already exists")
    options = ["--force", "--dtype", "float32", "--shard-size", "20KB"]
    assert main(["convert", str(model), str(out), *options]) == 0
    assert all(value.dtype == np.float32 for value in tensors_of(out).values())
    assert (out / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()


# ---- erase ----


def test_erase_changes_the_text_encoder_alone(model, erased):
    before, after = tensors_of(model), tensors_of(erased)
    changed = {key for key, value in after.items() if not np.array_equal(value, before[key])}
    assert changed and all(key.startswith("text_encoder/") for key in changed)
    assert not any("embedding" in key for key in changed)
    assert all(value.dtype == np.float16 for value in after.values())
    record = json.loads((erased / "erasing.json").read_text())
    assert record["concepts"] == ["three"] and record["seed"] == 3
    assert record["settings"]["cycles"] == 2 and np.isfinite(record["last_cycle"]["loss"])
    assert {"conceptax", "jax", "flax"} <= record["versions"].keys()
    assert len((erased / "training.jsonl").read_text().splitlines()) == 2
    assert os.listdir(erased.parent) == ["out"]


def test_the_erased_folder_draws_the_same_in_diffusers(torch, erased):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(erased).to(dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    drawer = TextToImage.from_pipeline(load_pytorch(erased))
    latents = (
        np.random.default_rng(1).normal(size=(2, *drawer.pipeline.latent_shape)).astype(np.float32)
    )
    prompts = ["a red three on brick", "a blue seven on grass"]
    with torch.no_grad():
        expected = theirs(
            prompts,
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="np",
            latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        ).images

    from conceptax.flax_models.pipelines.tokenizers import tokenize
    from conceptax.methods.diffusion.text_to_image import jitted_generate
    from conceptax.methods.sampling import make_sampler

    actual = jitted_generate(
        drawer.static,
        drawer.params,
        tokenize(drawer.pipeline.tokenizer, prompts),
        tokenize(drawer.pipeline.tokenizer, [""])[0],
        latents,
        make_sampler(drawer.schedule, num_inference_steps=3),
        5.0,
        keys=None,
    )
    actual = np.asarray(actual) * 0.5 + 0.5
    assert expected.std() > 0.01
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


def test_erase_repeats_itself_and_exports_the_text_encoder_alone(
    model, erased, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "encoder"
    arguments = ["erase", "--model", model, "--concept", "three", "--output", out, "--seed", "3"]
    arguments = [*map(str, arguments), "--export", "text-encoder", *ERASE]
    assert main(arguments) == 0
    expected = safetensors.numpy.load_file(erased / "text_encoder" / "model.safetensors")
    found = safetensors.numpy.load_file(out / "model.safetensors")
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert type(load_pytorch(out)).__name__ == "CLIPTextModel"
    capsys.readouterr()

    # Before any work: a second run is refused although the model it names does not exist.
    arguments[arguments.index(str(model))] = str(tmp_path / "none")
    refused(capsys, arguments, "already exists and is not empty")


def test_erase_checkpoints_belong_to_one_run(model, tmp_path, capsys):
    run = tmp_path / "run"
    base = ["erase", "--model", str(model), "--checkpoint-dir", str(run), *ERASE]
    assert main([*base, "--concept", "three", "--output", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    other = [*base, "--concept", "four", "--output", str(tmp_path / "b")]
    refused(capsys, other, '--concept (["three"] before, ["four"] now)')
    other = [*base, "--concept", "three", "--output", str(tmp_path / "b"), "--dtype", "bfloat16"]
    refused(capsys, other, '--dtype ("float32" before, "bfloat16" now)')
    # Its learning rate falls along the run, so a longer one is another from the first step on.
    longer = [*base, "--concept", "three", "--output", str(tmp_path / "b"), "--cycles", "3"]
    refused(capsys, longer, "--cycles (2 before, 3 now)")
    assert main([*base, "--concept", "three", "--output", str(tmp_path / "b")]) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    assert len((tmp_path / "b" / "training.jsonl").read_text().splitlines()) == 2
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "run"]


def test_an_interrupted_run_goes_on_without_being_told(
    model, erased, tmp_path, capsys, monkeypatch
):
    from conceptax.methods.training import loop

    started, out = loop._Watcher.started, tmp_path / "out"
    command = ["erase", "--model", str(model), "--concept", "three", "--output", str(out)]
    command += ["--seed", "3", *ERASE]

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        started(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Watcher, "started", interrupted)
        assert main([*command, "--checkpoint-every", "0"]) == 130
        assert "no checkpoints were kept" in capsys.readouterr().err
        assert os.listdir(tmp_path) == []
        assert main(command) == 130
    assert "stopped after step 1 and saved: run the same" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [".out.checkpoints"]
    refused(capsys, [*command, "--anchor", "seven"], '--anchor ("" before, "seven" now)')
    assert main(command) == 0
    assert "resuming from step 1" in capsys.readouterr().err
    expected, found = tensors_of(erased), tensors_of(out)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert os.listdir(tmp_path) == ["out"]


def test_trouble_with_checkpoints_is_told_of_them(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("dear")
    base = ["erase", "--model", model, "--concept", "three", "--output", tmp_path / "out", *ERASE]
    for name, message in (
        ("file", "file is not a folder"),
        ("file/deeper", "file is not a folder"),
        ("mine", "it holds something else (notes) and no erasing.json"),
    ):
        place = tmp_path / name
        refused(capsys, [*base, "--checkpoint-dir", place], f"cannot be kept in {place}: ")
        refused(capsys, [*base, "--checkpoint-dir", place], message)
    refused(capsys, [*base, "--checkpoint-every", "-1"], "--checkpoint-every takes a number")
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]
    assert os.listdir(tmp_path / "mine") == ["notes"]


def test_concepts_that_cannot_be_erased(model, tmp_path, capsys):
    base = ["erase", "--model", model, "--output", tmp_path / "out"]
    refused(capsys, base, "no concept was given")
    refused(capsys, [*base, "--concept", "  "], "no concept was given")
    refused(capsys, [*base, "--concept", "three", "--concept", ""], "the concept is empty")
    refused(capsys, [*base, "--concept", "three " * 40], "this text encoder reads 24")
    refused(capsys, [*base, "--concept", "three", "--cycles", "0"], "cycles must be at least 1")
    for method in ("sage", "esd-x", "speed"):
        itself = [*base, "--concept", "Three ", "--method", method, "--anchor", " three"]
        itself += ["--similarity-cap", "1"]  # to a random encoder all phrases are near
        refused(capsys, itself, "turning it into itself erases nothing")
    many = [*base, "--concept", "three", "--prompts", "1000000000", "--similarity-cap", "1"]
    refused(capsys, many, "a cycle of 1000000000 --prompts with --local-rows 6 takes at least")
    none = [*base, "--concept", "three", "--learning-rate", "0"]
    refused(capsys, none, "--learning-rate must be positive")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    refused(capsys, [*base, "--concept", "three", "--retain", empty], "holds no phrases")
    refused(capsys, [*base, "--concept", "three", "--mesh", "64", "2"], "needs positive sizes and")
    component = [*base, "--concept", "three"]
    component[2] = model / "unet"
    refused(capsys, component, "needs the whole pipeline")
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_each_method_has_settings_of_its_own(capsys):
    def shown(*arguments):
        assert main(["erase", *arguments, "--help-all"]) == 0
        return capsys.readouterr().out

    sage, word = shown(), shown("--method", "word")
    assert "--check-steps" in sage and shown("--method=sage") == sage
    assert "--check-steps" not in word and "--global-weight" in word
    assert "--erase-weight" in shown("--method", "uce")
    assert "--untrained" in shown("--method", "esd-u")
    assert "--attack-steps" in shown("--method", "advunlearn")
    for name in METHODS:
        assert "--anchor" in shown("--method", name)
    assert main(["erase", "--concept", "three", "--method", "uce", "--cycles", "3"]) == 2
    *names, last = (name for name, method in METHODS.items() if method.trains)
    told = f"--cycles is a setting of {', '.join(names)} and {last}, not of the method"
    assert told in " ".join(capsys.readouterr().err.split())
    assert main(["erase", "--concept", "three", "--method", "magic"]) == 2
    assert "magic" in capsys.readouterr().err


def test_a_rival_edits_the_unet_and_exports_it(model, tmp_path, capsys):
    words = tmp_path / "concepts.txt"
    words.write_text("three\n# and\nseven\n")
    base = ["erase", "--model", model, "--method", "uce", "--concept", words]
    base = [str(argument) for argument in [*base, "--contexts", "2", "--frames", "0"]]
    base += ["--similarity-cap", "1"]  # to a random encoder all phrases are near
    refused(capsys, [*base, "--output", tmp_path / "x", "--export", "lora"], "UCE trains no LoRA")
    assert main([*base, "--output", str(tmp_path / "whole")]) == 0
    out = capsys.readouterr().out
    assert "not retained, because closer to a concept than 1.0: " in out
    assert "'three' (1.00 to 'three')" in out
    assert "erased 'three', 'seven' with UCE" in out
    before, after = tensors_of(model), tensors_of(tmp_path / "whole")
    changed = {key for key, value in after.items() if not np.array_equal(value, before[key])}
    assert changed and all(".attn2.to_" in key and key.startswith("unet/") for key in changed)
    assert all(value.dtype == np.float16 for value in after.values())
    record = json.loads((tmp_path / "whole" / "erasing.json").read_text())
    assert record["method"] == "UCE" and record["concepts"] == ["three", "seven"]
    near = {(each["phrase"], each["concept"]) for each in record["not_retained"]}
    assert {("three", "three"), ("seven", "seven")} <= near
    assert not (tmp_path / "whole" / "training.jsonl").exists()

    assert main([*base, "--output", str(tmp_path / "unet"), "--export", "unet"]) == 0
    assert type(load_pytorch(tmp_path / "unet")).__name__ == "UNet2DConditionModel"
    for _ in range(2):  # replaced by its record alone
        changes = [*base, "--output", str(tmp_path / "changes"), "--export", "changes", "--force"]
        assert main(changes) == 0
    assert sorted(os.listdir(tmp_path / "changes")) == [
        "conceptax.json",
        "erasing.json",
        "unet_changes.safetensors",
    ]
    found = tensors_of(tmp_path / "changes")
    assert {key.split("/", 1)[1] for key in found} == {key.split("/", 1)[1] for key in changed}
    capsys.readouterr()
    refused(
        capsys,
        [*base, "--output", tmp_path / "x", "--export", "text-encoder"],
        "UCE edits the unet and leaves the text-encoder as it was",
    )
    refused(capsys, [*base, "--output", tmp_path / "x", "--mesh", "1", "1"], "is a closed form")


def test_esd_says_that_it_retains_nothing(model, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("four\nred\n")
    arguments = ["erase", "--model", model, "--method", "esd-x", "--concept", "three"]
    arguments += ["--retain", words, "--output", tmp_path / "out", "--similarity-cap", "1"]
    arguments += ["--cycles", "2", "--prompts", "2", "--ddim-steps", "2", "--learning-rate", "0.1"]
    assert main([str(argument) for argument in arguments]) == 0
    record = json.loads((tmp_path / "out" / "erasing.json").read_text())
    assert record["retained_phrases"] == "none: the method retains nothing"
    assert record["words_beside_the_concept"] == ["four", "red"]
    assert len((tmp_path / "out" / "training.jsonl").read_text().splitlines()) == 2
    before, after = tensors_of(model), tensors_of(tmp_path / "out")
    changed = {key for key, value in after.items() if not np.array_equal(value, before[key])}
    assert changed and all(".attn2." in key for key in changed)


def test_a_diverging_run_writes_nothing(model, tmp_path, capsys):
    arguments = ["erase", "--model", model, "--concept", "three", "--output", tmp_path / "out"]
    arguments += [*ERASE, "--learning-rate", "1e38", "--cycles", "4"]
    assert main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert "the loss is" in err and "training stopped" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == []


# ---- sample ----


def test_sample_draws_files_and_sheets(model, tmp_path, capsys):
    base = ["sample", "--model", str(model), "--steps", "2", "--batch-size", "2"]
    base += ["--prompt", "a red three", "--prompt", "a blue seven"]
    assert main([*base, "--output", str(tmp_path / "some")]) == 0
    names = sorted(os.listdir(tmp_path / "some"))
    assert names == [
        "0000_a-red-three.png",
        "0001_a-blue-seven.png",
        "conceptax.json",
        "sample.json",
    ]
    first = read_png(tmp_path / "some" / names[0])
    assert first.size == (64, 64) and json.loads(first.text["conceptax"])["steps"] == 2

    assert main([*base, "--output", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(read_png(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[4:68, 4:68], np.asarray(first))

    refused(capsys, [*base, "--output", tmp_path / "sheet.png"], "already exists")
    refused(capsys, [*base, "--output", tmp_path / "some"], "already exists")
    refused(capsys, [*base, "--output", tmp_path / "x.jpg"], "takes a .png file")
    refused(capsys, [*base, "--output", tmp_path / "x.png", "--height", "63"], "--height 63")
    refused(capsys, [*base, "--output", tmp_path / "x.png", "--count", "0"], "--count")
    refused(capsys, ["sample", "--output", tmp_path / "x.png"], "at least one --prompt")
    for options, message in (
        (["--height", "0"], "must be a positive multiple"),
        (["--height", "100000"], "must be a positive multiple of 8 pixels, at most 65536"),
        (["--height", "65536", "--width", "65536"], "smaller --count, --height or --width"),
        (["--count", "100000000000"], "keeping 200000000000 images takes at least"),
    ):
        refused(capsys, [*base, "--output", tmp_path / "x.png", *options], message)
    component = ["sample", "--model", model / "vae", "--prompt", "x", "--output", tmp_path / "x"]
    refused(capsys, component, "is no pipeline")
    assert sorted(os.listdir(tmp_path)) == ["sheet.png", "some"]


# ---- bad input ----


def weights(folder):
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def remove(folder):
    shutil.rmtree(folder)


def not_a_checkpoint(folder):
    remove(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing here")


def truncated(folder):
    os.truncate(weights(folder), weights(folder).stat().st_size // 2)


def corrupted_header(folder):
    data = bytearray(weights(folder).read_bytes())
    data[8:40] = b"\xff" * 32
    weights(folder).write_bytes(data)


def escaping_index(folder):
    file = weights(folder)
    keys = safetensors.numpy.load_file(file).keys()
    shutil.move(file, folder / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "../shard.safetensors")}
    Path(f"{file}.index.json").write_text(json.dumps(index))


def wrong_shape(folder):
    tensors = safetensors.numpy.load_file(weights(folder))
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2].copy()
    safetensors.numpy.save_file(tensors, weights(folder))


def missing_tensor(folder):
    tensors = safetensors.numpy.load_file(weights(folder))
    del tensors["conv_in.weight"]
    safetensors.numpy.save_file(tensors, weights(folder))


def unknown_architecture(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "HolographicUNet"]
    (folder / "model_index.json").write_text(json.dumps(index))


def unknown_pipeline(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "HolographicPipeline", "unet": ["diffusers", "HolographicModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def not_a_number(folder):
    file = weights(folder)
    tensors = safetensors.numpy.load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (remove, "does not exist"),
        (not_a_checkpoint, "is not a checkpoint"),
        (truncated, "safetensors"),
        (corrupted_header, "safetensors"),
        (escaping_index, "points outside its folder"),
        (wrong_shape, "conv_in.weight"),
        (missing_tensor, "conv_in.weight"),
        (unknown_architecture, "HolographicUNet"),
        (unknown_pipeline, "HolographicPipeline"),
        (not_a_number, "NaN or infinite"),
    ],
)
def test_bad_checkpoints_are_told_in_a_sentence(broken, capsys, damage, text):
    damage(broken)
    there = set(broken.parent.iterdir())
    out = broken.parent / "deeper" / "out"
    for arguments in (
        ["convert", broken, out],
        ["erase", "--model", broken, "--concept", "three", "--output", out],
        ["sample", "--model", broken, "--prompt", "three", "--output", out],
    ):
        refused(capsys, arguments, text)
        assert set(broken.parent.iterdir()) == there


def test_unwritable_outputs_are_refused_before_the_work(model, tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    below = occupied / "out"
    nowhere = tmp_path / "no model"
    for arguments in (
        ["convert", nowhere, below],
        ["erase", "--model", nowhere, "--concept", "three", "--output", below],
        ["sample", "--model", nowhere, "--prompt", "three", "--output", below],
        ["sample", "--model", nowhere, "--prompt", "three", "--output", below / "x.png"],
        ["demo", "--model", nowhere, "--output", below],
        ["glyphs", "train", "--workdir", nowhere, "--output", below],
    ):
        refused(capsys, arguments, "is not a folder, so")
    assert occupied.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_force_does_not_replace_what_is_no_result(model, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("dear")
    for arguments in (
        ["convert", model, tmp_path / "photos", "--force"],
        ["demo", "--output", tmp_path / "photos", "--force"],
        ["sample", "--prompt", "three", "--output", tmp_path / "photos", "--force"],
    ):
        refused(capsys, arguments, "does not look like an earlier result")
    assert (tmp_path / "photos" / "cat.png").read_text() == "dear"


def test_no_command_replaces_what_it_reads(model, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(model, work / "model")
    (work / "model" / "conceptax.json").write_text('{"files": []}')
    (work / "link").symlink_to(work / "model")
    before = set(work.rglob("*"))
    inner, prompts = work / "model" / "unet", work / "prompts.txt"
    prompts.write_text("three")
    monkeypatch.chdir(tmp_path)
    name = Path("work/../work/model")
    erase = ["erase", "--concept", "three", "--model"]
    for arguments in (
        ["convert", work / "model", work / "model"],
        ["convert", work / "link", name],
        ["convert", inner, work / "model"],
        ["convert", work / "model", inner / "deeper"],
        ["convert", inner / "diffusion_pytorch_model.safetensors", inner],
        ["convert", name, work / "model/x.safetensors", "--form", "single"],
        ["convert", model, work / "model", "--add", work / "model"],
        [*erase, work / "model", "--output", work / "link"],
        [*erase, model, "--output", work / "model", "--retain", inner / "config.json"],
        [*erase, model, "--output", inner, "--checkpoint-dir", inner],
        ["sample", "--prompts", prompts, "--output", work],
        ["evaluate", "--edited", work / "model", "--concept", "a", "--output", inner],
        [
            "personalize",
            "--images",
            work,
            "--token",
            "<n>",
            "--class-word",
            "a",
            "--class-count",
            "1",
            "--class-images",
            work,
            "--output",
            work,
        ],
    ):
        refused(capsys, [*arguments, "--force"], "what is read is never replaced")
    assert set(work.rglob("*")) == before | {prompts}


def test_a_full_disk_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    def full(file, mode="r", *arguments, **options):
        if "r" in mode:
            return open(file, mode, *arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    out = tmp_path / "deeper" / "out"
    monkeypatch.setattr("conceptax.converters.files.safetensors_file.open", full, raising=False)
    refused(capsys, ["convert", model, out], f"{out} could not be written: No space left on device")
    assert os.listdir(tmp_path) == []


# ---- demo and glyphs ----


def test_demo_counts_shows_and_leaves_an_erased_model(model, tmp_path, capsys):
    out = tmp_path / "demo"
    arguments = ["demo", "--model", str(model), "--output", str(out), "--images", "16", *ERASE]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "“three” drawn as it" in shown and "other digits right" in shown
    assert sorted(os.listdir(out)) == [
        "conceptax.json",
        "erased",
        "grid.png",
        "metrics.json",
        "report.html",
    ]
    own = json.loads((out / "erased/conceptax.json").read_text())
    assert own["written_by"] == "conceptax.converters.save_pytorch"
    assert "erasing.json" in own["files"]  # so that it may be replaced on its own

    record = json.loads((out / "metrics.json").read_text())
    for when in ("before", "after"):
        figures = record["figures"][when]
        assert figures["plain"]["of"] == figures["others"]["of"] == 16
        assert {"synonym 3", "synonym III", "synonym trio"} <= figures.keys()
        assert all(
            0 <= each["low"] <= each["rate"] <= each["high"] <= 1 for each in figures.values()
        )
    assert record["seconds"]["total"] > 0 and record["settings"]["cycles"] == 2

    grid = read_png(out / "grid.png")
    assert grid.width > 8 * 192 and grid.height > 5 * 192
    page = read_report(out, Images(tmp_path))
    assert page.kind == "demo" and len(page.items) == 3 * 16 + 20
    for name, group in (("plain", 0), ("synonyms", 1), ("others", 2)):
        own = [each for each in page.items if each.group == group]
        for when, shots in (
            ("before", [each.before for each in own]),
            ("after", [each.after[0] for each in own]),
        ):
            assert sum(shot.shown for shot in shots) == record["figures"][when][name]["count"]
            assert all(shot.word and 0 < shot.confidence <= 1 for shot in shots)
    assert page.runs[0].command == shlex.join(["conceptax", *arguments])
    assert len(page.runs[0].facts) == 5 and [len(each.items) for each in page.front] == [10, 10]
    assert type(load_pytorch(out / "erased")).__name__ == "StableDiffusionPipeline"
    assert os.listdir(tmp_path) == ["demo"]

    refused(capsys, arguments, "already exists and is not empty")


def test_a_built_model_is_written_measured_and_described(model, tmp_path):
    from conceptax.cli import glyphs
    from conceptax.flax_models.clip import CLIPModel
    from conceptax.methods.glyphs.judge import load_judge
    from conceptax.reporting.glyphs import quality_table

    config = recipe.clip_config(build_tokenizer())
    clip = random_model(CLIPModel, config, np.random.default_rng(0), jnp.float32)
    judge = load_judge(model / "judge")
    command = glyphs.Command(measure=16)
    quality = glyphs.publish(tmp_path, load_pytorch(model), clip, judge, command)

    assert list(quality["sets"]) == [
        "held-out wordings",
        "unseen combinations",
        "training wordings",
    ]
    assert all(found["digit"]["of"] == 16 for found in quality["sets"].values())
    card = (tmp_path / "README.md").read_text()
    assert quality_table(quality) in card and "| roman |" in card
    assert type(load_pytorch(tmp_path / "clip")).__name__ == "CLIPModel"
    assert tensors_of(tmp_path / "clip")["clip/logit_scale"].dtype == np.float16
    assert load_judge(tmp_path / "judge").measured == judge.measured
    assert json.loads((tmp_path / "quality.json").read_text())["quality"]["sets"].keys()
