"""An erasure's evaluation: every figure counts images that two models drew from the same noise.

*Attack success*: how many images show an erased concept although they should not; asked for in
plain prompts, by synonyms, by unsafe prompts, and brought back by the red team.  *Retention*: how
many images of something else show it.  Both with 95 % Wilson intervals, before and after.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..diffusion.text_to_image import TextToImage, image_keys, initial_noise
from ..estimate import about
from ..red_team import ATTACKS
from ..settings import check_settings
from .classifiers import Classifier
from .instruments import Clip
from .statistics import clip_score, frechet_distance, mean_interval, proportion
from .suites import Asked, Suites
from .unsafe_prompts import UnsafePrompt

_GROUPS = {"neighbors": "neighboring concepts", "distant": "distant concepts"}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
      images: images of each figure: of a concept under an attack, or of a retained group, which
        its phrases share evenly.
      steps: denoising steps per image.
      guidance: strength of the prompt.
      seed: of the noise, the choice of prompts and the attacks.
      batch_size: images drawn at a time; another one rounds differently.
      attack_images: images of the concept, drawn by the original model, that each attack is given.
      attacks: name of an attack of the red team -> its settings; those left out are not run.
    """

    images: int = 200
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    batch_size: int = 16
    attack_images: int = 16
    attacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        least = {"images": 2, "steps": 1, "batch_size": 1, "attack_images": 1}
        check_settings(self, least=least)
        if unknown := sorted(set(self.attacks) - set(known_attacks())):
            raise ValueError(f"attacks are among {sorted(known_attacks())}, received {unknown}.")


class Drawn(NamedTuple):
    """Images, whether each shows the phrase that it is asked about, and what it does show.

    The classifier's words and their probabilities are there if it `says` them.
    """

    images: UInt8[np.ndarray, "N H W 3"]
    hits: Bool[np.ndarray, " N"]
    words: tuple[str, ...] = ()
    confidences: Float[np.ndarray, " N"] | None = None


class Counted(NamedTuple):
    """What a figure counts.

    Attributes:
      title: of the figure.
      kind: whether an image that shows its phrase is an attack's success or something retained.
      texts: the prompts; where an attack uses no words, what it was told.
      before: of the original model; None where an attack is not run on it.
      after: of the edited model.
      name: of the figure's attack or group.
      phrases: what each image is asked about.
      noise: the seed and the number under it that each image starts from.
    """

    title: str
    kind: Literal["attack", "retention"]
    texts: tuple[str, ...]
    before: Drawn | None
    after: Drawn
    name: str
    phrases: tuple[str, ...]
    noise: tuple[tuple[int, int], ...]


class Evaluation(NamedTuple):
    """Metrics (plain values, a function of the arguments), all images, seconds of each figure."""

    metrics: dict[str, Any]
    counted: tuple[Counted, ...]
    seconds: dict[str, float]


def known_attacks() -> Mapping[str, Any]:
    """The red team's attacks by name."""
    return ATTACKS


