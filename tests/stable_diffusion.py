"""A stock Stable Diffusion pipeline at tiny width, as users' folders have it."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from distill.teacher.vocabulary import build_tokenizer


def sd1_unet() -> dict[str, Any]:
    return {"attention_head_dim": 8}


def sd2_unet() -> dict[str, Any]:
    return {"attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True}


def stock_pipeline(second: bool) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x's, or 2.x's, architecture at tiny width, untrained."""
    torch.manual_seed(0)
    tokenizer, _ = build_tokenizer(["a photo of one cat and two dogs"], context_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_act="gelu" if second else "quick_gelu",
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=2,
        cross_attention_dim=32,
        **(sd2_unet() if second else sd1_unet()),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=64,
        scaling_factor=0.18215,
    )
    noise: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **noise
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler
        if second
        else PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **noise),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
