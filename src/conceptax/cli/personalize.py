"""`conceptax personalize`: teach a pipeline a subject from a few images."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

import conceptax
from conceptax.cli.options import CheckpointDir, Mesh, Model, OptionalPath, chosen
from conceptax.cli.runs import kept_run, new_folder, teller
from conceptax.converters.files.output import CHECKPOINT_FILES
from conceptax.converters.formats.personalized import embedding_file
from conceptax.methods.memory import require_images
from conceptax.methods.personalization import METHODS
from conceptax.methods.subjects.images import (
    Concept,
    named_folders,
    read_class_folders,
    read_concepts,
    read_images,
)
from conceptax.reporting.models import load_pipeline
from conceptax.reporting.personalizing import (
    RECORD,
    Export,
    complete_class_images,
    personalize_into,
)

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """Teach a text-to-image model a subject from a few images.

    One subject: `--images DIR --token "<new1>" --class-word dog`. Several: `--concepts FILE`, a
    JSON list of objects with instance_prompt, class_prompt, instance_data_dir and, for prior
    preservation, class_data_dir. What follows --force are the settings of the chosen method:
    `--method NAME --help` lists those of another.

    Writes a folder: the pipeline, whose tokenizer knows the new tokens; each token's embedding
    (<new1>.safetensors, for load_textual_inversion; not of SDXL); where the cross-attention was
    trained, pytorch_custom_diffusion_weights.bin (needs torch); personalizing.json, which records
    settings, seed, versions and the last losses; and training.jsonl.

    Attributes:
      images: folder of images of one subject.
      token: the subject's new token; with --concepts one each, in place of those in the prompts.
      class_word: the word of its class; with --concepts one each, in place of the class prompts.
      class_images: folder of images of other members of the class, for prior preservation.
      class_count: class images that each subject needs; those that its folder lacks are drawn with
        the model, and kept in it. By default the folder's own do.
      concepts: JSON list of several subjects.
      initializer: the word that a token starts from, one per concept.
      output: the folder to write.
      method: how.
      model: a folder of Stable Diffusion 1, 2 or XL.
      export: the pipeline and the small files, or the small files alone (weights).
      seed: of everything random in the run.
      checkpoint_every: save after every n-th step, and when interrupted; 0 keeps none.
      dtype: computation dtype; parameters keep the dtype they are stored in.
      force: replace an earlier result at the output.
      settings: of the method.
    """

    images: OptionalPath = None
    token: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    class_word: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    class_images: OptionalPath = None
    class_count: int = 0
    concepts: OptionalPath = None
    initializer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    output: Path = Path("personalized")
    method: Literal["class-diffusion", "custom-diffusion", "dreambooth", "textual-inversion"] = (
        "class-diffusion"
    )
    model: Model = None
    export: Export = "pipeline"
    seed: int = 0
    checkpoint_dir: CheckpointDir = None
    checkpoint_every: int = 100
    mesh: Mesh = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    settings: Annotated[Config, tyro.conf.arg(name="")]


def types() -> dict[str, Any]:
    """The command with the settings of each method."""
    return {name: Command[method.config] for name, method in METHODS.items()}


def command_type(arguments: Sequence[str]) -> Any:
    """That of the method which the arguments name; ClassDiffusion without one."""
    name, known = chosen(arguments, "--method", "class-diffusion"), types()
    return known.get(name, known["class-diffusion"])  # the parser tells an unknown name


def run(command: Command[Any]) -> None:
    """Load, learn, save; the output is claimed first."""
    folders = _class_folders(command)
    subjects = [] if folders else _subjects(command)
    for token in (*command.token, *(subject.token for subject in subjects)):
        embedding_file(token)  # a token that cannot be a file's name is told now
    method = METHODS[command.method]
    markers = (*CHECKPOINT_FILES, RECORD)
    named = [] if command.concepts is None else named_folders(command.concepts)
    with (
        kept_run(command, command.settings.steps) as kept,
        new_folder(command, markers=markers, sources=named) as folder,
    ):
        source = command.model or conceptax.bundled_model()
        teller()(f"loading {command.model or 'the bundled model'}")
        pipeline = load_pipeline(source, command.dtype, "personalizing")
        if folders:
            complete_class_images(pipeline, folders, command.class_count, command.seed)
            subjects = _subjects(command)
        began = time.perf_counter()
        personalize_into(
            folder,
            pipeline,
            subjects,
            command.settings,
            seed=command.seed,
            source=str(command.model or "bundled"),
            export=command.export,
            dtype=command.dtype,
            kept=kept,
        )
    names = ", ".join(f"{subject.token} {subject.word}" for subject in subjects)
    seconds = time.perf_counter() - began
    print(f"{command.output}: learnt {names} with {method.title} in {seconds:.0f} s")
    if command.export == "pipeline":
        prompt = shlex.quote(f"a photo of a {subjects[0].token} {subjects[0].word}")
        print(f"next: conceptax sample --model {command.output} --prompt {prompt}")


def _class_folders(command: Command[Any]) -> list[tuple[Path, str]]:
    """Folders of class images that are to be completed, and what to draw into them.

    Raises:
      ValueError: images are to be drawn, and it is not said where to keep them.
    """
    if command.class_count < 0:
        raise ValueError(f"--class-count must not be negative, received {command.class_count}.")
    if not command.class_count:
        return []
    require_images(command.class_count, "take a smaller --class-count")
    if command.concepts is not None:
        folders = read_class_folders(command.concepts)
    elif command.class_images is not None and len(command.class_word) == 1:
        folders = [(command.class_images, command.class_word[0])]
    else:
        folders = []
    if not folders:
        raise ValueError(
            "--class-count draws class images into a folder: name it with --class-images (and the "
            "class with --class-word), or in the file of --concepts, as class_data_dir."
        )
    return folders


def _subjects(command: Command[Any]) -> list[Concept]:
    """The concepts that the arguments describe.

    Raises:
      ValueError: both ways or neither were used, or something is missing.
    """
    if (command.concepts is None) == (command.images is None):
        raise ValueError(
            "pass either --images DIR, --token and --class-word for one subject, or --concepts "
            "FILE for several."
        )
    if command.concepts is not None:
        if command.class_images is not None:
            raise ValueError("with --concepts, class images are named in the file: class_data_dir.")
        return read_concepts(
            command.concepts,
            tokens=command.token,
            words=command.class_word,
            initializers=command.initializer,
        )
    given = {"--token": command.token, "--class-word": command.class_word}
    for option, values in given.items():
        if len(values) != 1:
            raise ValueError(f"--images takes one {option}, received {len(values)}.")
    if len(command.initializer) > 1:
        raise ValueError(f"--images takes one --initializer, received {len(command.initializer)}.")
    assert command.images is not None
    return [
        Concept(
            token=command.token[0],
            word=command.class_word[0],
            images=read_images(command.images),
            class_images=read_images(command.class_images) if command.class_images else (),
            initializer="".join(command.initializer),
        )
    ]