def evaluate(
    original: StableDiffusionPipeline,
    edited: StableDiffusionPipeline,
    concepts: Sequence[str],
    classifier: Classifier,
    suites: Suites,
    config: EvaluationConfig,
    *,
    clip: Clip | None = None,
    unsafe: Sequence[UnsafePrompt] = (),
    never_knew: StableDiffusionPipeline | None = None,
    report: Callable[[str], None] = lambda text: None,
    drawn: dict[Any, np.ndarray] | None = None,
) -> Evaluation:
    """Evaluate an erasure.

    Args:
      original: the model as it was.
      edited: the model without the concepts.
      concepts: what was erased; keys of `suites.plain`.
      classifier: who says what an image shows; independent of both models.
      suites: the prompts.
      config: the settings.
      clip: scores images against prompts and gives the features of the Fréchet distance; without
        it there is no CLIP score, and the features are the classifier's.
      unsafe: prompts of a list, one image each, of which at most `config.images` are drawn.
      never_knew: a model that never learnt the concepts, to compare relapse with.
      report: called with a line before each figure.
      drawn: images of the original model, which this adds to and reads; pass one to evaluations of
        several edits of one model, and its images are drawn once.

    Raises:
      ValueError: a phrase that the classifier cannot judge, or settings that do not fit.
    """
    classifier = classifier.among(list(dict.fromkeys([*concepts, *suites.phrases])))
    worded = ("plain", "plain prompts", suites.plain), ("synonyms", "synonyms", suites.synonyms)
    asked = [each[concept] for *_, each in worded for concept in concepts if concept in each]
    sets = [*map(len, asked), *map(len, suites.retained.values())]
    if unsafe:
        sets.append(min(len(unsafe), config.images))
    bench = _Bench(original, edited, classifier, config, report, drawn)
    bench.planned = len(sets) + 1 + len(config.attacks) * len(concepts), 2 * sum(sets)
    attacks = [
        bench.prompts(name, title, concept, suites_of[concept])
        for name, title, suites_of in worded
        for concept in concepts
        if concept in suites_of
    ]
    if unsafe:
        attacks.append(bench.unsafe(unsafe, concepts))
    retention = [bench.retained(group, asked) for group, asked in suites.retained.items()]
    others = [each for each in bench.counted if each.kind == "retention"]
    with bench.timed("scores", "CLIP score and Fréchet distance"):
        scores, reader = None, classifier if clip is None else clip
        if clip is not None:
            parts = {"retained": _score(clip, others), "concepts": _score(clip, bench.plain)}
            scores = {"model": clip.name, **parts}
        distance = _distance(reader, others)
    for name, settings in config.attacks.items():
        besides = never_knew if name == "relapse" else None
        for concept in concepts:
            attacks.append(bench.attack(name, settings, concept, suites.plain[concept], besides))
    metrics = {
        "concepts": list(concepts),
        "attacks": attacks,
        "retention": retention,
        "clip_score": scores,
        "frechet": distance,
        "classifier": classifier.record,
    }
    return Evaluation(metrics, tuple(bench.counted), bench.seconds)


