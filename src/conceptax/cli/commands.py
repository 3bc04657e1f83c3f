"""The commands by name: what is known of them without importing one, and where each is.

A command's module holds a frozen dataclass `Command`, whose fields are the flags and whose
docstring is the help, and `run(command)`. A module of several commands has a dict `COMMANDS` of
such dataclasses by the command's second word instead; one whose flags depend on --method also has
`command_type(arguments)`, which picks the dataclass, and `types()`, those of all methods.
"""

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Declared(NamedTuple):
    """What is declared of a command.

    Attributes:
      what: it does, in a line of the overview.
      examples: a few command lines.
      main: the flags that most people use; its help lists them, and `--help-all` all.
      module: in `conceptax.cli`; by default its first word.
    """

    what: str
    examples: tuple[str, ...]
    main: tuple[str, ...] = ()
    module: str = ""


# Where a name begins another's, the longer one is meant.
COMMANDS = {
    "demo": Declared(
        "erase 'three' from the bundled model and show what changed",
        (
            "conceptax demo",
            "conceptax demo --images 16 --cycles 60 --output quick",
            "conceptax demo --seed 1 --force",
        ),
        ("--output", "--images", "--cycles", "--seed", "--model", "--steps", "--force"),
    ),
    "erase": Declared(
        "erase concepts from a Stable Diffusion model, by one of several methods",
        (
            "conceptax erase --concept three",
            'conceptax erase --model path/to/sd --concept "van gogh" --output erased',
            "conceptax erase --model org/name --concept nudity --method esd-u --dtype bfloat16",
        ),
        (
            *("--concept", "--model", "--output", "--method", "--retain", "--export"),
            *("--cycles", "--seed", "--dtype", "--force"),
        ),
    ),
    "evaluate": Declared(
        "say what an erasure did: is the concept gone, what else broke, who brings it back",
        (
            "conceptax evaluate --edited erased --concept three",
            'conceptax evaluate --original path/to/sd --edited erased --concept "van gogh" '
            "--classifier path/to/clip --neighbors painters.txt",
            "conceptax evaluate --settings evaluation/metrics.json --output again",
            "conceptax evaluate --suite unlearndiffatk/nudity --original path/to/sd "
            "--edited erased --prompts nudity.csv",
        ),
        (
            *("--original", "--edited", "--concept", "--output", "--classifier", "--images"),
            *("--attacks", "--neighbors", "--suite", "--seed", "--force"),
        ),
    ),
    "evaluate personalization": Declared(
        "say how well a personalized model draws its subject, and prompts",
        (
            "conceptax evaluate personalization --model mine --references photos "
            "--prompts prompts.txt --clip path/to/clip",
            "conceptax evaluate personalization --images drawn --references photos "
            "--dino path/to/dinov2",
            "conceptax evaluate personalization --model mine --references photos "
            "--prompts prompts.txt --clip path/to/clip --count 1 --steps 25",
        ),
        (
            *("--images", "--model", "--references", "--prompts", "--clip", "--dino"),
            *("--output", "--count", "--steps", "--force"),
        ),
        "evaluate_personalization",
    ),
    "report": Declared(
        "show the reports of several runs, such as of several methods, in one page",
        (
            "conceptax report with-sage with-uce",
            'conceptax report with-sage with-uce --output "two methods"',
            "conceptax report runs/seed-0 runs/seed-1 --output seeds --force",
        ),
        ("--output", "--force"),
    ),
    "personalize": Declared(
        "learn a subject from a few images, by one of several methods",
        (
            'conceptax personalize --images photos --token "<new1>" --class-word dog',
            'conceptax personalize --model path/to/sd --images photos --token "<new1>" '
            "--class-word dog --output mine",
            "conceptax personalize --concepts concepts.json --method custom-diffusion",
        ),
        (
            *("--images", "--token", "--class-word", "--model", "--output", "--method"),
            *("--class-images", "--steps", "--learning-rate", "--seed", "--force"),
        ),
    ),
    "segment run": Declared(
        "find the classes of any vocabulary in images",
        (
            "conceptax segment run",
            'conceptax segment run --model maftp_b.pth --vocabulary "cat; sofa" photos',
            "conceptax segment run --model maftp_pano.pth --form panoptic "
            '--vocabulary "dog; grass" --stuff grass dog.jpg',
        ),
        (
            *("--model", "--vocabulary", "--stuff", "--output", "--form", "--short-side"),
            *("--tokenizer", "--dtype", "--force"),
        ),
    ),
    "segment evaluate": Declared(
        "measure a segmentation model: mIoU, panoptic quality",
        (
            "conceptax segment evaluate --model trained --data val --vocabulary classes.txt",
            "conceptax segment evaluate --model maftp_pano.pth --form panoptic "
            "--data ade20k --layout ade20k-panoptic --vocabulary ade.txt",
            "conceptax segment evaluate --model trained --data val --vocabulary classes.txt "
            "--dtype bfloat16",
        ),
        (
            *("--model", "--data", "--layout", "--vocabulary", "--output", "--form"),
            *("--tokenizer", "--dtype", "--force"),
        ),
    ),
    "segment train": Declared(
        "train a segmentation model, MAFT+, on scenes of one's own",
        (
            "conceptax segment train --open-clip convnext_base.bin --data train "
            "--vocabulary classes.txt",
            "conceptax segment train --model maftp_b.pth --data train --vocabulary classes.txt "
            "--steps 2000",
            "conceptax segment train --open-clip convnext_base.bin --data train "
            "--vocabulary classes.txt --mesh 4 2",
        ),
        (
            *("--open-clip", "--model", "--data", "--layout", "--vocabulary", "--output"),
            *("--steps", "--batch-size", "--learning-rate", "--seed", "--force"),
        ),
    ),
    "segment coco-stuff": Declared(
        "number the classes of COCO-Stuff's label maps without gaps",
        ("conceptax segment coco-stuff stuff_thingmaps numbered",),
    ),
    "sample": Declared(
        "draw images from prompts, or videos",
        (
            'conceptax sample --prompt "a red three on brick"',
            'conceptax sample --model erased --prompt "a street by van gogh" --count 4 --seed 7',
            "conceptax sample --model path/to/sd --prompts prompts.txt --output drawn",
            'conceptax sample --model path/to/wan --prompt "a cat walks" --frames 61 '
            "--output clip.mp4",
        ),
        (
            *("--prompt", "--prompts", "--model", "--output", "--count", "--seed"),
            *("--steps", "--guidance", "--sampler", "--add", "--force"),
        ),
    ),
    "studio": Declared(
        "draw, erase and attack in a browser",
        (
            "conceptax studio",
            "conceptax studio --edited erased",
            "conceptax studio --model path/to/sd --edited erased --output results",
        ),
        ("--model", "--edited", "--output", "--host", "--port", "--dtype"),
    ),
    "convert": Declared(
        "load a checkpoint and write it again: other format, dtype, shards, checked",
        (
            "conceptax convert model.safetensors folder",
            "conceptax convert folder model.safetensors --form single --dtype float16",
            "conceptax convert path/to/sd with-style --add style-lora.safetensors",
        ),
        (
            *("--form", "--dtype", "--add", "--add-scale", "--original", "--rank"),
            *("--tokenizer", "--verify", "--force"),
        ),
    ),
    "inspect": Declared(
        "say what a checkpoint is, without loading it",
        (
            "conceptax inspect path/to/sd",
            "conceptax inspect model.ckpt",
            "conceptax inspect lora.safetensors --names 20",
        ),
        ("--names",),
    ),
    "glyphs train": Declared(
        "build the bundled model from scratch",
        (
            "conceptax glyphs train",
            "conceptax glyphs train --output glyphs --workdir glyphs-work",
            "conceptax demo --model glyphs",
        ),
        ("--output", "--workdir", "--measure", "--seed", "--force"),
    ),
    "glyphs segmenter": Declared(
        "build the bundled segmenter from scratch",
        (
            "conceptax glyphs segmenter",
            "conceptax glyphs segmenter --output segmenter --workdir segmenter-work",
            "conceptax segment run --model segmenter",
        ),
        ("--output", "--workdir", "--seed", "--force"),
    ),
    "gna simulate": Declared(
        "predict what a neighborhood attention saves, without a GPU",
        (
            "conceptax gna simulate --model flux-4k --gpu b200",
            "conceptax gna simulate --layout 30 48 80 --window 18 24 24 --stride 16 8 8",
            "conceptax gna simulate --layout 128 128 --window 33 33 --gpu b200",
        ),
        (
            *("--model", "--attention", "--layout", "--window", "--stride", "--gpu"),
            *("--dense-steps", "--heads", "--head-dim", "--output", "--force"),
        ),
    ),
    "gna search": Declared(
        "find the windows and strides that save most, and draw them",
        (
            "conceptax gna search --layout 64 64 --sparsity 0.9",
            "conceptax gna search --layout 30 48 80 --sparsity 0.91 --output found",
            "conceptax gna search --layout 64 64 --window 17 17",
        ),
        ("--layout", "--window", "--sparsity", "--gpu", "--limit", "--output", "--force"),
    ),
    "gna explore": Declared(
        "write a page to try layouts, windows, strides and GPUs in a browser",
        (
            "conceptax gna explore",
            "conceptax gna explore --output attention.html",
            "conceptax gna explore --force",
        ),
        ("--output", "--force"),
    ),
    "gna bench": Declared(
        "measure a neighborhood attention here, beside what is predicted",
        (
            "conceptax gna bench --layout 64 64 --window 17 17",
            "conceptax gna bench --layout 64 64 --window 17 17 --stride 8 8 --training",
            "conceptax gna bench --layout 64 64 --window 17 17 --implementation xla",
        ),
        ("--layout", "--window", "--stride", "--heads", "--head-dim", "--output", "--force"),
    ),
    "completion": Declared(
        "print a script that completes all this in a shell: bash, zsh or fish",
        (
            "conceptax completion bash > ~/.local/share/bash-completion/completions/conceptax",
            "conceptax completion zsh > ~/.conceptax.zsh  # then: source ~/.conceptax.zsh",
            "conceptax completion fish > ~/.config/fish/completions/conceptax.fish",
        ),
    ),
    "doctor": Declared(
        "say what is installed, and which kernel runs here and why", ("conceptax doctor",)
    ),
}


def named(arguments: Sequence[str]) -> str | None:
    """The command that arguments begin with, if they do."""
    names = (" ".join(arguments[:words]) for words in (2, 1))
    return next((name for name in names if name in COMMANDS), None)


def module_name(name: str) -> str:
    """The module of a command, below `conceptax.cli`."""
    return COMMANDS[name].module or name.split()[0]


def load(name: str, arguments: Sequence[str]) -> tuple[Any, Any]:
    """Import a command's module; give it, and the dataclass of the command with these arguments."""
    module: Any = importlib.import_module(f"conceptax.cli.{module_name(name)}")
    if hasattr(module, "COMMANDS"):
        return module, module.COMMANDS[name.split()[1]]
    choose = getattr(module, "command_type", None)
    return module, choose(arguments) if choose else module.Command


def meant(word: str, known: Iterable[str]) -> str:
    """What a misspelled word was meant to be, to go on in a sentence; "" where nothing is near."""
    import difflib

    near = difflib.get_close_matches(word, sorted(known), n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
