"""The NeRF that is optimised: field, occupancy grid and background, rendered through cameras, saved as a
folder."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path
from sds3d.scene.cameras import Cameras
from sds3d.scene.field import Field, FieldOptions
from sds3d.scene.occupancy import OccupancyGrid
from sds3d.scene.renderer import Rendered, RenderOptions, render

FORMAT = "sds3d-scene-1"


@dataclass(frozen=True)
class BackgroundOptions:
    """What lies behind the scene: a `fixed` colour, a learned `constant`, or a learned `mlp` of the ray's
    direction."""

    kind: Literal["fixed", "constant", "mlp"] = "fixed"
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)  # RGB in [0, 1]; where a learned one starts
    width: int = 16  # of the MLP's hidden layer

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "constant", "mlp"):
            raise UserError(f"background kind is '{self.kind}': use fixed, constant or mlp")
        if len(self.colour) != 3 or not all(0 <= value <= 1 for value in self.colour):
            raise UserError(f"background colour is {self.colour}: give three numbers from 0 to 1")


@dataclass(frozen=True)
class GridOptions:
    """The occupancy grid: cells a side, steps between updates, decay per update, opacity of a cell that
    counts as empty.

    Raises `UserError` for a value out of range.
    """

    resolution: int = 48
    every: int = 16
    decay: float = 0.9
    threshold: float = 0.01

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay <= 1 or self.threshold <= 0:
            raise UserError(
                f"grid every {self.every}, decay {self.decay}, threshold {self.threshold}: every must be at "
                "least 1, decay from 0 to 1 and threshold positive"
            )


@dataclass(frozen=True)
class SceneOptions:
    """All choices that make a scene; saved beside its weights."""

    field: FieldOptions = dataclasses.field(default_factory=FieldOptions)
    grid: GridOptions = dataclasses.field(default_factory=GridOptions)
    render: RenderOptions = dataclasses.field(default_factory=RenderOptions)
    background: BackgroundOptions = dataclasses.field(default_factory=BackgroundOptions)


@dataclass(frozen=True)
class RenderedViews:
    """Images of B cameras. `rendered` holds the samples behind them (all rays, row by row) when rendered for
    training."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    opacity: Tensor  # (B, 1, H, W)
    depth: Tensor  # (B, 1, H, W) world units along the ray, 0 where nothing is
    normal: Tensor | None  # (B, 3, H, W) world space, length <= 1: weighted by opacity
    rendered: Rendered | None
    directions: Tensor  # (B * H * W, 3) unit

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """`rgb` twice, with a gradient to the density only and to the albedo only. For views rendered in training."""
        assert self.rendered is not None
        count, _, height, width = self.rgb.shape
        shaped, painted = (
            part.view(count, height, width, 3).permute(0, 3, 1, 2) for part in self.rendered.split_gradients()
        )
        return shaped, painted


