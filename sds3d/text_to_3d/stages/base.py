"""A stage of a text-to-3D run: updates the scene in some of its steps, or intervenes before a step."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from distill.runtime.checkpoint import Stateful
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.context import TextTo3dContext


class Stage(ABC):
    """What a stage does in one run. A stage that never updates, such as a check, leaves `update` as it is."""

    def before_step(self, step: int) -> None:  # noqa: B027  a hook
        """Called before every step's update, whichever stage does it; stages in the order of their list."""

    def update(self, step: int, progress: float) -> RenderedViews:
        """One update of the scene; returns the views it was computed from.

        `progress` in [0, 1) is the fraction of this stage's own updates that are done.
        """
        raise NotImplementedError(f"{type(self).__name__} updates nothing")

    def state(self) -> Mapping[str, Stateful]:
        """What checkpoints must hold of the stage, by name."""
        return {}

    @abstractmethod
    def nfe(self, updates: int) -> int:
        """NFE of the teacher, in samples, over a run in which the stage does so many updates."""


@dataclass(frozen=True)
class StageOptions(ABC):
    """A stage's options, which build the stage. Fractions are of the whole run, in [0, 1]."""

    @property
    def updates_from(self) -> float | None:
        """From when on the stage updates the scene, in place of the stages listed before it; None: never."""
        return None

    @property
    def rotates_at(self) -> tuple[float, ...]:
        """When the stage may rotate the scene."""
        return ()

    @property
    def fixed_pose_from(self) -> float | None:
        """From when on the stage relies on the scene's pose; None: it never does."""
        return None

    @property
    def shape_from_views(self) -> bool:
        """Whether the shape is that of views sampled from noise, which only their cameras make agree."""
        return False

    @abstractmethod
    def build(self, context: TextTo3dContext) -> Stage:
        """The stage of a run."""
