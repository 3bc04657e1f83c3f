"""`conceptax demo`: erase 'three' from the bundled model and show what changed."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

import conceptax
from conceptax.cli.options import Model, typed
from conceptax.cli.runs import new_folder, teller
from conceptax.converters import load_pytorch
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.estimate import about
from conceptax.methods.glyphs.judge import load_judge
from conceptax.methods.glyphs.quality import erasure_figures, erasure_prompts, examine_all
from conceptax.methods.memory import require_images
from conceptax.reporting.demo import ASKED, CONCEPT, KEPT, Look, demo_grid, demo_page, demo_table
from conceptax.reporting.erasing import erase_into, erasing_record, near_tables
from conceptax.reporting.gallery import Images, write_report
from conceptax.reporting.pictures import save_png
from conceptax.reporting.results import METRICS, environment
from conceptax.reporting.runs import Kept
from conceptax.text import write_json

_PER_PROMPT = 2  # images of each prompt in the grid


@dataclasses.dataclass(frozen=True)
class Command:
    """Erase 'three' from the bundled model with SAGE, and count what the model draws then.

    The bundled model draws handwritten digits on textures. Erasing is told one word; a classifier
    trained on other handwriting then counts threes asked for by that word, threes asked for by
    names it was never told (3, III, trio), and everything that should have stayed.

    Writes grid.png, metrics.json, report.html with every image that was counted, and erased/, the
    edited model as a folder that diffusers loads.

    Attributes:
      output: the folder to write.
      images: images per figure, before and after each.
      steps: denoising steps per image; half of what `conceptax sample` takes, to save time.
      guidance: strength of the prompt; `conceptax sample` takes 7.5.
      seed: of erasing, prompts and noise.
      model: a model built by `conceptax glyphs train`.
      force: replace an earlier demo.
      sage: settings of the method.
    """

    output: Path = Path("demo-output")
    images: int = 48
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    model: Model = None
    force: bool = False
    sage: Annotated[SageConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SageConfig
    )


def run(command: Command) -> None:
    """Draw, erase, draw again with the same seeds, count, and write it all down."""
    if command.images < 1:
        raise ValueError(f"--images must be at least 1, received {command.images}.")
    require_images(6 * command.images, "take fewer --images")
    tell, seconds, model = teller(), dict[str, float](), str(command.model or "bundled")

    @contextlib.contextmanager
    def stage(name: str, text: str) -> Iterator[None]:
        tell(text)
        began = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - began, 1)

    with new_folder(command, markers=[METRICS]) as folder:
        source = command.model or conceptax.bundled_model()
        pipeline = load_pytorch(source)
        judge = load_judge(source / "judge")
        original = TextToImage.from_pipeline(pipeline)
        look = functools.partial(
            _look, command, judge, erasure_prompts(CONCEPT, command.images, command.seed)
        )
        count = 3 * command.images
        with stage("before", f"drawing {count} images with the original model"):
            before = look(original)

        def told(compiling: float, running: float) -> None:
            tell(f"{about(compiling + running + seconds['before'])} left in all")

        with stage("erase", f"erasing {CONCEPT!r} from the text encoder"):
            (erased := folder / "erased").mkdir()
            edited = erase_into(
                erased,
                pipeline,
                [CONCEPT],
                command.sage,
                seed=command.seed,
                source=model,
                kept=Kept(options={"on_estimate": told}),
            )
        time_left = about(seconds["before"])
        with stage("after", f"drawing {count} images with the edited model, {time_left}"):
            after = look(TextToImage.from_pipeline(edited))
        seconds["total"] = round(sum(seconds.values()), 1)
        sampler = "the model's own"
        record = {
            "concept": CONCEPT,
            "model": model,
            "seed": command.seed,
            "images_per_figure": command.images,
            "prompts": "held-out wordings; every name of a digit equally often",
            "sampling": {"sampler": sampler, "steps": command.steps, "guidance": command.guidance},
            "figures": {
                "before": erasure_figures(before.found, CONCEPT),
                "after": erasure_figures(after.found, CONCEPT),
            },
            "judge": judge.measured,
            "settings": dataclasses.asdict(command.sage),
            "seconds": seconds,
            **environment(),
        }
        write_json(folder / METRICS, record)
        save_png(demo_grid(before, after), folder / "grid.png")
        near, images = near_tables(erasing_record(erased)), Images(folder)
        page = demo_page(before, after, record, near, judge, images, command=typed())
        write_report(folder, page, images)
    console = Console()
    console.print(demo_table(record["figures"]))
    console.print(
        f"{command.images} images per figure in held-out wordings, {command.steps} steps, seed "
        f"{command.seed}; {seconds['erase']:.0f} s to erase, {seconds['total']:.0f} s in all.\n"
        f"{command.output}: grid.png, report.html, metrics.json, and the edited model in erased/",
        highlight=False,
        soft_wrap=True,
    )


def _look(command: Command, judge: Any, sets: dict[str, list[Any]], model: TextToImage) -> Look:
    draw = functools.partial(
        model, num_inference_steps=command.steps, guidance_scale=command.guidance, batch_size=16
    )
    found = examine_all(draw, judge, sets, seed=command.seed)
    texts = [text for text in (*ASKED, *KEPT) for _ in range(_PER_PROMPT)]
    images = np.split(draw(texts, seed=command.seed), len(texts) // _PER_PROMPT)
    return Look(found, images[: len(ASKED)], images[len(ASKED) :])
