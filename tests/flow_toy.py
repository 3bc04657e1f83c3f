"""Tiny random pipelines of transformers on a flow, as diffusers makes them."""

from pathlib import Path
from typing import Any

from conceptax.converters.tokenizer import read_tokenizer, write_tokenizer
from conceptax.methods.glyphs.tokenizer import build_tokenizer

FAMILIES = ("flux-dev", "flux-schnell", "klein", "klein-base", "sd3", "sd3-without-t5")
# Wan's at downsampling 2, of time too, the others at 4.
VIDEO_FAMILIES = ("wan", "wan-pair", "hunyuan", "cosmos-text", "cosmos-video")
LENGTH = 20  # of CLIP's prompts
T5_LENGTH = 24
WORDS = ("three", "red", "on", "brick", "a", "photo", "of")
VAE = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 32,
    "latent_channels": 4,
}
# Of FLUX.1 and SD 3, at downsampling 2.
FLOW_VAE = VAE | {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def t5_tokenizer() -> Any:
    """A unigram tokenizer of a few words."""
    import transformers

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words += [(f"▁{word}", -2.0) for word in WORDS]
    words += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return transformers.T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Any:
    """A byte-level tokenizer with a template of chats."""
    import transformers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama_tokenizer() -> Any:
    """A tokenizer of the words of HunyuanVideo's template, each of which is one token, and a few
    more; it begins texts, and pads them on the right."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    from conceptax.flax_models.pipelines.hunyuan_video import TEMPLATE

    marks = ["<s>", "<pad>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    split = pre_tokenizers.Whitespace()
    words = [word for word, _ in split.pre_tokenize_str(TEMPLATE)]
    words = list(dict.fromkeys([*marks, "<unk>", *words, *WORDS]))
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(marks)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
    )


def _clip(kind: str, tokenizer: Any, hidden: int, projection: int, length: int = LENGTH) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    return getattr(transformers, kind)(config).eval()


def _t5(width: int, tokenizer: Any, kind: str = "T5", activation: str = "gated-gelu") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=24,
        num_heads=3,
        num_layers=2,
        feed_forward_proj=activation,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def _flux(dev: bool) -> Any:
    import diffusers

    clip, t5 = build_tokenizer(max_length=LENGTH), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKL(**FLOW_VAE),
        text_encoder=_clip("CLIPTextModel", clip, 16, 16),
        text_encoder_2=_t5(12, t5),
        tokenizer=clip,
        tokenizer_2=t5,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**(DYNAMIC if dev else {})),
    )


def _klein(distilled: bool) -> Any:
    import diffusers
    import transformers

    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=29,  # layers 9, 18 and 27 are read
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKLFlux2(**VAE),
        text_encoder=transformers.Qwen3ForCausalLM(config).eval(),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        is_distilled=distilled,
    )


def _sd3(t5: bool) -> Any:
    import diffusers

    clips = [build_tokenizer(max_length=LENGTH) for _ in range(2)]
    clips[1].pad_token = "!"
    tokenizer = t5_tokenizer() if t5 else None
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=diffusers.AutoencoderKL(**FLOW_VAE),
        text_encoder=_clip("CLIPTextModelWithProjection", clips[0], 16, 12),
        text_encoder_2=_clip("CLIPTextModelWithProjection", clips[1], 16, 12),
        text_encoder_3=_t5(48, tokenizer) if t5 else None,
        tokenizer=clips[0],
        tokenizer_2=clips[1],
        tokenizer_3=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _wan(pair: bool) -> Any:
    import diffusers

    tokenizer = t5_tokenizer()
    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(1 + pair)
    ]
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(12, tokenizer, "UMT5"),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformers[0],
        transformer_2=transformers[1] if pair else None,
        boundary_ratio=0.875 if pair else None,
    )


def _hunyuan() -> Any:
    import diffusers
    import transformers

    tokenizer, clip = llama_tokenizer(), build_tokenizer(max_length=77)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=4,  # of which the first two are read
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8,) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip("CLIPTextModel", clip, 16, 16, 77),
        tokenizer_2=clip,
    )


def safety_checker() -> Any:
    """One to which all is safe, in the place of Cosmos' own, which is another package's."""

    class SafetyChecker:
        def to(self, device: Any) -> None:
            pass

        def check_text_safety(self, prompt: str) -> bool:
            return True

        def check_video_safety(self, frames: Any) -> Any:
            return frames

    return SafetyChecker()


def _cosmos(from_video: bool) -> Any:
    import diffusers

    tokenizer = t5_tokenizer()
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4 + from_video,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # for which diffusers needs torchvision
    )
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    kind = diffusers.CosmosVideoToWorldPipeline if from_video else None
    return (kind or diffusers.CosmosTextToWorldPipeline)(
        tokenizer=tokenizer,
        text_encoder=_t5(12, tokenizer, activation="relu"),
        vae=vae,
        scheduler=diffusers.EDMEulerScheduler(
            sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        transformer=transformer,
        safety_checker=safety_checker(),
    )


_MADE = {
    "flux-dev": lambda: _flux(True),
    "flux-schnell": lambda: _flux(False),
    "klein": lambda: _klein(True),
    "klein-base": lambda: _klein(False),
    "sd3": lambda: _sd3(True),
    "sd3-without-t5": lambda: _sd3(False),
    "wan": lambda: _wan(False),
    "wan-pair": lambda: _wan(True),
    "hunyuan": _hunyuan,
    "cosmos-text": lambda: _cosmos(False),
    "cosmos-video": lambda: _cosmos(True),
}


def save_pipeline(folder: Path, family: str) -> Any:
    """Make one of the families, every parameter random, write it, and return it."""
    import torch

    torch.manual_seed(0)
    pipeline = _MADE[family]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline.set_progress_bar_config(disable=True)
    checker = pipeline.components.get("safety_checker")
    if checker is not None:  # it is no part of the folder
        pipeline.register_modules(safety_checker=None)
    pipeline.save_pretrained(folder)
    if checker is not None:
        pipeline.register_modules(safety_checker=checker)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and type(part).__name__ == "CLIPTokenizer":
            write_tokenizer(part, folder / name)
            setattr(pipeline, name, read_tokenizer(folder / name))
    return pipeline
