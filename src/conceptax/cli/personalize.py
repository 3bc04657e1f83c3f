"""`conceptax personalize`: teach a pipeline a subject from a few images."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

import conceptax
from conceptax.cli.confirm import announcing, counting
from conceptax.cli.options import (
    CheckpointDir,
    Mesh,
    Model,
    OptionalInt,
    OptionalPath,
    chosen,
    computed_in,
)
from conceptax.cli.runs import kept_run, new_folder, teller
from conceptax.cli.streams import print_stage
from conceptax.converters.files.output import CHECKPOINT_FILES
from conceptax.converters.formats.personalized import embedding_file
from conceptax.methods.memory import require_images
from conceptax.methods.personalization import METHODS
from conceptax.methods.personalization.class_diffusion import check_concepts
from conceptax.methods.personalization.class_images import CLASS_IMAGES, lacking_class_images
from conceptax.methods.subjects.images import (
    Concept,
    named_folders,
    read_class_folders,
    read_concepts,
    read_images,
)
from conceptax.reporting.models import Recompute, load_pipeline
from conceptax.reporting.personalizing import (
    RECORD,
    Export,
    class_image_folder,
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
      class_images: folder of images of other members of the class, for prior preservation; by
        default they are drawn with the model where --prior-weight is not 0, and kept beside the
        output, in OUTPUT.class_images, for the next run.
      class_count: class images that each subject needs; those that its folder lacks are drawn with
        the model, and kept in it. By default the folder's own do, and 200 where none is named.
      concepts: JSON list of several subjects.
      initializer: the word that a token starts from, one per concept.
      output: the folder to write.
      method: how.
      model: a folder of Stable Diffusion 1, 2 or XL.
      export: the pipeline and the small files, or the small files alone (weights).
      seed: of everything random in the run.
      checkpoint_every: save after every n-th step, and when interrupted; 0 keeps none.
      dtype: computation dtype; parameters keep the dtype they are stored in. auto takes the one
        that is fastest here, and says which.
      remat: recompute activations in the backward pass, which takes a third longer and far less
        memory; auto does so where the UNet has more than 100 million parameters.
      force: replace an earlier result at the output.
      settings: of the method.
    """

    images: OptionalPath = None
    token: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    class_word: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    class_images: OptionalPath = None
    class_count: OptionalInt = None
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
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    remat: Recompute = "auto"
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
        print_stage(f"loading {command.model or 'the bundled model'}")
        dtype = computed_in(command.dtype)
        pipeline = load_pipeline(source, dtype, "personalizing", remat=command.remat)
        if folders:
            _complete(pipeline, folders, command.class_count or 0, command.seed)
            subjects = _subjects(command)
        subjects = _with_class_images(command, pipeline, subjects)
        began = time.perf_counter()
        personalize_into(
            folder,
            pipeline,
            subjects,
            command.settings,
            seed=command.seed,
            source=str(command.model or "bundled"),
            export=command.export,
            dtype=dtype,
            kept=kept,
        )
    names = ", ".join(f"{subject.token} {subject.word}" for subject in subjects)
    seconds = time.perf_counter() - began
    print(f"{command.output}: learnt {names} with {method.title} in {seconds:.0f} s")
    if command.export == "pipeline":
        prompt = shlex.quote(f"a photo of a {subjects[0].token} {subjects[0].word}")
        print(f"next: conceptax sample --model {command.output} --prompt {prompt}")


def _class_folders(command: Command[Any]) -> list[tuple[Path, str]]:
    """Folders of class images that are named and to be completed, and what to draw into them.

    Raises:
      ValueError: images are to be drawn, and nothing takes them.
    """
    if not command.class_count:
        return []
    if command.class_count < 0:
        raise ValueError(f"--class-count must not be negative, received {command.class_count}.")
    require_images(command.class_count, "take a smaller --class-count")
    if command.concepts is not None:
        folders = read_class_folders(command.concepts)
    elif command.class_images is not None and len(command.class_word) == 1:
        folders = [(command.class_images, command.class_word[0])]
    else:
        folders = []
    if not folders and not command.settings.prior_weight:
        raise ValueError(
            "--class-count draws class images, which nothing takes without prior preservation "
            "(--prior-weight, --method custom-diffusion, --method dreambooth): leave it out, or "
            "name a folder to draw them into with --class-images (and the class with "
            "--class-word), or in the file of --concepts, as class_data_dir."
        )
    return folders


def _with_class_images(command: Command[Any], pipeline: Any, subjects: list[Concept]) -> Any:
    """The subjects; those that need class images and name none have them drawn, or kept ones.

    Raises:
      ValueError: they need some, and --class-count is 0.
    """
    count = CLASS_IMAGES if command.class_count is None else command.class_count
    lacking = lacking_class_images(subjects, command.settings)
    if not lacking:
        return subjects
    if not count:
        raise ValueError(
            f"prior preservation (--prior-weight {command.settings.prior_weight}) needs images of "
            f"the class of {', '.join(each.token for each in lacking)}: name a folder with "
            "--class-images, leave out --class-count 0, or set --prior-weight 0."
        )
    check_concepts(pipeline, subjects, command.settings)
    source, seed = str(command.model or "bundled"), command.seed
    completed = []
    for subject in subjects:
        if any(subject is each for each in lacking):
            prompt = subject.class_prompt or subject.word
            folder = class_image_folder(command.output, source, prompt, seed)
            if not _complete(pipeline, [(folder, prompt)], count, seed):
                teller()(f"taking {count} class images of {prompt!r} from {folder}")
            images = read_images(folder)[:count]
            subject = dataclasses.replace(subject, class_images=images)
        completed.append(subject)
    return completed


def _complete(pipeline: Any, folders: Sequence[tuple[Path, str]], count: int, seed: int) -> int:
    """Complete folders of class images, and tell of it; how many were drawn."""
    return complete_class_images(
        pipeline,
        folders,
        count,
        seed,
        report=teller(),
        on_estimate=announcing("drawing them"),
        on_progress=counting("class images"),
    )


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
