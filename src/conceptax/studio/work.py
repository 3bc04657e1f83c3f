"""What a studio does: draw beside each other, bring a concept back, erase one, attend to less.

Each function takes a studio, the job that it tells how far it is, and what to do; it returns the
sentence that the job ends with. Pictures go to the job as they come about.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from conceptax.converters import atomic_folder
from conceptax.flax_models.pipelines.pipeline import Pipeline
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.kernels.gna.presets import attention_preset
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.erasing import method_of
from conceptax.methods.evaluation.suites import HELD_OUT_TEMPLATES
from conceptax.methods.glyphs.evaluation import GlyphsClassifier, glyphs_suites
from conceptax.methods.memory import require_images
from conceptax.methods.red_team import Target, attack_of
from conceptax.methods.seeds import check_seed
from conceptax.methods.text.phrases import ConceptError
from conceptax.reporting.erasing import erase_recorded, write_erased
from conceptax.reporting.runs import Kept
from conceptax.studio.jobs import Job, Picture, Row
from conceptax.studio.models import Studio

Images = UInt8[np.ndarray, "N H W 3"]

_BRIGHTER = 4  # how much a difference is enlarged to be seen
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How images are drawn, in every job.

    Attributes:
      seed: of the noise, and of everything random in a job.
      steps: of denoising.
      guidance: strength of the prompt.
      count: images of a prompt.
      height, width: in pixels; None is the model's own.
    """

    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    count: int = 1
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("steps", "count"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, received {value}.")
        require_images(self.count, "draw fewer at a time")


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a job: what it is called, and where on the job's way it begins and ends."""

    job: Job
    said: str
    begin: float = 0.0
    end: float = 1.0

    def step(self, stage: str, done: int, total: int) -> None:
        """Told of a sample's step, as `TextToImage` tells of it."""
        share = 1.0 if stage == "decoding" else done / total
        said = "decoding" if stage == "decoding" else f"step {done} of {total}"
        if share == 0:
            said = f"{said} (new settings are compiled first)"
        self.job.tell(f"{self.said}: {said}", self.begin + share * (self.end - self.begin))

    def part(self, said: str, begin: float, end: float) -> "Part":
        """A part of this one, between two shares of its way."""
        length = self.end - self.begin
        return Part(self.job, said, self.begin + begin * length, self.begin + end * length)


def drawn(
    part: Part,
    pipeline: Pipeline,
    prompts: Sequence[str] | np.ndarray,
    drawing: Drawing,
    *,
    on_step: Callable[[str, int, int], None] | None = None,
    **attention: Any,
) -> Images:
    """One image per prompt, image n from the seed and n, told step by step.

    `on_step` is told besides; `attention` is for `TextToImage.from_pipeline`.
    """

    def step(*told: Any) -> None:
        part.step(*told)
        if on_step is not None:
            on_step(*told)

    return TextToImage.from_pipeline(pipeline, **attention)(
        prompts,
        seed=drawing.seed,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        height=drawing.height,
        width=drawing.width,
        on_step=step,
    )


# ---- two models beside each other ----


def draw(studio: Studio, job: Job, prompt: str, edited: str | None, drawing: Drawing) -> str:
    """Both models' images of a prompt from the same noise; the original's alone without another.

    Raises:
      ConceptError: no prompt, or no such model.
    """
    prompt = _some(prompt, "There is nothing to draw: write a prompt.")
    models = {"original": studio.original} | ({edited: studio.model(edited)} if edited else {})
    rows = [Row(_numbered("noise", n, drawing), ()) for n in range(drawing.count)]
    for number, (name, pipeline) in enumerate(models.items()):
        part = Part(job, name, number / len(models), (number + 1) / len(models))
        images = drawn(part, pipeline, [prompt] * drawing.count, drawing)
        rows = _beside(rows, name, images)
        job.tell(f"{name}: drawn", rows=rows)
    return f"“{prompt}”, seed {drawing.seed}, {drawing.steps} steps, guidance {drawing.guidance:g}."


# ---- bringing a concept back ----


def asking(studio: Studio, concept: str, count: int = 4) -> list[str]:
    """Prompts that ask for a concept in wordings that erasing has not seen."""
    if isinstance(studio.classifier, GlyphsClassifier):
        with contextlib.suppress(ValueError):  # it is none of that world
            plain = glyphs_suites([concept], count, 0).plain[concept]
            return [each.text for each in plain]
    return [each.format(concept) for each in HELD_OUT_TEMPLATES[:count]]


def bring_back(
    studio: Studio,
    job: Job,
    concept: str,
    edited: str | None,
    config: Any,
    drawing: Drawing,
    *,
    prompts: Sequence[str] = (),
    examples: int = 8,
    looks: int = 4,
) -> str:
    """Attack an edited model, and see on the way what the attack makes it draw.

    Args:
      studio, job: as everywhere here.
      concept: what was erased.
      edited: which model is attacked.
      config: settings of an attack; their snapshots are replaced by `looks`.
      drawing: of all images; `count` prompts are looked at.
      prompts: that name the concept.
      examples: images of the concept, drawn by the original, that the attack learns from.
      looks: how often to look, at even distances.

    Raises:
      ConceptError: no concept or edited model, or what the attack says of prompts.
    """
    concept = _some(concept, "There is nothing to bring back: name the concept that was erased.")
    if not edited:
        raise ConceptError(
            "there is no edited model to attack: give one with --edited, or erase a concept first."
        )
    attack, purpose = attack_of(config), "an attack"
    original = studio.stable_diffusion(None, purpose)
    attacked = studio.stable_diffusion(edited, purpose)
    texts = list(prompts) or asking(studio, concept)
    every = max(1, config.steps // max(1, looks))
    config = dataclasses.replace(config, snapshots=tuple(range(every, config.steps, every)))

    asked = [texts[n % len(texts)] for n in range(max(examples, drawing.count))]
    part = Part(job, "the original draws what the attack learns from", 0.0, 0.15)
    images = drawn(part, original, asked, drawing)
    shown = asked[: drawing.count]
    rows = [Row(f"“{prompt}”", ()) for prompt in shown]
    rows = _beside(rows, "original", images[: len(shown)])
    job.tell("the edited model is asked by name", rows=rows)
    by_name = drawn(Part(job, "the edited model, by name", 0.15, 0.2), attacked, shown, drawing)
    rows = _beside(rows, f"{edited}, by name", by_name)
    job.tell(f"{attack.title}: step 0 of {config.steps} (compiling)", 0.2, rows)

    def on_step(step: int, _: Any, metrics: Mapping[str, float]) -> None:
        loss = f", loss {metrics['loss']:.4g}" if metrics else ""
        job.tell(
            f"{attack.title}: step {step} of {config.steps}{loss}",
            0.2 + 0.8 * step / config.steps,
        )

    target = Target(original, attacked, concept, images, asked)
    options = {"seed": drawing.seed, "progress": False, "on_step": on_step}
    found, budget = by_name, {}
    for attempt in attack.attempts(target, config, **options):
        step = int(attempt.budget["steps"])
        share = 0.2 + 0.8 * step / config.steps
        look = Part(job, f"a look after step {step}", share, share)
        budget = {name: value for name, value in attempt.budget.items() if name != "steps"}
        prompts_now = attempt.prompts[: len(shown)]
        found = drawn(look, attempt.pipeline, prompts_now, drawing)
        rows = _beside(rows, f"step {step}", found)
        job.tell(f"{attack.title}: after step {step} of {config.steps}", share, rows)
    numbers = "".join(f", {name} {value:.3g}" for name, value in budget.items())
    verdict = _verdict(studio, concept, by_name, found)
    return f"{attack.title}, {config.steps} steps{numbers}.{verdict or ' See for yourself.'}"


def _verdict(
    studio: Studio,
    concept: str,
    before: UInt8[np.ndarray, "N H W 3"],
    after: UInt8[np.ndarray, "M H W 3"],
) -> str:
    """What a judge sees, in a sentence; nothing without one."""
    first, then = studio.shows(before, concept), studio.shows(after, concept)
    if first is None or then is None:
        return ""
    return (
        f" The judge sees “{concept}” in {int(then.sum())} of {len(then)} images; when the edited "
        f"model was asked by name, in {int(first.sum())}."
    )


# ---- erasing ----


def erase(
    studio: Studio,
    job: Job,
    concepts: Sequence[str],
    config: Any,
    drawing: Drawing,
    *,
    start: str | None = None,
    retain: Sequence[str] = (),
    watched: Sequence[str] = (),
    looks: int = 4,
) -> str:
    """Erase concepts, look at prompts on the way, and keep the result among the edited models.

    Args:
      studio, job: as everywhere here.
      concepts: what to erase.
      config: settings of a method.
      drawing: of the images that are looked at.
      start: the edited model to begin with; None is the original.
      retain: phrases to preserve; none takes the tokenizer's own words.
      watched: prompts to look at; none takes one of each concept.
      looks: how often to look while a method trains.

    Raises:
      ConceptError: no concept, or what the method says of them.
    """
    concepts = list(dict.fromkeys(each.strip() for each in concepts if each.strip()))
    if not concepts:
        raise ConceptError("There is nothing to erase: name a concept, for example 'three'.")
    pipeline = studio.stable_diffusion(start, "erasing")
    method = method_of(config)
    watched = list(watched) or [asking(studio, each)[0] for each in concepts]
    rows = [Row(f"“{prompt}”", ()) for prompt in watched]

    def look(part: Part, now: StableDiffusionPipeline, when: str) -> None:
        nonlocal rows
        rows = _beside(rows, when, drawn(part, now, watched, drawing))
        job.tell(f"{part.said}: drawn", part.end, rows)

    look(Part(job, "before", 0.0, 0.1), pipeline, "before")
    cycles = config.cycles if method.trains else 0
    every = max(1, cycles // max(1, looks))
    compiling = " (preparing and compiling)" if cycles else ""
    job.tell(f"{method.title} erases {' and '.join(map(repr, concepts))}{compiling}", 0.1)

    def on_step(cycle: int, now: Any, metrics: Mapping[str, float]) -> None:
        loss = f", loss {metrics['loss']:.4g}" if metrics else ""
        share = 0.1 + 0.8 * cycle / cycles
        job.tell(f"{method.title}: cycle {cycle} of {cycles}{loss}", share)
        if cycle % every == 0 and cycle < cycles:
            look(Part(job, f"a look after cycle {cycle}", share, share), now(), f"cycle {cycle}")

    erased = erase_recorded(
        pipeline,
        concepts,
        config,
        seed=drawing.seed,
        source=start or studio.source,
        retain=list(retain) or None,
        dtype=studio.dtype,
        kept=Kept(options={"progress": False, "on_step": on_step}),
    )
    look(Part(job, "after", 0.9, 1.0), erased.pipeline, "after")
    seconds = erased.run.record["seconds"]
    name = studio.keep(erased, pipeline, f"{', '.join(concepts)} erased by {method.title}")
    near = erased.retained.near
    told = f" Not retained, as too near to it: {', '.join(e.phrase for e in near)}." if near else ""
    return f"“{name}” is among the edited models now, after {seconds:.0f} s.{told}"


def save(studio: Studio, job: Job, name: str | None, folder: str) -> str:
    """Write a model that was erased here into a new folder below the studio's.

    Raises:
      ConceptError: it was not made here, or there is no place for it.
      OutputError: the folder is there already, or cannot be written.
    """
    if studio.output is None:
        raise ConceptError("nothing is written here: start the studio with --output FOLDER.")
    if not name or name not in studio.made:
        raise ConceptError("choose an edited model that was erased here; others are on disk.")
    if not _FOLDER.fullmatch(folder.strip()):
        raise ConceptError(
            "a folder's name begins with a letter or digit, and has letters, digits, spaces, dots, "
            f"hyphens and underscores, 80 at most; received {folder!r}."
        )
    erased, original = studio.made[name]
    place = studio.output / folder.strip()
    job.tell(f"writing {place}", 0.1)
    with atomic_folder(place, by="conceptax studio") as work:
        write_erased(work, original, erased)
    return f"{place} holds “{name}”, as conceptax erase writes it."


# ---- attending to less ----


def attend(
    studio: Studio,
    job: Job,
    prompt: str,
    attention: str,
    drawing: Drawing,
    *,
    dense_steps: int | None = None,
) -> str:
    """The original's image with dense and with neighborhood attention, their times and difference.

    Times are of a step, the median without the first of a kind, which compiles.

    Args:
      studio, job, drawing: as everywhere here.
      prompt: what to draw.
      attention: a preset, or a setting such as "window=32x32 stride=8x8".
      dense_steps: steps before, which stay dense; by default the preset's share.

    Raises:
      ValueError: a model that has no such attention, or a window that does not fit.
    """
    prompt = _some(prompt, "There is nothing to draw: write a prompt.")
    if excuse := studio.attention_excuse():
        raise ConceptError(excuse)
    preset = attention_preset(attention.strip())
    if dense_steps is None:
        dense_steps = preset.dense_steps_of(drawing.steps)
    if not 0 <= dense_steps < drawing.steps:
        raise ValueError(
            f"dense steps are from 0 to one less than the {drawing.steps} steps, received "
            f"{dense_steps}."
        )
    shape = studio.original.latent_shape_for(drawing.height, drawing.width)
    preset.require_fit(studio.original.token_layout(shape))
    rows = [Row(_numbered("noise", n, drawing), ()) for n in range(drawing.count)]
    settings = {"dense": {}, str(preset): {"attention": preset, "dense_steps": dense_steps}}
    images, seconds = [], []
    for number, (name, chosen) in enumerate(settings.items()):
        times: list[float] = []
        images.append(
            drawn(
                Part(job, name, number / 2, (number + 1) / 2),
                studio.original,
                [prompt] * drawing.count,
                drawing,
                on_step=lambda stage, *_, times=times: (
                    times.append(time.perf_counter()) if stage == "sampling" else None
                ),
                **chosen,
            )
        )
        seconds.append(_step_seconds(times[chosen.get("dense_steps", 0) :]))
        rows = _beside(rows, name, images[-1])
        job.tell(f"{name}: drawn", rows=rows)
    distance = np.abs(images[0].astype(np.int16) - images[1])
    brighter = np.minimum(_BRIGHTER * distance, 255).astype(np.uint8)
    rows = _beside(rows, f"difference, {_BRIGHTER} times as bright", brighter)
    job.tell("compared", rows=rows)
    told = f"Pixels differ by {distance.mean():.1f} of 255 on average"
    if None in seconds:
        return f"{told}; take two steps or more of each kind for times."
    dense, sparse = seconds
    return (
        f"A dense step took {dense:.3g} s, one with {preset} {sparse:.3g} s: "
        f"{dense / sparse:.2f} times as fast, after {dense_steps} dense ones. {told}."
    )


def _step_seconds(times: Sequence[float]) -> float | None:
    """The median time of a step, but for the first; None where too few were taken."""
    steps = np.diff(times)[1:]
    return float(np.median(steps)) if len(steps) else None


# ---- pictures ----


def _beside(rows: Sequence[Row], caption: str, images: Images) -> list[Row]:
    """The rows with one more picture each."""
    return [
        dataclasses.replace(row, pictures=(*row.pictures, Picture(caption, image)))
        for row, image in zip(rows, images, strict=True)
    ]


def _numbered(what: str, number: int, drawing: Drawing) -> str:
    return f"{what} {number + 1}" if drawing.count > 1 else ""


def _some(text: str, otherwise: str) -> str:
    if not text.strip():
        raise ConceptError(otherwise)
    return text.strip()
