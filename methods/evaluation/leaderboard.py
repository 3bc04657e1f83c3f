"""A published suite on an erasure: one line of figures, resumable, over several devices.

    evaluate_suite(original, edited, prompts, judge, SuiteConfig(), Path("run"))

As UnlearnDiffAtk's leaderboard has it (arXiv 2310.11868, section 5): *pre-ASR* is the share of the
prompts whose image by the edited model shows the concept; *ASR* adds those for which the attack
found a prefix that brings it back.  Beside them the Fréchet inception distance, the CMMD and the
CLIP score of images that the edited model draws of captions, and composition.

Everything that is drawn or found is kept in a folder at once, and what is there is not done again:
after a kill the same call goes on.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.text_to_image import TextToImage
from ..estimate import about
from ..red_team import unlearn_diff_atk
from ..red_team.unlearn_diff_atk import UnlearnDiffAtkConfig
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import encode_phrases, phrase_ids, with_prefix
from .composition import Composed, shows_composed
from .judges import Judge, JudgeError, calibrated
from .kept_images import KeptImages
from .statistics import (
    clip_score,
    frechet_distance,
    jackknife_interval,
    maximum_mean_discrepancy,
    mean_interval,
    proportion,
)
from .torch_noise import torch_latents
from .unsafe_prompts import UnsafePrompt

_SILENT = 15.0  # seconds between lines of progress
_READ = 64  # images that judges and instruments are handed at a time


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """How a suite is drawn and attacked; the defaults are UnlearnDiffAtk's.

    Attributes:
      steps: denoising steps per image.
      guidance: of prompts whose file names none.
      sampler: one of `sampling.SAMPLER_KINDS`; None is the model's own.
      seed: of the attack; and prompt n of a file without seeds has this plus n.
      batch_size: images drawn, and prompts attacked, at a time on each device.
      attack: its settings; None runs none.
    """

    steps: int = 50
    guidance: float = 7.5
    sampler: str | None = "lms"
    seed: int = 0
    batch_size: int = 8
    attack: UnlearnDiffAtkConfig | None = dataclasses.field(default_factory=UnlearnDiffAtkConfig)

    def __post_init__(self) -> None:
        check_settings(self, least={"steps": 1, "batch_size": 1, "seed": 0})


@dataclasses.dataclass(frozen=True)
class Utility:
    """What else is measured of the edited model, and with what.

    Attributes:
      captions: prompts that ask for no erased concept, such as COCO's.
      clip: a `Clip`, which gives the CLIP score and the CMMD.
      fid: an `Inception`, which gives the Fréchet inception distance.
      reference: images that the edited model's are compared with; without any, those that the
        original model draws of the same captions.
      composed: prompts of several parts.
      composer: a `Clip` or a `Classifier`, who says whether their images show them.
    """

    captions: Sequence[UnsafePrompt] = ()
    clip: Any = None
    fid: Any = None
    reference: Sequence[Callable[[], UInt8[np.ndarray, "H W 3"]]] = ()
    composed: Sequence[Composed] = ()
    composer: Any = None


def tenth(rows: Sequence[Any]) -> list[Any]:
    """Every tenth, and at least two where there are as many."""
    return list(rows[::10]) if len(rows) > 10 else list(rows[:2])


def evaluate_suite(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    prompts: Sequence[UnsafePrompt],
    judge: Judge,
    config: SuiteConfig,
    folder: Path,
    *,
    utility: Utility | None = None,
    mesh: Mesh | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run a suite.

    Args:
      original: the model as it was.
      edited: the model without the concept.
      prompts: that ask for the concept.
      judge: who says whether an image shows it.
      config: the settings.
      folder: where images and searches are kept; of this run alone.
      utility: what else is measured.
      mesh: devices along its axis `data`; None takes one.
      report: called with lines of progress.

    Returns:
      plain values: "line", the figures with their intervals; "judge", its record, calibrated;
      "prompts", what happened to each; "utility" and "composition".

    Raises:
      JudgeError: the judge does not see the concept in the original's images.  They are kept.
      ValueError: fewer than two prompts, or one that leaves the attack no room.
    """
    if len(prompts) < 2:
        raise ValueError(f"a suite has at least 2 prompts, received {len(prompts)}.")
    utility = utility or Utility()
    run = _Run(original, edited, config, folder, mesh, report)
    left_out = run.without_room(prompts)
    prompts = [each for n, each in enumerate(prompts) if n not in left_out]
    before = run.draw("original", run.before, prompts)
    try:
        record, shown = calibrated(judge, before.batches(len(prompts), _READ))
    except JudgeError as error:
        raise JudgeError(
            f"{error} The images are kept in {before.folder}, and the same command with another "
            "judge goes on from them."
        ) from error
    after = run.draw("edited", run.after, prompts)
    pre = _judged(judge, after, len(prompts))
    found: list[dict[str, Any] | None] = [None] * len(prompts)
    if config.attack is not None:
        found = run.attack(prompts, np.flatnonzero(~pre), before, judge)
    post = np.asarray([each is not None and each["success"] for each in found])
    rows = [
        {
            "number": n,
            "prompt": each.text,
            "seed": run.seed(each, n),
            "guidance": run.guidance(each),
            "original": bool(shown[n]),
            "edited": bool(pre[n]),
            "attack": found[n],
        }
        for n, each in enumerate(prompts)
    ]
    measured = run.utility(utility)
    line = {
        "Pre-ASR": proportion(pre),
        "Post-ASR": None if config.attack is None else proportion(pre | post),
        "FID": measured.get("fid"),
        "CLIP-Score": (measured.get("clip_score") or {}).get("after"),
    }
    composition = run.composition(utility)
    if composition is not None:
        line["Composition"] = composition["after"]
    return {
        "line": line,
        "judge": record,
        "prompts": rows,
        "left_out": left_out,
        "utility": measured,
        "composition": composition,
    }


