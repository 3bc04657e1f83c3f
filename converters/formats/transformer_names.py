"""The names of FLUX, HunyuanVideo and Stable Diffusion 3 in their publishers' files and diffusers'.

Tables as `names` reads them, of paths behind `model.diffusion_model.`, made from how many layers
there are.  What a name alone does not tell: queries, keys and values are fused, a single block's
with the first layer of its perceptron, and the last modulation says (shift, scale), in diffusers
(scale, shift).
"""

from collections.abc import Collection

from .names import Rows, Table, equal_rows, prefixed, swapped

_QKV = equal_rows("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = equal_rows("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FINAL = {
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

# FLUX.1
_FLUX_EMBEDDERS = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
_FLUX_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_FLUX_ATTENTION = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    **_FLUX_NORMS,
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    **_FLUX_ATTENTION,
}
_SINGLE_NORMS = {
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
# The perceptron is four times as wide as the tokens.
_QKV_MLP = Rows({**_QKV.parts, "proj_mlp": 4})
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": _QKV_MLP,
    "linear2": "proj_out",
    **_SINGLE_NORMS,
}

# FLUX.2, whose blocks share their modulations.
_FLUX_2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **_FINAL,
}
_FLUX_2_DOUBLE = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    **_FLUX_ATTENTION,
}
_FLUX_2_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    **_SINGLE_NORMS,
}

# HunyuanVideo, whose token refiner's modulations only gate.
_HUNYUAN = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **_FINAL,
}
_HUNYUAN_DOUBLE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_qkv": _QKV,
    "txt_attn_qkv": _ADDED,
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_HUNYUAN_SINGLE = {
    "modulation.linear": "norm.linear",
    "linear1": _QKV_MLP,
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
}
_HUNYUAN_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": _QKV,
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}

# Stable Diffusion 3 and 3.5
_SD_3 = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    **_FINAL,
}
_SD_3_BLOCK = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.qkv": _ADDED,
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_SD_3_CONTEXT = {  # the last block's text is not read any more
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SD_3_DUAL = {
    "x_block.attn2.qkv": equal_rows("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
}

# T5's encoder in GGUF files, as llama.cpp names it, beside transformers'.
_T5_GGUF = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_T5_GGUF_LAYER = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def flux_names(double: int, single: int) -> Table:
    """Black Forest Labs' paths in FLUX.1 of so many double and single blocks -> diffusers'."""
    table: dict[str, str | Rows] = {"img_in": "x_embedder", "txt_in": "context_embedder", **_FINAL}
    for old, kind in _FLUX_EMBEDDERS.items():
        new = f"time_text_embed.{kind}_embedder"
        table |= {f"{old}.in_layer": f"{new}.linear_1", f"{old}.out_layer": f"{new}.linear_2"}
    return table | _blocks(double, single, _FLUX_DOUBLE, _FLUX_SINGLE)


def flux_2_names(double: int, single: int) -> Table:
    """Black Forest Labs' paths in FLUX.2 of so many double and single blocks -> diffusers'."""
    return _FLUX_2 | _blocks(double, single, _FLUX_2_DOUBLE, _FLUX_2_SINGLE)


def hunyuan_names(double: int, single: int, refiner: int) -> Table:
    """Tencent's paths in HunyuanVideo of so many blocks of each kind -> diffusers'."""
    table = _HUNYUAN | _blocks(double, single, _HUNYUAN_DOUBLE, _HUNYUAN_SINGLE)
    for layer in range(refiner):
        old = f"txt_in.individual_token_refiner.blocks.{layer}"
        new = f"context_embedder.token_refiner.refiner_blocks.{layer}"
        table |= prefixed(old, new, _HUNYUAN_REFINER)
    return table


def sd_3_names(layers: int, dual: Collection[int]) -> Table:
    """Stability's paths in Stable Diffusion 3 of so many blocks -> diffusers'.

    Args:
      layers: how many.
      dual: those with a second attention, over the image alone.
    """
    table: dict[str, str | Rows] = dict(_SD_3)
    for layer in range(layers):
        last = {"context_block.adaLN_modulation.1": swapped("norm1_context.linear")}
        block = _SD_3_BLOCK | (last if layer == layers - 1 else _SD_3_CONTEXT)
        block |= _SD_3_DUAL if layer in dual else {}
        table |= prefixed(f"joint_blocks.{layer}", f"transformer_blocks.{layer}", block)
    return table


def t5_gguf_names(layers: int) -> Table:
    """llama.cpp's paths in an encoder of T5 -> transformers'."""
    table: dict[str, str | Rows] = dict(_T5_GGUF)
    for layer in range(layers):
        table |= prefixed(f"enc.blk.{layer}", f"encoder.block.{layer}", _T5_GGUF_LAYER)
    return table


def _blocks(double: int, single: int, doubles: Table, singles: Table) -> dict[str, str | Rows]:
    table: dict[str, str | Rows] = {}
    for layer in range(double):
        table |= prefixed(f"double_blocks.{layer}", f"transformer_blocks.{layer}", doubles)
    for layer in range(single):
        table |= prefixed(f"single_blocks.{layer}", f"single_transformer_blocks.{layer}", singles)
    return table
