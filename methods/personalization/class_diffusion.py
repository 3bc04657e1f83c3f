"""ClassDiffusion: learn a subject from a few images without forgetting how to compose.

Source: Huang et al., "ClassDiffusion: More Aligned Personalization Tuning with Explicit Class
Guidance" (arXiv 2405.17532).  It is Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488) plus a
semantic preservation loss.  Trained are the keys and values of the UNet's cross-attention and one
new embedding row per concept, on

    L = L_rec + lambda L_spl (+ prior preservation)

    L_rec    squared error of the prediction where the image is, the augmentation's canvas left out
    L_spl,i  1 - cos( T("a photo of a <new_i> w_i"), T("a photo of a w_i") ), mean over the concepts

w_i is the word of concept i's class and T the text encoder's pooled state.  What the subject's
phrase means drifts away from its class while L_rec alone is trained, and prompts that compose it
with other things are obeyed less and less; L_spl holds it.

`conceptax.methods.personalization` puts Custom Diffusion, DreamBooth and textual inversion on the
same step, as other settings.

Pooling.  Stable Diffusion 1.x's text encoder declares `eos_token_id` 2, for which transformers
pools at the largest token id.  That is the end of text in CLIP's own vocabulary, but a new token's
id is larger still, so the authors' loss compares the state at `<new_i>`, which cannot see the class
word behind it.  `pooling="eos"` pools at the end of the text; "reference" does as they did.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ...flax_models.autoencoder_kl import AutoencoderKL
from ...flax_models.clip import CLIPTextConfig, pooling_positions
from ...flax_models.pipelines.new_tokens import add_tokens
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.pipelines.tokenizers import token_ids
from ..memory import require_memory, unet_bytes, vae_bytes
from ..sampling import NoiseSchedule, add_noise, training_target
from ..seeds import seed_key
from ..settings import check_settings
from ..subjects.batches import PREFIXES, augmented, batches, cached, collect
from ..subjects.images import Concept
from ..text.new_tokens import default_initializers, encode_with_rows, initial_rows
from ..text.phrases import (
    ConceptError,
    Encoders,
    edited_encoders,
    encode_phrases,
    phrase_ids,
)
from ..training import (
    TrainState,
    accumulated,
    apply_gradients,
    constant_adamw,
    constrain_batch,
    init_state,
    split_trainable,
    train,
)
from ..vectors import cosine
from .class_images import lacking_class_images, with_class_images

# What of the UNet trains: the names are the reference's `freeze_model`, and the two extremes.
TRAINED: Mapping[str, tuple[str, ...]] = {
    "crossattn_kv": ("*.attn2.to_k", "*.attn2.to_v"),
    "crossattn": ("*.attn2",),
    "unet": ("*",),
    "nothing": (),
}
_PHRASE, _CLASS_PHRASE = "a photo of a {token} {word}", "a photo of a {word}"


@dataclasses.dataclass(frozen=True)
class ClassDiffusionConfig:
    """All settings of a run.

    Attributes:
      steps: one batch each; the authors take 500 for one concept and 800 for two.
      batch_size: images per step, over all devices.
      accumulate: steps whose gradients make one update, as one batch of all their images would.
      learning_rate: of AdamW, constant.
      scale_lr: whether the rate is multiplied by the images per update.
      weight_decay: AdamW's decay.
      trained: of the UNet: keys and values of the cross-attention, all of it, everything, nothing.
      train_tokens: whether the new tokens' embeddings train; else they stay the initializers'.
      edit: in which of SDXL's text encoders they train; other models have one.
      initialize: where a new token's embedding starts: at a "rare" word's or at the "class" word's.
      prompt: of images that have none of their own; {token} and {word} stand for the concept's.
      spl_weight: weight of the semantic preservation loss (lambda).
      pooling: where it pools: at the end of the text, or as the "reference" does.
      prior_weight: weight of prior preservation on class images; 0 does without them.
      size: pixels along an image's side; None is what the UNet was trained at.
      augment: whether subjects are shown small or close up, as Custom Diffusion does; else latents
        are cached.
      flip: whether images are mirrored one time in two.
      center_crop: whether the central square of an image is taken, or all of it squeezed into one.
    """

    steps: int = 500
    batch_size: int = 2
    accumulate: int = 1
    learning_rate: float = 1e-5
    scale_lr: bool = True
    weight_decay: float = 1e-2
    trained: Literal["crossattn_kv", "crossattn", "unet", "nothing"] = "crossattn_kv"
    train_tokens: bool = True
    edit: Encoders = "both"
    initialize: Literal["rare", "class"] = "rare"
    prompt: str = "photo of a {token} {word}"
    spl_weight: float = 1.0
    pooling: Literal["eos", "reference"] = "eos"
    prior_weight: float = 0.0
    size: int | None = None
    augment: bool = True
    flip: bool = True
    center_crop: bool = False

    def __post_init__(self):
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "weight_decay": 0}
        weights = {"spl_weight": 0, "prior_weight": 0}
        check_settings(self, least=least | weights, positive=("learning_rate",))
        if self.trained == "nothing" and not self.train_tokens:
            raise ValueError("nothing is left to train: trained='nothing' needs train_tokens.")
        if "{token}" not in self.prompt:
            raise ValueError(f"prompt needs '{{token}}' in it, received {self.prompt!r}.")


# ---- losses: functions of arrays ----


def masked_reconstruction_loss(
    prediction: Float[Array, "B H W C"],
    target: Float[Array, "B H W C"],
    mask: Float[Array, "B H W 1"],
) -> Float[Array, ""]:
    """Mean over the batch of  sum_hwc m (prediction - target)^2 / sum_hw m.

    The denominator counts pixels and not channels, so this is C times a masked mean; the reference
    has it so. An empty mask counts as no error.
    """
    error = (mask * (prediction - target) ** 2).sum(axis=(1, 2, 3))
    return jnp.mean(error / jnp.maximum(mask.sum(axis=(1, 2, 3)), 1.0))


def semantic_preservation_loss(
    modifier_pooled: Float[Array, "N C"], class_pooled: Float[Array, "N C"]
) -> Float[Array, ""]:
    """Mean over the concepts of  1 - cos(state with the new token, state of the class alone)."""
    return jnp.mean(1.0 - cosine(modifier_pooled, class_pooled))


def spl_positions(
    tokens: Int[np.ndarray, "N L"],
    lengths: Int[np.ndarray, " N"],
    config: CLIPTextConfig,
    pooling: str,
) -> Int[np.ndarray, " N"]:
    """Where the semantic preservation loss pools padded phrases: see the module's description.

    `lengths` are those of the phrases, start and end included; `pooling` is "eos" or "reference".
    """
    if pooling == "eos":
        return np.asarray(lengths) - 1
    return np.asarray(pooling_positions(config, jnp.asarray(tokens)))


# ---- the step ----


@dataclasses.dataclass(frozen=True)
class PersonalisingStatic:
    """What a step needs and never changes.

    Attributes:
      unet, text, vae: structures; `vae` is None where latents are cached.
      optimizer: of the trained parameters.
      schedule: of the noise.
      spl_weight, prior_weight: of the losses.
      columns: first and last of the embeddings' entries that train: all, or one encoder's.
    """

    unet: nnx.GraphDef[Any]
    text: nnx.GraphDef[Any]
    vae: nnx.GraphDef[Any] | None
    optimizer: optax.GradientTransformation
    schedule: NoiseSchedule
    spl_weight: float
    prior_weight: float
    columns: tuple[int, int]

    def rows(self, params: Mapping[str, Any], frozen: Mapping[str, Any]) -> Float[Array, "N C"]:
        """The new tokens' embeddings, what trains of them in its place."""
        if "rows" not in params:
            return frozen["rows"]
        return frozen["rows"].at[:, slice(*self.columns)].set(params["rows"])