def _judged(judge: Judge, images: KeptImages, count: int) -> np.ndarray:
    return np.concatenate([judge.sees(batch) for batch in images.batches(count, _READ)])


class _Run:
    """Draws, attacks and measures, in a folder."""

    def __init__(
        self,
        original: StableDiffusionPipeline,
        edited: StableDiffusionPipeline,
        config: SuiteConfig,
        folder: Path,
        mesh: Mesh | None,
        report: Callable[[str], None],
    ):
        self.original, self.edited = original, edited
        self.config, self.folder, self.mesh, self.report = config, folder, mesh, report
        self.before, self.after = map(self.drawer, (original, edited))
        self.devices = 1 if mesh is None else mesh.shape["data"]
        self.batch = config.batch_size * self.devices

    def drawer(self, pipeline: StableDiffusionPipeline) -> TextToImage:
        """What draws, with its parameters on every device."""
        drawer = TextToImage.from_pipeline(pipeline)
        return dataclasses.replace(drawer, params=self.everywhere(drawer.params))

    def everywhere(self, params: Any, axes: tuple[str, ...] = ()) -> Any:
        """Arrays on every device, or divided among them by their rows."""
        if self.mesh is None:
            return params
        return jax.device_put(params, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def seed(self, prompt: UnsafePrompt, number: int) -> int:
        """Of a prompt's noise."""
        return self.config.seed + number if prompt.seed is None else prompt.seed

    def guidance(self, prompt: UnsafePrompt) -> float:
        """Of a prompt."""
        own = prompt.guidance_scale
        return self.config.guidance if own is None else own

    def without_room(self, prompts: Sequence[UnsafePrompt]) -> list[int]:
        """Numbers of prompts that leave no room for a prefix; those are told, and left out."""
        if self.config.attack is None:
            return []
        room = self.edited.max_length - 2 - self.config.attack.tokens
        ids = phrase_ids(self.edited.tokenizer, [each.text for each in prompts], special=False)
        long = [n for n, each in enumerate(ids) if len(each) > room]
        if len(prompts) - len(long) < 2:
            raise ValueError(
                f"{len(long)} of {len(prompts)} prompts have more than the {room} tokens that "
                f"leave room for a prefix of {self.config.attack.tokens}, and 2 others are needed."
            )
        if long:
            self.report(f"{len(long)} prompts leave no room for the prefix and are left out")
        return long

    # ---- drawing ----

    def progress(self, title: str) -> Callable[[int, int], None]:
        """Tells how far a stage is, and how long it will take, now and then."""
        began = told = time.monotonic()

        def done(count: int, of: int) -> None:
            nonlocal told
            now = time.monotonic()
            if count < of and now - told > _SILENT:
                told = now
                left = about((now - began) / count * (of - count))
                self.report(f"{title}: {count} of {of}; {left} left")

        return done

    def draw(self, name: str, model: TextToImage, prompts: Sequence[UnsafePrompt]) -> KeptImages:
        """The images of prompts by a model, in a folder of that name."""
        kept = KeptImages(self.folder / name)
        title = f"{name}: {len(prompts)} images"
        if missing := len(kept.missing(len(prompts))):
            already = len(prompts) - missing
            self.report(title + (f", {already} of them kept from before" if already else ""))
        texts = [each.text for each in prompts]
        kept.complete(
            len(prompts),
            self.batch,
            lambda numbers: self.images(model, texts, prompts, numbers),
            self.progress(title),
        )
        return kept

    def images(
        self,
        model: TextToImage,
        texts: Sequence[str] | np.ndarray,
        prompts: Sequence[UnsafePrompt],
        numbers: np.ndarray,
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """Images of some prompts from their own seeds and with their own guidance.

        `texts`, or token ids, are asked for in the prompts' place.
        """
        shape: Any = model.pipeline.latent_shape  # [h, w, C]
        noise = {n: torch_latents(self.seed(prompts[n], n), shape) for n in numbers.tolist()}
        scales = np.asarray([self.guidance(prompts[n]) for n in numbers])
        found: dict[int, np.ndarray] = {}
        for scale in np.unique(scales):
            chosen = numbers[scales == scale]
            rows = np.resize(chosen, max(len(chosen), self.batch))  # no other shape is compiled
            asked: Any = texts[rows] if isinstance(texts, np.ndarray) else [texts[n] for n in rows]
            drawn = model(
                asked,
                latents=np.stack([noise[int(n)] for n in rows]),
                guidance_scale=float(scale),
                num_inference_steps=self.config.steps,
                sampler=self.config.sampler or model.schedule.closest_sampler,
                batch_size=self.config.batch_size,
                mesh=self.mesh,
            )
            found |= dict(zip(chosen.tolist(), drawn, strict=False))
        return np.stack([found[n] for n in numbers.tolist()])

    # ---- the attack ----

    def attack(
        self,
        prompts: Sequence[UnsafePrompt],
        numbers: np.ndarray,
        before: KeptImages,
        judge: Judge,
    ) -> list[dict[str, Any] | None]:
        """What the attack found for each prompt among `numbers`; None for the others."""
        config = self.config.attack
        assert config is not None
        static, frozen = unlearn_diff_atk.attacked(self.edited, config)
        times = config.timesteps(static.schedule.num_train_timesteps)
        ids = encode_phrases(
            self.edited.tokenizer, [each.text for each in prompts], self.edited.max_length
        )
        key, size = seed_key(self.config.seed), self.batch
        fresh = jax.tree.map(np.asarray, unlearn_diff_atk.begin(static, frozen, 1))
        state = jax.tree.map(lambda leaf: np.repeat(leaf, size, 0), fresh)
        what = {"judge": judge.record, "attack": dataclasses.asdict(config)}
        kept = _KeptSearch(self.folder / "attack.npz", what)
        found, slots = kept.read(state, size) or ([None] * len(prompts), [])
        begun_on = {n for n, _ in slots}
        waiting = [int(n) for n in numbers if found[n] is None and n not in begun_on]
        if not (slots or waiting):
            return found
        frozen = self.everywhere(frozen)
        self.report(f"attack: {len(waiting) + len(slots)} prompts, at most {len(times)} times each")
        tell, rounds = self.progress("attack, at most"), 0
        total = len(waiting) * len(times) + sum(len(times) - begun for _, begun in slots)
        targets: dict[int, np.ndarray] = {}
        while slots or waiting:
            while waiting and len(slots) < size:
                place = len(slots)
                slots.append((waiting.pop(0), 0))
                for leaf, new in zip(*map(jax.tree.leaves, (state, fresh)), strict=True):
                    leaf[place] = new[0]
            for n, _ in slots:
                if n not in targets:
                    targets[n] = unlearn_diff_atk.targets(self.original, before.read([n]))[0]
            # Rows without a prompt repeat the first one's, and are not looked at.
            rows = [slots[place] if place < len(slots) else slots[0] for place in range(size)]
            keys = jnp.stack(
                [jax.random.fold_in(jax.random.fold_in(key, n), begun) for n, begun in rows]
            )
            given = (
                state,
                np.stack([targets[n] for n, _ in rows]),
                np.stack([ids[n] for n, _ in rows]),
                np.asarray([times[begun] for _, begun in rows], np.int32),
                keys,
            )
            searched, losses = unlearn_diff_atk.search(
                static, frozen, *self.everywhere(given, ("data",))
            )
            prefixes, losses = unlearn_diff_atk.likeliest(searched), np.asarray(losses)
            asked = np.array(ids)
            attacked = np.asarray([n for n, _ in slots])
            asked[attacked] = with_prefix(
                jnp.asarray(ids[attacked]), jnp.asarray(prefixes[: len(slots)])
            )
            images = self.images(self.after, asked, prompts, attacked)
            hits = judge.sees(images)
            state = jax.tree.map(np.array, jax.device_get(searched))
            staying, rounds = [], rounds + len(slots)
            for place, (n, begun) in enumerate(slots):
                if hits[place] or begun + 1 == len(times):
                    found[n] = {
                        "success": bool(hits[place]),
                        "times": begun + 1,
                        "tokens": prefixes[place].tolist(),
                        "prefix": self.edited.tokenizer.decode(prefixes[place].tolist()),
                        "loss": float(losses[place]),
                    }
                    if hits[place]:
                        KeptImages(self.folder / "attacked").keep(n, images[place])
                    total -= len(times) - begun - 1
                    targets.pop(n)
                else:
                    staying.append((place, (n, begun + 1)))
            for leaf in jax.tree.leaves(state):
                leaf[: len(staying)] = leaf[[place for place, _ in staying]]
            slots = [slot for _, slot in staying]
            kept.write(found, slots, state)
            tell(rounds, total)
        return found

    # ---- what else ----

    def utility(self, given: Utility) -> dict[str, Any]:
        """Figures of the edited model's images of captions."""
        captions = given.captions
        measured: dict[str, Any] = {}
        if not captions or (given.clip is None and given.fid is None):
            return measured
        drawn = {"after": self.draw("captions", self.after, captions)}
        if not given.reference or given.clip is not None:
            drawn["before"] = self.draw("captions by the original", self.before, captions)
        measured["images"] = len(captions)
        measured["compared_with"] = (
            f"{len(given.reference)} images that were given"
            if given.reference
            else "what the original model draws of the same captions"
        )

        def features(eye: Any, name: str) -> np.ndarray:
            if name == "reference":
                loads = given.reference
                starts = range(0, len(loads), _READ)
                batches = ([load() for load in loads[n : n + _READ]] for n in starts)
            else:
                batches = drawn[name].batches(len(captions), _READ)
            return np.concatenate([eye.features(batch) for batch in batches])

        other = "reference" if given.reference else "before"
        for eye, name, distance in (
            (given.fid, "fid", frechet_distance),
            (given.clip, "cmmd", maximum_mean_discrepancy),
        ):
            if eye is None:
                continue
            self.report(f"{name.upper()}: features of {len(captions)} images")
            after, against = features(eye, "after"), features(eye, other)
            paired = len(after) == len(against) and other == "before"

            def value(rows: np.ndarray, a=after, b=against, f=distance, paired=paired) -> float:
                return f(a[rows], b[rows] if paired else b)

            measured[name] = {
                **jackknife_interval(value, len(after)),
                "features": eye.features_title,
            }
            if name == "cmmd":
                texts = eye.text_features([each.text for each in captions])
                scores = {"after": clip_score(after, texts)}
                seen = against if paired else features(eye, "before")
                scores["before"] = clip_score(seen, texts)
                measured["clip_score"] = {
                    when: {**mean_interval(each), "model": eye.name}
                    for when, each in scores.items()
                }
        return measured

    def composition(self, given: Utility) -> dict[str, Any] | None:
        """How many images show several things put together as they were asked for."""
        asked, judge = list(given.composed), given.composer
        if not asked or judge is None:
            return None
        prompts = [UnsafePrompt(each.text) for each in asked]
        hits = {}
        for when, name, model in (
            ("before", "composed by the original", self.before),
            ("after", "composed", self.after),
        ):
            images = self.draw(name, model, prompts).read(range(len(asked)))
            hits[when] = shows_composed(judge, images, asked)
        kinds = np.asarray([each.kind for each in asked])
        return {
            **{when: proportion(each) for when, each in hits.items()},
            "kinds": {
                kind: {when: proportion(each[kinds == kind]) for when, each in hits.items()}
                for kind in sorted(set(kinds.tolist()))
            },
        }


class _KeptSearch:
    """What an attack has found, and where it is, in one file that is replaced at once.

    `what` the attack is has to be the same for a file to count.
    """

    def __init__(self, path: Path, what: Any):
        self.path, self.what = path, json.loads(json.dumps(what))

    def write(self, found: list[Any], slots: list[tuple[int, int]], state: Any) -> None:
        """Keep the first rows of the state, one for each of the slots."""
        told = json.dumps({"what": self.what, "found": found, "slots": slots})
        rows = [leaf[: len(slots)] for leaf in jax.tree.leaves(state)]
        leaves = {f"leaf{n}": leaf for n, leaf in enumerate(rows)}
        unfinished = self.path.with_name(f".{self.path.name}")
        with open(unfinished, "wb") as file:
            np.savez(file, told=np.frombuffer(told.encode(), np.uint8), **leaves)
        os.replace(unfinished, self.path)

    def read(self, state: Any, size: int) -> tuple[list[Any], list[tuple[int, int]]] | None:
        """What was found, and up to `size` slots, whose rows are written into the state."""
        if not self.path.is_file():
            return None
        with np.load(self.path, allow_pickle=False) as kept:
            told = json.loads(kept["told"].tobytes())
            if told["what"] != self.what:
                return None
            slots = [(int(n), int(begun)) for n, begun in told["slots"]][:size]
            for n, leaf in enumerate(jax.tree.leaves(state)):
                leaf[: len(slots)] = kept[f"leaf{n}"][: len(slots)]
        return told["found"], slots
