"""Text to 3-D against the true meshes.

python scripts/benchmark_3d.py suite=tiny (or full; any option of text_to_3d.py)
"""

from dataclasses import dataclass
from typing import Literal

from entry import entry

from sds3d.evaluation.benchmark_run import run_benchmark
from sds3d.text_to_3d.recipe import TextTo3dRecipe


@dataclass(frozen=True, kw_only=True)
class Config(TextTo3dRecipe):
    """A text-to-3D run per prompt, graded."""

    suite: Literal["tiny", "full"] = "tiny"  # 5 prompts; full: every object of the world once, and pairs
    prompts: tuple[str, ...] | None = None  # in place of a suite: prompts about the world's objects
    output: str
    judge: str = "judge64"
    compare: str | None = None  # another benchmark's output, for paired differences to it


def main(config: Config) -> None:
    means = run_benchmark(config, config.suite, config.prompts, config.output, config.judge, config.compare)
    for name, (mean, width) in means.items():
        print(f"{name:20} {mean:8.3f} +- {width:.3f}")
    print(f"written: {config.output}: index.html, rows.json")


if __name__ == "__main__":
    entry("benchmark_3d", Config, main)
