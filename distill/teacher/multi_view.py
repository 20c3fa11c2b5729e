"""A U-Net that is told the camera, denoises several views of an object together, and sees a picture of it.

The weights of `UNet2DConditionModel` are unchanged: stock diffusers loads and samples them as a text-to-image
model. What is added:

- the camera (MVDream, arXiv:2308.16512, section 3.1) in the time embedding and as one more text token, both
  computed jointly from the camera and what is seen: the mean text embedding and CLIP's of the picture;
- self-attention over all positions of a group of views (section 3.1, "3D self-attention"), same weights;
- a picture of the object (Zero-1-to-3, arXiv:2303.11328) as one more view of the group, without noise, at
  time 0 (CAT3D, arXiv:2405.10314, section 3.1), and CLIP's embedding of it as one more text token.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE, is_given
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json

AZIMUTH_FREQUENCIES, ELEVATION_FREQUENCIES = (1, 2, 3, 4), (1, 2)
FEATURES = 2 * len(AZIMUTH_FREQUENCIES) + 2 * len(ELEVATION_FREQUENCIES) + 3
# Brings the world's distances (2.75 to 3.25) and offsets (up to 0.1) to the range of the sines.
DISTANCE, DISTANCE_SCALE, OFFSET_SCALE = 3.0, 0.25, 0.05
POSE_EMBEDDING = "pose_embedding"  # of the U-Net's `added_cond_kwargs`
LAST_TIME = 999  # of a picture that is not given
PREFIX = "view_conditions."  # of the weights that the stock U-Net has not
FOLDER = "view_conditions"  # of a teacher's folder
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ViewConditionOptions:
    """Sizes of the layers that read cameras and pictures."""

    width: int = 256
    image_dim: int | None = None  # of CLIP's image embeddings; null: none is read

    def __post_init__(self) -> None:
        if self.width < 1 or (self.image_dim is not None and self.image_dim < 1):
            raise UserError(f"view conditions of {self}: positive sizes are expected")


def pose_features(poses: Tensor) -> Tensor:
    """Sines and cosines of the angles, scaled distance and offset: (B, 15) of poses (B, 5)."""
    azimuth, elevation = poses[:, 0], poses[:, 1]
    waves = [k * azimuth for k in AZIMUTH_FREQUENCIES] + [k * elevation for k in ELEVATION_FREQUENCIES]
    distance = (poses[:, 2:3] - DISTANCE) / DISTANCE_SCALE
    angles = torch.stack(waves, 1)
    return torch.cat([angles.sin(), angles.cos(), distance, poses[:, 3:] / OFFSET_SCALE], 1)


class ViewConditions(nn.Module):
    """Poses and picture embeddings as text tokens (B, 1, D), and poses as a part of the time embedding.

    What a pose looks like depends on the object, so the layers that read it are given both.
    """

    def __init__(self, options: ViewConditionOptions, token_dim: int, time_dim: int) -> None:
        super().__init__()
        self.options = options
        width, inputs = options.width, FEATURES + token_dim + (options.image_dim or 0)
        self.pose = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.pose_token = nn.Sequential(nn.Linear(width, token_dim), nn.LayerNorm(token_dim))
        self.pose_time = nn.Linear(width, time_dim)
        nn.init.zeros_(self.pose_time.weight)
        nn.init.zeros_(self.pose_time.bias)
        self.image_token = None
        if options.image_dim is not None:
            self.image_token = nn.Sequential(nn.Linear(options.image_dim, token_dim), nn.LayerNorm(token_dim))

    def forward(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the U-Net for a conditioning with extras; tokens that are not given are masked."""
        text = conditioning.embedding.to(dtype)
        tokens, given = [text], []
        arguments: dict[str, Any] = {"cross_attention_kwargs": {"views": conditioning.views}}
        poses, images = (conditioning.extras.get(name) for name in (POSE, IMAGE_EMBEDDING))
        if poses is not None:
            given.append(is_given(poses))
            hidden = self.pose(self.joint_features(poses, text, images))
            tokens.append(self.pose_token(hidden)[:, None])
            time = self.pose_time(hidden) * given[-1][:, None]
            arguments["added_cond_kwargs"] = {POSE_EMBEDDING: time}
        if images is not None and self.image_token is not None:
            given.append(is_given(images))
            tokens.append(self.image_token(images.nan_to_num(0.0).to(dtype))[:, None])

        arguments["encoder_hidden_states"] = torch.cat(tokens, 1)
        if given:
            text = torch.ones(tokens[0].shape[:2], dtype=torch.bool, device=tokens[0].device)
            arguments["encoder_attention_mask"] = torch.cat([text, torch.stack(given, 1)], 1)
        return arguments

    def joint_features(self, poses: Tensor, text: Tensor, images: Tensor | None) -> Tensor:
        """Features (B, F) of poses (B, 5), text (B, T, D) and image embeddings (B, E); missing are zeros."""
        parts = [pose_features(poses.nan_to_num(0.0)).to(text.dtype), text.mean(1)]
        if self.options.image_dim is not None:
            missing = text.new_zeros(len(text), self.options.image_dim)
            parts.append(missing if images is None else images.nan_to_num(0.0).to(text.dtype))
        return torch.cat(parts, 1)


