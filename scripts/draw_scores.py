"""Draw the densities and scores of a Gaussian mixture at growing noise levels.

python scripts/draw_scores.py
Of one class: python scripts/draw_scores.py scores.label=c1 "scores.sigmas=[0.1, 0.3, 0.9]"
"""

from dataclasses import dataclass, field

from entry import entry

from distill.apps.score_field import ScoreFieldOptions, draw_score_field
from distill.runtime.files import atomic_path


@dataclass(frozen=True, kw_only=True)
class Config:
    """A picture of exact scores."""

    output: str = "outputs/scores.png"
    scores: ScoreFieldOptions = field(default_factory=ScoreFieldOptions)


def main(config: Config) -> None:
    image = draw_score_field(config.scores)
    with atomic_path(config.output) as temporary:
        image.save(temporary, "png")
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("draw_scores", Config, main)