def latent_posterior(
    vae: AutoencoderKL, pixels: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
    """Mean and standard deviation of the latents that the UNet sees, float32."""
    mean, logvar = vae.encode(pixels)
    std = jnp.exp(0.5 * logvar.astype(jnp.float32))
    return vae.scale(mean.astype(jnp.float32)), std * vae.config.scaling_factor


def personalize_step(
    static: PersonalisingStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the UNet's trained part and of the new tokens' embeddings.

    The trained parameters are {"unet": a part of the UNet's, "rows": [N, C'], the trained columns},
    either of which may be absent; the batch is as `subjects.batches` makes it.

    Returns:
      the new state and metrics: loss, reconstruction, spl (also where its weight is 0: it says how
      far the subject has drifted from its class), and prior where it is on.
    """
    latent_key, noise_key, time_key = jax.random.split(key, 3)
    own = batch["tokens"].shape[0]
    batch, mask, prior = dict(batch), batch["mask"], batch.get("prior") or {}
    batch |= {name: jnp.concatenate([batch[name], prior[name]]) for name in prior}
    if static.vae is None:
        mean, std = batch["latent_mean"], batch["latent_std"]
    else:
        mean, std = latent_posterior(nnx.merge(static.vae, frozen["vae"]), batch["pixels"])
    size = mean.shape[0]
    draw, noise = constrain_batch(
        (jax.random.normal(latent_key, mean.shape), jax.random.normal(noise_key, mean.shape))
    )
    latents = mean + std * draw
    times = jax.random.randint(time_key, (size,), 0, static.schedule.num_train_timesteps)
    noisy = add_noise(static.schedule, latents, noise, times)
    target = training_target(static.schedule, latents, noise, times)
    text = nnx.merge(static.text, frozen["text"])
    tokens = jnp.concatenate([batch["tokens"], frozen["spl_tokens"]])
    ends = jnp.concatenate([jnp.zeros(size, jnp.int32), frozen["spl_positions"]])

    def loss_of(params: Any) -> tuple[Array, dict[str, Array]]:
        unet = nnx.merge(static.unet, params.get("unet", {}), frozen["unet"])
        encoded = encode_with_rows(text, tokens, static.rows(params, frozen), frozen["ids"], ends)
        condition = jax.tree.map(lambda leaf: leaf[:size], encoded.condition)
        prediction = unet(noisy, times, condition).astype(jnp.float32)
        pooled = encoded.pooled[size:].astype(jnp.float32)
        metrics = {
            "reconstruction": masked_reconstruction_loss(prediction[:own], target[:own], mask),
            "spl": semantic_preservation_loss(pooled, frozen["class_pooled"]),
        }
        loss = metrics["reconstruction"] + static.spl_weight * metrics["spl"]
        if size > own:
            metrics["prior"] = jnp.mean((prediction[own:] - target[own:]) ** 2)
            loss = loss + static.prior_weight * metrics["prior"]
        return loss, {"loss": loss, **metrics}

    (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return apply_gradients(state, gradients, static.optimizer), metrics


# ---- from a pipeline to a run, and back ----


def prepare(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[Concept],
    config: ClassDiffusionConfig,
    *,
    seed: int = 0,
) -> tuple[PersonalisingStatic, TrainState, dict[str, Any], grain.IterDataset]:
    """Everything `personalize_step` needs, and the batches to give it.

    Arguments as of `personalize`; the seed is that of the batches.

    Raises:
      TokenError: a token that exists, an initializer of several tokens, unequal counts.
      ConceptError: no concepts, an overlong prompt, or no class images where they are needed.
      ValueError: a size that the model does not take.
    """
    size, cells = _sizes(pipeline, config)
    if not concepts:
        raise ConceptError("no concept was given: name at least one.")
    if without := [concept.token for concept in lacking_class_images(concepts, config)]:
        raise ConceptError(
            f"prior preservation (prior_weight={config.prior_weight}) needs images of the class of "
            f"{', '.join(without)}: give them as class_images, drawn by the model itself "
            "(draw_class_images) for example, or set prior_weight to 0."
        )
    seen = config.batch_size * (2 if config.prior_weight else 1)
    unet_needs = unet_bytes(pipeline.unet.config, seen, cells, cells, pipeline.unet.dtype)
    vae_needs = vae_bytes(pipeline.vae.config, 1, size, size, pipeline.vae.dtype)
    what = f"training on {config.batch_size} images of {size}x{size} pixels at a time"
    remedy = "take a smaller batch_size or size"
    require_memory(max(unet_needs, vae_needs), what, remedy, spread=True)
    rows = new_rows(pipeline, concepts, config)
    extended = add_tokens(pipeline, rows)
    tokenizer, length = extended.tokenizer, pipeline.max_length
    prompts = [
        concept.prompt or config.prompt.format(token=concept.token, word=concept.word)
        for concept in concepts
    ]
    prefixes, prior = PREFIXES if config.augment else PREFIXES[:1], config.prior_weight > 0
    instances = collect(tokenizer, concepts, prompts, length, size, prefixes=prefixes, prior=prior)
    text, text_params = nnx.split(extended.prompt_encoder)
    unet, unet_params = nnx.split(pipeline.unet)
    trained, rest = {}, nnx.to_pure_dict(unet_params)
    if patterns := TRAINED[config.trained]:
        unet, trained, rest = split_trainable(pipeline.unet, patterns)
    params: dict[str, Any] = {"unet": trained} if trained else {}
    start, columns = jnp.stack(list(rows.values())), _columns(pipeline, config.edit)
    if config.train_tokens:
        params["rows"] = start[:, slice(*columns)]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    images = config.batch_size * config.accumulate
    rate = config.learning_rate * (images if config.scale_lr else 1)
    optimizer = accumulated(constant_adamw(rate, config.weight_decay), config.accumulate)
    vae, vae_params = nnx.split(pipeline.vae)
    frozen = {
        "unet": rest,
        "text": nnx.to_pure_dict(text_params),
        "ids": np.asarray(token_ids(tokenizer, list(rows)), np.int32),
        "rows": start.astype(jnp.float32),
        **_phrases(extended, concepts, config.pooling, length),
    }
    options = {"flip": config.flip, "crop": config.center_crop}
    if config.augment:
        frozen["vae"] = nnx.to_pure_dict(vae_params)
        example = augmented(instances, size, cells, **options)
    else:
        encode = functools.partial(_encode_images, vae, nnx.to_pure_dict(vae_params))
        example = cached(instances, size, cells, encode, **options)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    encoding = vae if config.augment else None
    weights = config.spl_weight, config.prior_weight
    static = PersonalisingStatic(unet, text, encoding, optimizer, schedule, *weights, columns)
    data = batches(example, len(instances.images), config.batch_size, seed)
    return static, init_state(params, optimizer), jax.tree.map(jnp.asarray, frozen), data


def _columns(pipeline: StableDiffusionPipeline, edit: Encoders) -> tuple[int, int]:
    """Where the embeddings of the edited encoders are, in rows of all encoders' side by side."""
    names = edited_encoders(pipeline, edit)
    widths = [tower.config.hidden_size for tower in pipeline.prompt_encoder.towers]
    first, last = (name == "text_encoder" for name in (names[0], names[-1]))
    return 0 if first else widths[0], widths[0] if last else sum(widths)


def new_rows(
    pipeline: StableDiffusionPipeline, concepts: Sequence[Concept], config: ClassDiffusionConfig
) -> dict[str, Float[Array, " C"]]:
    """Token -> the embedding it starts from."""
    words = [concept.word for concept in concepts]
    defaults = default_initializers(pipeline.tokenizer, words, config.initialize)
    initializers = [
        concept.initializer or word for concept, word in zip(concepts, defaults, strict=True)
    ]
    return initial_rows(pipeline, [concept.token for concept in concepts], initializers)


def check_concepts(
    pipeline: StableDiffusionPipeline, concepts: Sequence[Concept], config: ClassDiffusionConfig
) -> None:
    """Refuse what `prepare` would, before class images are drawn, which may take hours.

    Raises:
      TokenError: a token that exists, an initializer of several tokens, unequal counts.
      ValueError: a size that the model does not take.
    """
    _sizes(pipeline, config)
    add_tokens(pipeline, new_rows(pipeline, concepts, config))


def _sizes(pipeline: StableDiffusionPipeline, config: ClassDiffusionConfig) -> tuple[int, int]:
    """Pixels and latent cells along a side of an image, which is square."""
    factor = pipeline.vae.config.downsampling
    unet = pipeline.unet.config
    own = min(pipeline.latent_shape[:2]) * factor
    size = own if config.size is None else config.size
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    if size % multiple or size < multiple:
        raise ValueError(f"size must be a multiple of {multiple} for this model, received {size}.")
    return size, size // factor


def _phrases(
    extended: StableDiffusionPipeline, concepts: Sequence[Concept], pooling: str, length: int
) -> dict[str, Any]:
    """Both sides of the semantic preservation loss; that of the class does not change."""
    tokenizer, encoder = extended.tokenizer, extended.prompt_encoder
    text, params = nnx.split(encoder)
    sides = []
    for phrase in (_PHRASE, _CLASS_PHRASE):
        texts = [phrase.format(token=c.token, word=c.word) for c in concepts]
        tokens = encode_phrases(tokenizer, texts, length)
        lengths = np.asarray([len(row) for row in phrase_ids(tokenizer, texts)])
        sides.append((tokens, spl_positions(tokens, lengths, encoder.config, pooling)))
    (tokens, positions), (class_tokens, class_positions) = sides
    return {
        "spl_tokens": tokens,  # [N, L]
        "spl_positions": positions.astype(np.int32),
        "class_pooled": _pooled(text, nnx.to_pure_dict(params), class_tokens, class_positions),
    }


@functools.partial(jax.jit, static_argnums=0)
def _pooled(text: Any, params: Any, tokens: Array, positions: Array) -> Float[Array, "N C"]:
    pooled = nnx.merge(text, params)(tokens, eos_positions=positions).pooled
    return pooled.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _posterior(vae: Any, params: Any, pixels: Array) -> tuple[Array, Array]:
    return latent_posterior(nnx.merge(vae, params), pixels)


def _encode_images(vae: Any, params: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scaled posterior of images, one at a time so that one program serves any number."""
    parts = [_posterior(vae, params, image[None]) for image in pixels]
    mean, std = (np.concatenate([np.asarray(x) for x in side]) for side in zip(*parts, strict=True))
    return mean, std


def personalized(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[Concept],
    config: ClassDiffusionConfig,
    static: PersonalisingStatic,
    state: TrainState,
    frozen: Mapping[str, Any],
) -> StableDiffusionPipeline:
    """The pipeline with what was trained in its place, parameters in the dtypes of the original."""
    stored = nnx.to_pure_dict(nnx.state(pipeline.unet))
    unet = nnx.merge(static.unet, state.params.get("unet", {}), frozen["unet"])
    trained = nnx.to_pure_dict(nnx.state(unet))
    nnx.update(unet, jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored))
    rows = new_rows(pipeline, concepts, config)
    if "rows" in state.params:
        rows = dict(zip(rows, static.rows(state.params, frozen), strict=True))
    return dataclasses.replace(add_tokens(pipeline, rows), unet=unet)


def personalize(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[Concept],
    config: ClassDiffusionConfig | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Learn concepts and return the pipeline that draws them.

    Its tokenizer knows the new tokens, its text encoder embeds them, and its UNet has the trained
    part in place.

    Where the settings preserve a prior (`prior_weight`, as DreamBooth's and Custom Diffusion's do),
    a concept that has no class images gets 200 that the model draws first; a warning says so.

    Args:
      pipeline: the model; it stays as it is.
      concepts: what to learn.
      config: settings.
      seed: of everything random in the run.
      options: passed to `conceptax.methods.training.train` (mesh, checkpoint_dir, progress, ...).
    """
    config = config or ClassDiffusionConfig()
    if lacking_class_images(concepts, config):
        check_concepts(pipeline, concepts, config)
        concepts = with_class_images(pipeline, concepts, config, seed=seed)
    static, state, frozen, data = prepare(pipeline, concepts, config, seed=seed)
    key, steps = seed_key(seed), config.steps
    state = train(
        personalize_step, static, state, frozen, data, key=key, num_steps=steps, **options
    )
    return personalized(pipeline, concepts, config, static, state, frozen)
