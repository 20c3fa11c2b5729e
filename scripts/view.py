"""A run in the browser, while it trains and after.

python scripts/view.py run_directory=outputs/text_to_3d/a-red-teapot-seed0
Needs viser: pip install -e ".[viewer]"
"""

from dataclasses import dataclass, field

from entry import entry

from distill.runtime.precision import PrecisionName, pick_precision
from sds3d.viewer import Viewer, ViewerOptions


@dataclass(frozen=True, kw_only=True)
class Config:
    """The scene that a run saved last (run.checkpoint_every)."""

    run_directory: str  # of a text_to_3d run, finished or not
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the teacher; auto: bfloat16 on CUDA, float32 on a CPU
    viewer: ViewerOptions = field(default_factory=ViewerOptions)


def main(config: Config) -> None:
    precision = pick_precision(config.device, config.precision)
    Viewer(config.run_directory, config.viewer, precision).serve()


if __name__ == "__main__":
    entry("view", Config, main)
