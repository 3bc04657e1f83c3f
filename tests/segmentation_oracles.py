"""transformers' modules that compute parts of MAFT+, under MAFT+'s parameter names.

`translate` brings a dict of the torch module's tensors (weights or gradients) to our keys.
"""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles import Oracle, nchw, nhwc

from conceptax.converters.parameters import OneKey
from conceptax.converters.tensors import tensor_specs, variables
from conceptax.flax_models.convnext import ConvNeXtConfig
from conceptax.flax_models.maft_plus import MaftPlusConfig
from conceptax.flax_models.open_clip import OpenCLIPConfig, OpenCLIPTextConfig

# The smallest model with every kind of parameter.
MINIMAL = MaftPlusConfig.of(
    OpenCLIPConfig(
        OpenCLIPTextConfig(8, 2, 1, 20, 5), ConvNeXtConfig((1, 1, 1, 1), (4, 4, 8, 8)), embed_dim=8
    ),
    hidden_dim=32,
    heads=2,
    num_points=2,
    encoder_layers=1,
    encoder_ffn=32,
    decoder_layers=1,
    decoder_ffn=32,
    num_queries=5,
)

Tensors = dict[str, np.ndarray]
Translate = Callable[[Tensors], Tensors]


def fill(model: nnx.Module, tensors: Tensors) -> nnx.Module:
    """Give a model the tensors there are for it; the others stay as they are."""
    slots, left = variables(model), dict(tensors)
    for spec in tensor_specs(model):
        if spec.key in left:
            tensor = left.pop(spec.key)
            assert tensor.shape == spec.shape, (spec.key, tensor.shape, spec.shape)
            slots[spec.path].set_value(np.ascontiguousarray(spec.to_nnx(tensor)))
    assert not left, sorted(left)
    return model


