"""Text to 3-D, and image to 3-D, against the true meshes.

python scripts/benchmark_3d.py suite=tiny (or quick, full, images; any option of text_to_3d.py)
"""

from dataclasses import dataclass

from entry import entry

from sds3d.evaluation.benchmark_run import run_benchmark
from sds3d.evaluation.subjects import SuiteName
from sds3d.text_to_3d.recipe import TextTo3dRecipe


@dataclass(frozen=True, kw_only=True)
class Config(TextTo3dRecipe):
    """A run per prompt or picture and seed, graded."""

    # tiny: 5 prompts; quick: 8 others with seeds from 100 on, to choose a recipe by; full: every object of
    # the world once, and pairs; images: pictures of every object, and of 30 shapes that no teacher has seen
    suite: SuiteName = "tiny"
    prompts: tuple[str, ...] | None = None  # in place of a suite: about the world, or 'picture of a red cube'
    seeds: int | None = None  # runs of each prompt, from run.seed on; null: 3 of full, 2 of quick, else 1
    output: str
    judge: str = "judge64"
    compare: str | None = None  # another benchmark's output, for paired differences to it


def main(config: Config) -> None:
    means = run_benchmark(
        config, config.suite, config.prompts, config.output, config.judge, config.compare, config.seeds
    )
    for name, (mean, width) in means.items():
        print(f"{name:28} {mean:8.3f} +- {width:.3f}")
    print(f"written: {config.output}: index.html, rows.json")


if __name__ == "__main__":
    entry("benchmark_3d", Config, main)