class _Bench:
    """Draws, asks the classifier, and keeps what was counted."""

    def __init__(
        self,
        original: StableDiffusionPipeline,
        edited: StableDiffusionPipeline,
        classifier: Classifier,
        config: EvaluationConfig,
        report: Callable[[str], None],
        drawn: dict[Any, np.ndarray] | None,
    ):
        self.pipelines = original, edited
        self.before, self.after = map(TextToImage.from_pipeline, self.pipelines)
        self.classifier, self.config, self.report = classifier, config, report
        self.drawn = {} if drawn is None else drawn
        self.counted: list[Counted] = []
        self.plain: list[Counted] = []
        self.seconds: dict[str, float] = {}
        self.planned: tuple[int, int] = 0, 0  # figures, and images of those in front of the attacks
        self._images = 0  # of them that were counted
        self._first = 0  # number of the next image: each figure starts from noise of its own
        self._starts: dict[str, int] = {}  # concept -> number of its first plain image

    @contextlib.contextmanager
    def timed(self, name: str, text: str) -> Iterator[None]:
        figures, images = self.planned
        told = f"{len(self.seconds) + 1} of {figures}: {text}"
        if 0 < self._images < images:
            left = sum(self.seconds.values()) / self._images * (images - self._images)
            told += f"; {about(left)} left" + (" before the attacks" if self.config.attacks else "")
        self.report(told)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def draw(self, model: TextToImage, prompts: Any, **options: Any) -> np.ndarray:
        config = self.config
        settings = {
            "seed": config.seed,
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance,
            "batch_size": config.batch_size,
            "sampler": model.schedule.closest_sampler,  # None: the model's own is known
        }
        return model(prompts, **{**settings, **options})

    def original(self, texts: Sequence[str], first: int) -> np.ndarray:
        """What the original model draws; once for the same texts and noise."""
        config = self.config
        key = (*texts, first, config.seed, config.steps, config.guidance, config.batch_size)
        if key not in self.drawn:
            self.drawn[key] = self.draw(self.before, texts, first_index=first)
        return self.drawn[key]

    def _reserve(self, count: int) -> int:
        """The number of the first of `count` images with noise that nothing else starts from."""
        first, self._first = self._first, self._first + count
        return first

    def judged(self, images: np.ndarray, phrases: Sequence[str]) -> Drawn:
        """Images with what the classifier says of them."""
        says = getattr(self.classifier, "says", None)
        if says is None:
            return Drawn(images, self.classifier.shows(images, phrases))
        return Drawn(images, *says(images, phrases))

    def noise(self, first: int, count: int) -> tuple[tuple[int, int], ...]:
        return tuple((self.config.seed, first + n) for n in range(count))

    def _compare(
        self, name: str, title: str, kind: Any, asked: Sequence[Asked], first: int
    ) -> Counted:
        texts, phrases = [each.text for each in asked], [each.phrase for each in asked]
        both = self.original(texts, first), self.draw(self.after, texts, first_index=first)
        before, after = (self.judged(images, phrases) for images in both)
        noise = self.noise(first, len(asked))
        self.counted.append(
            Counted(title, kind, tuple(texts), before, after, name, tuple(phrases), noise)
        )
        self._images += 2 * len(asked)
        return self.counted[-1]

    # ---- figures ----

    def prompts(self, name: str, title: str, concept: str, asked: Sequence[Asked]) -> dict:
        """A concept asked for in words, with each word on its own where there are several."""
        with self.timed(f"{name}, {concept}", f"{title} for “{concept}”: 2 × {len(asked)} images"):
            first = self._reserve(len(asked))
            found = self._compare(name, f"{title} for “{concept}”", "attack", asked, first)
        if name == "plain":
            self.plain.append(found)
            self._starts[concept] = first
        row = {"attack": name, "title": title, "concept": concept, **_figures(found)}
        parts = _parts(found, [each.word for each in asked])
        return row | ({"words": parts} if len(parts) > 1 else {})

    def retained(self, group: str, asked: Sequence[Asked]) -> dict:
        """What should have stayed, together and for each phrase."""
        title = _GROUPS.get(group, group)
        with self.timed(group, f"{title}: 2 × {len(asked)} images"):
            found = self._compare(group, title, "retention", asked, self._reserve(len(asked)))
        parts = _parts(found, [each.phrase for each in asked])
        return {"group": group, "title": title, **_figures(found), "phrases": parts}

    def unsafe(self, rows: Sequence[UnsafePrompt], concepts: Sequence[str]) -> dict:
        """Prompts of a list, with their own seeds and guidance; any of the concepts counts."""
        config = self.config
        pick = np.random.default_rng(config.seed).permutation(len(rows))[: config.images]
        rows = [rows[i] for i in np.sort(pick)]
        first = self._reserve(len(rows))
        starts, noise, guidance = [], [], []
        for n, row in enumerate(rows):
            seed, index = (config.seed, first + n) if row.seed is None else (row.seed, 0)
            starts.append((seed, index))
            keys = image_keys(seed, np.asarray([index]))
            noise.append(initial_noise(keys, self.before.pipeline.latent_shape))
            own = row.guidance_scale
            guidance.append(config.guidance if own is None else own)
        noise, guidance = np.concatenate(noise), np.asarray(guidance)
        drawn: list[Drawn] = []
        with self.timed("unsafe prompts", f"unsafe prompts: 2 × {len(rows)} images"):
            for model in (self.before, self.after):
                parts: dict[int, np.ndarray] = {}
                for scale in np.unique(guidance):
                    where = np.flatnonzero(guidance == scale)
                    # At least one whole batch, so that no other shape is compiled.
                    where = np.resize(where, max(len(where), config.batch_size))
                    prompts = [rows[i].text for i in where]
                    own = {"latents": noise[where], "guidance_scale": float(scale)}
                    images = self.draw(model, prompts, **own)
                    parts |= dict(zip(where.tolist(), images, strict=True))
                images = np.stack([parts[n] for n in range(len(rows))])
                drawn.append(_any([self.judged(images, [each] * len(rows)) for each in concepts]))
        texts = tuple(row.text for row in rows)
        name, anything = "unsafe prompts", " or ".join(concepts)
        phrases = (anything,) * len(rows)
        before, after = drawn
        found = Counted(name, "attack", texts, before, after, name, phrases, tuple(starts))
        self.counted.append(found)
        return {"attack": name, "title": name, "concept": anything, **_figures(found)}

    def attack(
        self,
        name: str,
        settings: Any,
        concept: str,
        asked: Sequence[Asked],
        never_knew: StableDiffusionPipeline | None,
    ) -> dict:
        """A red-team attack on a concept: its success at every budget, the last one in front."""
        original, edited = self.pipelines
        attack = known_attacks()[name]
        texts = [each.text for each in asked]
        given = texts[: self.config.attack_images]
        title = f"{attack.title} for “{concept}”"
        with self.timed(f"{name}, {concept}", title):
            images = self.original(given, self._reserve(len(given)))

            def against(model: StableDiffusionPipeline) -> tuple[list[dict], Counted]:
                given = {"images": images, "prompts": texts, "seed": self.config.seed}
                budgets, last = [], None
                for attempt in attack.run(original, model, concept, settings, **given):
                    last = self._attempt(name, title, concept, attempt, texts)
                    budget, details = _plain(attempt.budget), _plain(attempt.details)
                    success = proportion(last.after.hits)
                    budgets.append({"budget": budget, **success, "details": details})
                if last is None:
                    raise ValueError(f"{attack.title} made no attempt with {settings}.")
                return budgets, last

            budgets, found = against(edited)
            self.counted.append(found)
            row = {"attack": name, "title": attack.title, "concept": concept}
            row |= {**_figures(found), "budgets": budgets}
            return row if never_knew is None else row | {"never_knew": against(never_knew)[0]}

    def _attempt(
        self, name: str, title: str, concept: str, attempt: Any, texts: list[str]
    ) -> Counted:
        """As many images as there are plain prompts, from their noise."""
        prompts, count = attempt.prompts, len(texts)
        rows: Int[np.ndarray, " N"] = np.arange(count) % len(prompts)
        worded = not isinstance(prompts, np.ndarray)
        prompts = [prompts[row] for row in rows] if worded else prompts[rows]
        model = TextToImage.from_pipeline(attempt.pipeline)
        first, phrases = self._starts[concept], (concept,) * count
        drawn = self.judged(self.draw(model, prompts, first_index=first), phrases)
        told = tuple(prompts) if worded else tuple(texts)
        return Counted(title, "attack", told, None, drawn, name, phrases, self.noise(first, count))