def random_model(make: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> Any:
    """A model of random parameters, none of them zero, without compiling its initializers."""
    rng, keys = np.random.default_rng(seed), OneKey()
    model = nnx.eval_shape(lambda: make(keys))
    for path, variable in variables(model).items():
        shape, leaf = variable.get_value().shape, str(path[-1])
        values = rng.standard_normal(shape, np.float32)
        if leaf in ("scale", "gamma"):
            values = 1 + 0.2 * values
        elif leaf == "logit_scale":
            values = np.float32(np.log(1 / 0.07))
        elif len(shape) > 1:
            values /= np.sqrt(np.prod(shape[:-1]))
        else:
            values *= 0.2
        variable.set_value(jnp.asarray(values))
    return model


def state(module: Any) -> Tensors:
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def randomize(module: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """Move every parameter away from zeros, ones and exact pixel offsets."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def renaming(rules: list[tuple[str, str]], *, stacked: str = "") -> Translate:
    """Translate by the first regular expression that matches the whole key.

    Keys under `stacked` have separate projections of queries, keys and values.
    """

    def translate(tensors: Tensors) -> Tensors:
        out = {}
        for key, value in tensors.items():
            for pattern, replacement in rules:
                if re.fullmatch(pattern, key):
                    out[re.sub(pattern, replacement, key)] = value
                    break
        for key in [key for key in out if stacked and key.endswith("q_proj.weight")]:
            base = key.removesuffix("q_proj.weight")
            for leaf in ("weight", "bias"):
                parts = [out.pop(f"{base}{name}_proj.{leaf}") for name in "qkv"]
                out[f"{base}in_proj_{leaf}"] = np.concatenate(parts)
        return out

    return translate


def convnext(seed: int = 0) -> tuple[Oracle, Translate]:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], layer_norm_eps=1e-6
    )
    module = randomize(transformers.ConvNextModel(config))

    def torch_call(image: Any) -> Any:
        out = module(nchw(image), output_hidden_states=True)
        maps = [nhwc(x).flatten() for x in out.hidden_states[-4:]]
        return torch.cat([*maps, out.pooler_output.flatten()])

    def jax_call(model: Any, image: Any) -> Any:
        maps = model(image)
        pooled = model.head.norm(maps[-1].mean(axis=(1, 2)))
        return jnp.concatenate([x.ravel() for x in (*maps, pooled)])

    image = np.random.default_rng(seed).normal(size=(2, 64, 96, 3)).astype(np.float32)
    translate = renaming(
        [
            (r"embeddings\.patch_embeddings\.(.*)", r"stem.0.\1"),
            (r"embeddings\.layernorm\.(.*)", r"stem.1.\1"),
            (r"encoder\.(stages\.\d)\.downsampling_layer\.(.*)", r"\1.downsample.\2"),
            (r"encoder\.(stages\.\d)\.layers\.(\d+)\.dwconv(.*)", r"\1.blocks.\2.conv_dw\3"),
            (r"encoder\.(stages\.\d)\.layers\.(\d+)\.layernorm(.*)", r"\1.blocks.\2.norm\3"),
            (r"encoder\.(stages\.\d)\.layers\.(\d+)\.pwconv(.*)", r"\1.blocks.\2.mlp.fc\3"),
            (r"encoder\.(stages\.\d)\.layers\.(\d+)\.layer_scale_.*", r"\1.blocks.\2.gamma"),
            (r"layernorm\.(.*)", r"head.norm.\1"),
        ]
    )
    return Oracle(module, {"image": image}, {}, torch_call, jax_call), translate


def open_clip_text(seed: int = 0) -> tuple[Oracle, Translate]:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        vocab_size=99,
        eos_token_id=98,
        max_position_embeddings=9,
        projection_dim=12,
    )
    module = randomize(transformers.CLIPTextModelWithProjection(config))
    ids = np.random.default_rng(1).integers(3, 90, (3, 7))
    ids[0, 4], ids[1, 6], ids[2, 2] = 98, 98, 98
    ids[0, 5:], ids[2, 3:] = 0, 0
    layer = r"text_model\.encoder\.layers\.(\d+)\."
    rename = renaming(
        [
            (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
            (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
            (layer + r"self_attn\.(.*)", r"transformer.resblocks.\1.attn.\2"),
            (layer + r"layer_norm(\d.*)", r"transformer.resblocks.\1.ln_\2"),
            (layer + r"mlp\.fc1(.*)", r"transformer.resblocks.\1.mlp.c_fc\2"),
            (layer + r"mlp\.fc2(.*)", r"transformer.resblocks.\1.mlp.c_proj\2"),
            (r"text_model\.final_layer_norm(.*)", r"ln_final\1"),
            (r"text_projection\.weight", "text_projection"),
        ],
        stacked="attn",
    )

    def translate(tensors: Tensors) -> Tensors:
        out = rename(tensors)
        return {**out, "text_projection": out["text_projection"].T}

    return (
        Oracle(
            module,
            {},
            {"ids": ids},
            lambda ids: module(input_ids=ids).text_embeds,
            lambda model, ids: model.encode_text(ids),
        ),
        translate,
    )


CHANNELS = (4, 6, 8, 10)
WIDTH = 64


def _mask2former_config() -> Any:
    import transformers

    return transformers.Mask2FormerConfig(
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        num_attention_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=32,
        decoder_layers=5,
        dim_feedforward=32,
        num_queries=6,
    )


def pixel_decoder(seed: int = 0) -> tuple[Oracle, Translate]:
    import torch
    from transformers.models.mask2former import modeling_mask2former as hf

    torch.manual_seed(seed)
    module = hf.Mask2FormerPixelDecoder(_mask2former_config(), CHANNELS)
    torch.nn.init.normal_(module.level_embed)
    module = randomize(module)
    rng = np.random.default_rng(seed)
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    inputs = {
        f"res{n + 2}": rng.normal(size=(2, *size, channels)).astype(np.float32)
        for n, (size, channels) in enumerate(zip(sizes, CHANNELS, strict=True))
    }

    def torch_call(**maps: Any) -> Any:
        out = module([nchw(x) for x in maps.values()], return_dict=True)
        parts = (out.mask_features, *out.multi_scale_features)
        return torch.cat([nhwc(x).flatten() for x in parts])

    def jax_call(model: Any, **maps: Any) -> Any:
        out = model(tuple(maps.values()))
        return jnp.concatenate([x.ravel() for x in (out.mask_features, *out.memories)])

    layer = r"encoder\.layers\.(\d+)\."
    new = r"transformer.encoder.layers.\1."
    translate = renaming(
        [
            (r"level_embed", "transformer.level_embed"),
            (r"input_projections\.(.*)", r"input_proj.\1"),
            (layer + r"self_attn_layer_norm(.*)", new + r"norm1\2"),
            (layer + r"final_layer_norm(.*)", new + r"norm2\2"),
            (layer + r"fc(.*)", new + r"linear\2"),
            (layer + r"(self_attn\..*)", new + r"\2"),
            (r"(adapter_1|layer_1)\.0\.(.*)", r"\1.\2"),
            (r"(adapter_1|layer_1)\.1\.(.*)", r"\1.norm.\2"),
            (r"mask_projection\.(.*)", r"mask_features.\1"),
        ]
    )
    return Oracle(module, inputs, {}, torch_call, jax_call), translate


def mask_decoder(seed: int = 0) -> tuple[Oracle, Translate]:
    import torch
    from transformers.models.mask2former import modeling_mask2former as hf

    torch.manual_seed(seed)
    module = randomize(hf.Mask2FormerTransformerModule(WIDTH, _mask2former_config()))
    rng = np.random.default_rng(seed)
    sizes = {"mask_features": (8, 12), "first": (2, 3), "second": (3, 4), "third": (4, 6)}
    inputs = {
        name: rng.normal(size=(2, *size, WIDTH)).astype(np.float32) for name, size in sizes.items()
    }

    def torch_call(mask_features: Any, **memories: Any) -> Any:
        out = module([nchw(x) for x in memories.values()], nchw(mask_features))
        return torch.stack(out.masks_queries_logits)

    def jax_call(model: Any, mask_features: Any, **memories: Any) -> Any:
        from conceptax.flax_models.mask2former import PixelFeatures

        pixels = PixelFeatures(mask_features, tuple(memories.values()))
        return jnp.stack([p.mask_logits for p in model(pixels, jnp.zeros((3, 12)))])

    layer = r"decoder\.layers\.(\d+)\."
    translate = renaming(
        [
            (layer + r"self_attn_layer_norm(.*)", r"transformer_self_attention_layers.\1.norm\2"),
            (layer + r"self_attn\.(.*)", r"transformer_self_attention_layers.\1.self_attn.\2"),
            (layer + r"cross_attn_layer_norm(.*)", r"transformer_cross_attention_layers.\1.norm\2"),
            (
                layer + r"cross_attn\.(.*)",
                r"transformer_cross_attention_layers.\1.multihead_attn.\2",
            ),
            (layer + r"fc(.*)", r"transformer_ffn_layers.\1.linear\2"),
            (layer + r"final_layer_norm(.*)", r"transformer_ffn_layers.\1.norm\2"),
            (r"decoder\.layernorm(.*)", r"decoder_norm\1"),
            (r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0(.*)", r"mask_embed.layers.\1\2"),
            (r"queries_features(.*)", r"query_feat\1"),
            (r"queries_embedder(.*)", r"query_embed\1"),
            (r"(level_embed.*)", r"\1"),
        ],
        stacked="self_attn",
    )
    return Oracle(module, inputs, {}, torch_call, jax_call), translate
