"""Pairs of noise and the teacher's DDIM image of it, for DMD's regression.

python scripts/make_pairs.py
"""

from dataclasses import dataclass, field

from entry import entry

from distill.data.folders import read_rows, rows_with_paths
from distill.one_step.regression import PairOptions, make_pairs
from distill.runtime.precision import PrecisionName, pick_precision
from distill.teacher.load import load_teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shards of pairs, caption by caption; shards that exist are kept."""

    teacher: str = "shapes64"
    data: str = "outputs/shapes64"  # whose training captions are used
    output: str = "outputs/pairs"
    device: str = "auto"  # auto: cuda when there is one
    precision: PrecisionName = "auto"  # of the networks; auto: bfloat16 on CUDA, float32 on a CPU
    pairs: PairOptions = field(default_factory=PairOptions)


def main(config: Config) -> None:
    precision = pick_precision(config.device, config.precision)
    teacher = load_teacher(config.teacher, precision.device, precision.dtype)
    split = f"{config.data}/train"
    rows = rows_with_paths(split, read_rows(split)[: config.pairs.count])
    prompts = [teacher.prompt_of(row) for row in rows]
    folder = make_pairs(teacher, prompts, config.output, config.pairs)
    print(f"written: {folder}: {config.pairs.count} pairs")


if __name__ == "__main__":
    entry("make_pairs", Config, main)
