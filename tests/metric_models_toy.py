"""transformers' DINOv2, BLIP and BLIP-2 of the smallest sizes, with random weights."""

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def randomize(module):
    """Weights away from the initial values, which are zeros and ones in places."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn_like(parameter))
    return module.eval()


def dinov2(transformers, **changes):
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 28,
        "patch_size": 7,
        **changes,
    }
    return randomize(transformers.Dinov2Model(transformers.Dinov2Config(**settings)))


def blip(transformers):
    text = {
        **TOWER,
        "vocab_size": 99,
        "max_position_embeddings": 8,
        "encoder_hidden_size": 24,
        "bos_token_id": 1,
        "sep_token_id": 2,
    }
    vision = {**TOWER, "hidden_size": 24, "image_size": 16, "patch_size": 8}
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=8
    )
    return randomize(transformers.BlipForImageTextRetrieval(config))


def blip_2(transformers):
    qformer = {
        **TOWER,
        "num_hidden_layers": 3,
        "vocab_size": 99,
        "max_position_embeddings": 8,
        "encoder_hidden_size": 24,
        "use_qformer_text_input": True,
    }
    vision = {**TOWER, "hidden_size": 24, "image_size": 16, "patch_size": 8}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, num_query_tokens=3, image_text_hidden_size=8
    )
    return randomize(transformers.Blip2ForImageTextRetrieval(config))