class Background(nn.Module):
    """Colours behind the scene, for directions (R, 3) -> (R, 3) in [0, 1]."""

    def __init__(self, options: BackgroundOptions) -> None:
        super().__init__()
        self.kind = options.kind
        colour = torch.tensor(options.colour, dtype=torch.float32)
        if options.kind == "fixed":
            self.register_buffer("colour", colour)
            return
        logit = colour.clamp(0.02, 0.98).logit()
        if options.kind == "constant":
            self.logit = nn.Parameter(logit)
            return
        self.mlp = nn.Sequential(nn.Linear(3, options.width), nn.ReLU(), nn.Linear(options.width, 3))
        nn.init.zeros_(self.mlp[2].weight)
        self.mlp[2].bias.data.copy_(logit)

    def forward(self, directions: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.mlp(directions).sigmoid()
        colour = self.colour if self.kind == "fixed" else self.logit.sigmoid()
        return colour.expand_as(directions)


class Scene(nn.Module):
    """A NeRF in the box [-1, 1]^3. `update` it as training goes on, `render` it, `save` and `load` it."""

    def __init__(self, options: SceneOptions, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.options = options
        self.field = Field(options.field, device)
        self.grid = OccupancyGrid(options.grid.resolution, options.grid.decay, options.grid.threshold).to(
            device
        )
        self.background = Background(options.background).to(device)

    @property
    def device(self) -> torch.device:
        return self.grid.levels.device

    def update(self, step: int, generator: torch.Generator | None = None) -> None:
        """Refresh the occupancy grid when `step` is a multiple of its interval. Call before rendering step
        `step`."""
        if step % self.options.grid.every == 0:
            self.grid.update(self.field, generator)

    def turn_by(self, quarters: int) -> None:
        """Turn what is there about the vertical by quarters: what a camera at azimuth a saw is seen from a + 90 degrees each."""
        self.field.turn_by(quarters)
        self.grid.turn_by(quarters)

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
        normals: bool = False,
    ) -> RenderedViews:
        """Images through `cameras`; `background` (B, 3) replaces the scene's own, as background augmentation
        does.

        Training renders all rays at once, with gradients and with samples jittered by `generator`; otherwise
        rays go in chunks, without gradients and without jitter. `normals` are rendered only where they are
        asked for (four more evaluations a sample).
        """
        origins, directions = (value.to(self.device) for value in cameras.rays())
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        behind = None if background is None else background.to(directions)
        if behind is not None:
            behind = behind[:, None].expand(-1, cameras.resolution**2, -1).reshape(-1, 3)
        with torch.set_grad_enabled(training):
            if training:
                rendered = self._rays(origins, directions, behind, generator)
                images = self._layers(rendered, normals)
            else:
                rendered = None
                images = self._chunks(origins, directions, behind, normals)
        maps = images.view(len(cameras), cameras.resolution, cameras.resolution, -1).permute(0, 3, 1, 2)
        normal = maps[:, 5:8] if normals else None
        return RenderedViews(maps[:, :3], maps[:, 3:4], maps[:, 4:5], normal, rendered, directions)

    def _rays(
        self, origins: Tensor, directions: Tensor, behind: Tensor | None, generator: torch.Generator | None
    ) -> Rendered:
        behind = self.background(directions) if behind is None else behind
        return render(self.field, self.grid, origins, directions, behind, self.options.render, generator)

    def _chunks(
        self, origins: Tensor, directions: Tensor, behind: Tensor | None, normals: bool, size: int = 2**14
    ) -> Tensor:
        behinds = [None] * -(-len(origins) // size) if behind is None else behind.split(size)
        parts = zip(origins.split(size), directions.split(size), behinds)
        return torch.cat([self._layers(self._rays(o, d, b, None), normals) for o, d, b in parts])

    def _layers(self, rendered: Rendered, normals: bool) -> Tensor:
        """Colour, opacity, depth and, where asked for, normals side by side: (R, 5 or 8)."""
        layers = [rendered.rgb, rendered.opacity[:, None], rendered.depth[:, None]]
        if normals:
            layers.append(rendered.gather(self._normals(rendered)))
        return torch.cat(layers, dim=1)

    def _normals(self, rendered: Rendered, least: float = 1e-3) -> Tensor:
        """Normals (M, 3) of the samples that weigh more than `least`; zero for the others, which no pixel
        shows."""
        shown = (rendered.weights > least).nonzero().squeeze(1)
        normal = self.field.normal(rendered.points[shown])
        return torch.zeros_like(rendered.points).index_copy(0, shown, normal)

    def save(self, folder: Path | str) -> None:
        """Write scene.safetensors (weights and grid) and scene.json (options) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_path(folder / "scene.safetensors") as path:
            save_file(tensors, str(path), metadata={"format": FORMAT})
        with atomic_path(folder / "scene.json") as path:
            path.write_text(
                json.dumps({"format": FORMAT, "options": dataclasses.asdict(self.options)}, indent=2) + "\n"
            )

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "Scene":
        """The scene saved in `folder`. Raises `UserError` where that is no such folder, or a damaged one."""
        folder = Path(folder)
        hint = "give a folder written by Scene.save (scene.json and scene.safetensors)"
        try:
            content = json.loads((folder / "scene.json").read_text())
            if content.get("format") != FORMAT:
                raise UserError(
                    f"{folder / 'scene.json'} has format {content.get('format')!r}, not {FORMAT!r}: {hint}"
                )
            scene = cls(build(SceneOptions, content["options"], "options"), device)
            scene.load_state_dict(load_file(str(folder / "scene.safetensors"), device=str(device)))
        except UserError:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise UserError(f"{folder} holds no scene ({str(error).splitlines()[0]}): {hint}") from error
        return scene
