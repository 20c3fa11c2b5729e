"""Tiny untrained pipelines of the exact classes of larger families, saved as diffusers folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from distill.teacher.vocabulary import build_tokenizer

WORDS = ["a red cube", "a blue torus"]


def clip_tokenizer() -> CLIPTokenizer:
    return build_tokenizer(WORDS, 16)[0]


def text_config(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5(width: int) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    words = sorted({word for text in WORDS for word in text.split()})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def vae(channels: int, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def sdxl(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        cross_attention_dim=24 + 32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=CLIPTextModel(text_config(tokenizer, 24, 24)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 32, 12)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**noise, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)


def sd3(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer_3, text_encoder_3 = t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 12,
        out_channels=4,
        pos_embed_max_size=16,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, 0.06),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, 24, 16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 32, 12)),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)


def flux(folder: Path, guidance_embeds: bool = True) -> None:
    tokenizer = clip_tokenizer()
    tokenizer_2, text_encoder_2 = t5(32)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(4, 0.1),
        text_encoder=CLIPTextModel(text_config(tokenizer, 24, 24)),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder)


def deepfloyd(folder: Path) -> None:
    tokenizer, text_encoder = t5(32)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=16,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        only_cross_attention=True,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
    )
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def digits(folder: Path, classes: int | None = 11) -> None:
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=classes,
    )
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=True)).save_pretrained(folder)


MAKERS = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "deepfloyd": deepfloyd, "digits": digits}


def make(name: str, folder: Path) -> Path:
    """A folder of the pipeline `name`, of seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MAKERS[name](folder)
    return folder
