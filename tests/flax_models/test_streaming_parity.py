"""The comparison of large models block by block, on small ones."""

import dataclasses

import pytest

from conceptax.flax_models.cosmos_transformer_3d import CosmosTransformer3DConfig
from conceptax.flax_models.flux_2_transformer_2d import Flux2Transformer2DConfig
from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DConfig
from conceptax.flax_models.hunyuan_video_transformer_3d import HunyuanVideoTransformer3DConfig
from conceptax.flax_models.t5 import T5Config
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig

SMALL = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
}
CONFIGS = {
    "flux": FluxTransformer2DConfig(
        **SMALL, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=True
    ),
    "flux-2": Flux2Transformer2DConfig(**SMALL, axes_dims_rope=(2, 4, 4, 6)),
    "hunyuan-video": HunyuanVideoTransformer3DConfig(
        **{key: value for key, value in SMALL.items() if key != "joint_attention_dim"},
        out_channels=3,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 4, 8),
    ),
}
# What has blocks of one kind, the last of which is named.
PLAIN = {
    "cosmos": (
        CosmosTransformer3DConfig(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            text_embed_dim=10,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
        ),
        "transformer_blocks.1",
    ),
    "t5": (T5Config(vocab_size=9, d_model=8, d_kv=6, d_ff=12, num_layers=2), "encoder.block.1"),
}
SIZES = {"grid": (2, 3), "text": 4}


@pytest.fixture
def streaming(repository, monkeypatch, torch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import streaming_parity

    return streaming_parity


@pytest.fixture
def values(streaming):
    """Larger than of large models, so that each block counts; some reach over the pool's end."""
    pool = streaming.Pool(5000)
    return lambda key, shape: 5 * pool(key, shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_small_models_agree(name, streaming, values, capsys):
    sizes = SIZES | ({"grid": (2, 1, 3)} if name == "hunyuan-video" else {})
    compared = list(streaming.compare(name, CONFIGS[name], values, **sizes))
    assert max(each.relative for each in compared) < 1e-5
    assert {each.block for each in compared} >= {
        "transformer_blocks.1",
        "single_transformer_blocks.1",
        "proj_out",
    }
    assert streaming.report(iter(compared), 1e-5) is None
    assert capsys.readouterr().out.count("transformer_blocks.0") == 4  # image and text


@pytest.mark.parametrize("name", PLAIN)
def test_small_models_of_equal_blocks_agree(name, streaming, values):
    config, last = PLAIN[name]
    grid = (2, 1, 3) if name == "cosmos" else None
    compared = list(streaming.compare(name, config, values, grid=grid, text=4))
    assert max(each.relative for each in compared) < 1e-5
    assert [each.block for each in compared].count(last) == (1 if name == "cosmos" else 2)


def test_a_small_wan_agrees(streaming, values):
    config = WanTransformer3DConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=3,
        text_dim=10,
        ffn_dim=20,
        num_layers=2,
    )
    compared = list(streaming.compare("wan", config, values, grid=(2, 1, 3), text=4))
    assert max(each.relative for each in compared) < 1e-5
    assert {each.block for each in compared} >= {"blocks.1", "scale_shift_table", "proj_out"}


def test_the_first_block_that_differs_is_named(streaming, values, torch, monkeypatch):
    plain = torch.nn.GELU.forward  # of single blocks only
    monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: 1.1 * plain(self, x))
    compared = streaming.compare("flux", CONFIGS["flux"], values, **SIZES)
    assert streaming.report(compared, 1e-4) == "single_transformer_blocks.0"


def test_all_keys_belong_to_a_block(streaming, values, monkeypatch):
    family = streaming.FAMILIES["flux"]

    def fewer(*given):
        streams, blocks = family.blocks(*given)
        return streams, blocks[:-1]

    monkeypatch.setitem(streaming.FAMILIES, "flux", family._replace(blocks=fewer))
    with pytest.raises(ValueError, match=r"differ from diffusers': proj_out\.bias"):
        next(streaming.compare("flux", CONFIGS["flux"], values, **SIZES))


def test_values_of_a_checkpoint(streaming, tmp_path):
    import oracles

    config = dataclasses.replace(CONFIGS["flux-2"], guidance_embeds=False)
    oracles.flux_2().module.save_pretrained(tmp_path)
    compared = streaming.compare("flux-2", config, streaming.stored(tmp_path), **SIZES)
    assert streaming.report(compared, 1e-5) is None


@pytest.mark.slow
def test_flux_dev_at_full_size(streaming):
    """57 blocks in the memory of one pair of them; random blocks let rounding grow."""
    compared = streaming.compare("flux", FluxTransformer2DConfig.dev(), streaming.Pool())
    assert streaming.report(compared, 1e-3) is None
