"""The NeRF: field, occupancy grid and background, rendered through cameras."""

import dataclasses
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.background import Background, BackgroundOptions
from sds3d.scene.cameras import Cameras
from sds3d.scene.compositing import RenderedRays
from sds3d.scene.field import Field, FieldOptions, surface_colours
from sds3d.scene.occupancy import OccupancyGrid
from sds3d.scene.protocol import (
    ExtractedMesh,
    MeshOptions,
    ParameterGroup,
    RenderedViews,
    Scene3D,
    SceneOptions,
)
from sds3d.scene.regularizers import RegularizerOptions, opacity_regularization, ray_regularization
from sds3d.scene.renderer import RenderOptions, render
from sds3d.scene.shading import PointLights

CHUNK = 2**14  # rays rendered at once without gradients, which bounds the memory


@dataclass(frozen=True)
class GridOptions:
    """The occupancy grid. Raises `UserError` for a value out of range."""

    resolution: int = 48  # cells a side
    every: int = 16  # steps between updates
    decay: float = 0.9  # of the density maximum, per update
    threshold: float = 0.01  # opacity below which a cell is empty

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.decay <= 1 or self.threshold <= 0:
            raise UserError(
                f"grid every {self.every}, decay {self.decay}, threshold {self.threshold}: every must be at "
                "least 1, decay from 0 to 1 and threshold positive"
            )


@final
@dataclass(frozen=True)
class NerfOptions(SceneOptions):
    """All choices that define a NeRF."""

    field: FieldOptions = dataclasses.field(default_factory=FieldOptions)
    grid: GridOptions = dataclasses.field(default_factory=GridOptions)
    render: RenderOptions = dataclasses.field(default_factory=RenderOptions)
    background: BackgroundOptions = dataclasses.field(default_factory=BackgroundOptions)

    def build(self, device: torch.device | str = "cpu") -> "NeRF":
        """A new NeRF on `device`."""
        return NeRF(self, device)


@final
@dataclass(frozen=True)
class NerfViews(RenderedViews):
    """Images of B cameras with the rays they consist of, and in training the samples on these."""

    directions: Tensor  # (B * H * W, 3) unit
    rays: RenderedRays | None  # in training only

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """`rgb` twice, with a gradient to the density only, and to the albedo only; for views of training."""
        assert self.rays is not None
        count, _, height, width = self.rgb.shape
        rgb_density_grad, rgb_albedo_grad = (
            rgb.view(count, height, width, 3).permute(0, 3, 1, 2) for rgb in self.rays.split_gradients()
        )
        return rgb_density_grad, rgb_albedo_grad


@final
class NeRF(Scene3D):
    """A radiance field without view dependence (Mildenhall et al. 2020; encoding: Mueller et al. 2022)."""

    options: NerfOptions

    def __init__(self, options: NerfOptions, device: torch.device | str = "cpu") -> None:
        super().__init__(options)
        self.field = Field(options.field, device)
        grid = options.grid
        self.grid = OccupancyGrid(grid.resolution, grid.decay, grid.threshold).to(device)
        self.background = Background(options.background).to(device)

    def update(self, step: int, generator: torch.Generator | None = None) -> None:
        """Unlock the encoding's levels of `step`; update the grid when it is a multiple of its interval."""
        self.field.unlock_levels(step)
        if step % self.options.grid.every == 0:
            self.grid.update(self.field, generator)

    def rotate(self, quarter_turns: int) -> None:
        """Rotate field and grid about the vertical, by 90 degrees a quarter turn."""
        self.field.rotate(quarter_turns)
        self.grid.rotate(quarter_turns)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoding's features, then all MLP weights."""
        encoding = list(self.field.encoding.parameters())
        ids = {id(parameter) for parameter in encoding}
        mlps = [parameter for parameter in self.parameters() if id(parameter) not in ids]
        return [ParameterGroup("encoding", "explicit", encoding), ParameterGroup("mlps", "mlp", mlps)]

    def regularization(
        self, views: RenderedViews, options: RegularizerOptions, progress: float, generator: torch.Generator
    ) -> Tensor:
        """The weighted sum of all terms in `options`, for views rendered in training."""
        assert isinstance(views, NerfViews) and views.rays is not None
        total = opacity_regularization(views.opacity, options, progress)
        for term in ray_regularization(
            self.field, views.rays, views.directions, options, progress, generator
        ):
            total = total + term
        return total

    def extract_mesh(self, options: MeshOptions) -> ExtractedMesh:
        """An isosurface of the density. Raises `UserError` for an empty or diverged scene."""
        from sds3d.export.mesh import extract_isosurface

        return extract_isosurface(self, self.field.density, options)

    @torch.no_grad()
    def surface_colours(self, points: Tensor, normals: Tensor, spacing: float) -> Tensor:
        """Colours along short rays against the normals, in steps of `spacing`."""
        return surface_colours(self.field, points, normals, spacing, self.device)

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
        normals: bool = False,
        lights: PointLights | None = None,
    ) -> NerfViews:
        """Images through `cameras` over `background` (B, 3), or over the scene's own, lit by B `lights`.

        Training renders with samples jittered by `generator`, and in chunks as the options say; otherwise
        rays go in chunks, without jitter. Normals cost four more field evaluations a visible sample.
        """
        origins, directions = (value.to(self.device) for value in cameras.rays())
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        pixels = cameras.resolution**2
        if background is not None:
            background = background.to(directions)[:, None].expand(-1, pixels, -1).reshape(-1, 3)
        if lights is not None:
            lights = lights.to(self.device).repeat_interleave(pixels)

        with torch.set_grad_enabled(training):
            rays = None
            if training:
                rays = self._rays(origins, directions, background, generator, lights, normals)
                values = _pixel_values(rays)
            else:
                values = self._render_chunks(origins, directions, background, lights, normals)

        images = values.view(len(cameras), cameras.resolution, cameras.resolution, -1).permute(0, 3, 1, 2)
        normal = images[:, 5:8] if normals else None
        return NerfViews(images[:, :3], images[:, 3:4], images[:, 4:5], normal, directions, rays)

    def _rays(
        self,
        origins: Tensor,
        directions: Tensor,
        background: Tensor | None,
        generator: torch.Generator | None,
        lights: PointLights | None,
        normals: bool,
    ) -> RenderedRays:
        background = self.background(directions) if background is None else background
        options = self.options.render
        return render(
            self.field, self.grid, origins, directions, background, options, generator, lights, normals
        )

    def _render_chunks(
        self,
        origins: Tensor,
        directions: Tensor,
        background: Tensor | None,
        lights: PointLights | None,
        normals: bool,
    ) -> Tensor:
        values = []
        for first in range(0, len(origins), CHUNK):
            part = slice(first, first + CHUNK)
            over = None if background is None else background[part]
            lit = None if lights is None else lights.select(part)
            rays = self._rays(origins[part], directions[part], over, None, lit, normals)
            values.append(_pixel_values(rays))
        return torch.cat(values)


def _pixel_values(rays: RenderedRays) -> Tensor:
    """Colour, opacity, depth and, where rendered, normals side by side: (R, 5 or 8)."""
    values = [rays.rgb, rays.opacity[:, None], rays.depth[:, None]]
    return torch.cat(values if rays.normal is None else [*values, rays.normal], dim=1)