@final
class MultiViewUNet(UNet2DConditionModel):
    """The stock U-Net with `view_conditions`; called without them it computes what the stock one does."""

    view_conditions: ViewConditions

    def add_view_conditions(self, options: ViewConditionOptions) -> "MultiViewUNet":
        """Add the untrained layers, and attention over groups of views; returns itself."""
        time_dim = self.time_embedding.linear_2.out_features
        self.view_conditions = ViewConditions(options, self.config.cross_attention_dim, time_dim)
        self.set_attn_processor(GroupAttention())
        return self

    def get_aug_embed(
        self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor | None:
        """The poses' part (B, D) of the time embedding, where diffusers adds those of SDXL."""
        return (added_cond_kwargs or {}).get(POSE_EMBEDDING)

    def stock(self) -> UNet2DConditionModel:
        """A stock U-Net with copies of the weights, without view conditions."""
        unet = UNet2DConditionModel.from_config(self.config)
        unet.load_state_dict(
            {name: value for name, value in self.state_dict().items() if not name.startswith(PREFIX)}
        )
        return unet.to(self.dtype)


class GroupAttention(AttnProcessor2_0):
    """Self-attention over all positions of `views` consecutive rows; cross-attention row by row."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        views: int = 1,
    ) -> Tensor:
        """As of diffusers' processors, for hidden states (B, positions, C)."""
        if encoder_hidden_states is not None or views == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        joined = hidden_states.reshape(len(hidden_states) // views, -1, hidden_states.shape[-1])
        return super().__call__(attn, joined, None, attention_mask, temb).view_as(hidden_states)


def with_reference_rows(
    x_t: Tensor, t: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor, Conditioning]:
    """Every group of V views preceded by its picture without noise at time 0: groups of V + 1 rows.

    A picture of NaN is none: its row is zeros at the time `LAST_TIME`, of which nothing can be learnt. It
    stands for the condition in the unconditional branch of classifier-free guidance.
    """
    views = conditioning.views
    extras = dict(conditioning.extras)
    picture, pose = extras.pop(REFERENCE), extras.pop(REFERENCE_POSE)
    missing = picture.isnan().flatten(1).any(1)
    picture = picture.masked_fill(missing[:, None, None, None], 0.0)

    def prepend(values: Tensor, first: Tensor) -> Tensor:
        groups, firsts = values.unflatten(0, (-1, views)), first.unflatten(0, (-1, views))[:, :1]
        return torch.cat([firsts.to(values.dtype), groups], 1).flatten(0, 1)

    joined = {name: prepend(value, pose if name == POSE else value) for name, value in extras.items()}
    embedding = prepend(conditioning.embedding, conditioning.embedding)
    x_t, t = prepend(x_t, picture), prepend(t, LAST_TIME * missing.to(t.dtype))
    return x_t, t, Conditioning(embedding, joined, views + 1)


def without_reference_rows(values: Tensor, views: int) -> Tensor:
    """The rows (B, ...) of the V views, without those of the pictures that precede them."""
    return values.unflatten(0, (-1, views + 1))[:, 1:].flatten(0, 1)


def save_view_conditions(folder: Path, unet: MultiViewUNet) -> None:
    """Write the layers that a stock U-Net has not, in fp16, to `folder`/view_conditions."""
    weights = {name: value.half().contiguous() for name, value in unet.view_conditions.state_dict().items()}
    with atomic_path(folder / FOLDER / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(folder / FOLDER / "config.json", asdict(unet.view_conditions.options))


def load_view_conditions(folder: Path, stock: UNet2DConditionModel) -> UNet2DConditionModel:
    """The multi-view U-Net of a stock one and of `folder`/view_conditions; the stock one where it has none.

    Raises `UserError` where the layers are damaged or fit another U-Net.
    """
    path = folder / FOLDER
    if not (path / "config.json").is_file():
        return stock
    unet = MultiViewUNet.from_config(stock.config)
    unet.load_state_dict(stock.state_dict())
    try:
        options = build(ViewConditionOptions, read_json(path / "config.json"), str(path))
        unet.add_view_conditions(options).view_conditions.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} does not fit the U-Net beside it ({reason}): copy the whole folder"
        ) from None
    return unet.to(stock.device, stock.dtype)