# ---- from images to figures ----


def _any(parts: Sequence[Drawn]) -> Drawn:
    """Images asked about several phrases, any of which counts; its word is then told."""
    hits = np.stack([part.hits for part in parts])
    found, told = np.logical_or.reduce(hits), parts[0]
    if any(part.confidences is None for part in parts):
        return Drawn(told.images, found)
    chosen = hits.argmax(0).tolist()  # the first that it shows, or else the first
    words = tuple(parts[part].words[n] for n, part in enumerate(chosen))
    each = np.stack([part.confidences for part in parts if part.confidences is not None])
    return Drawn(told.images, found, words, each[chosen, np.arange(len(chosen))])


def _figures(found: Counted, rows: Any = slice(None)) -> dict[str, Any]:
    return {
        "before": None if found.before is None else proportion(found.before.hits[rows]),
        "after": proportion(found.after.hits[rows]),
    }


def _parts(found: Counted, names: Sequence[str]) -> dict[str, Any]:
    """The figures of each name on its own, in alphabetical order."""
    column = np.asarray(names)
    return {name: _figures(found, column == name) for name in sorted(set(names))}


def _both(counted: Sequence[Counted]) -> dict[str, np.ndarray]:
    """The images of several figures by model."""
    pairs = [(each.before.images, each.after.images) for each in counted if each.before]
    before, after = map(np.concatenate, zip(*pairs, strict=True))
    return {"before": before, "after": after}


def _score(clip: Clip, counted: Sequence[Counted]) -> dict[str, Any] | None:
    """The mean CLIP score of images with their prompts, with its 95 % interval."""
    if not counted:
        return None
    texts = clip.text_features([text for each in counted for text in each.texts])
    return {
        when: mean_interval(clip_score(clip.features(images), texts))
        for when, images in _both(counted).items()
    }


def _distance(reader: Classifier | Clip, counted: Sequence[Counted]) -> dict[str, Any] | None:
    """Between the two models' images of what should have stayed."""
    if not counted:
        return None
    before, after = (reader.features(images) for images in _both(counted).values())
    return {
        "features": reader.features_title,
        "width": before.shape[1],
        "images": len(before),
        "distance": frechet_distance(before, after),
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts, and lists of them, as JSON holds them; arrays are left out."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:
            value = value.item()
        if isinstance(value, list | tuple):
            value = list(value)
        if getattr(value, "ndim", 0) == 0:
            kept[name] = value
    return kept
