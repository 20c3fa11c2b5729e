"""Train and save the judge.

python scripts/train_judge.py data=outputs/judge_world
Its data: python scripts/make_shapes.py output=outputs/judge_world world.train=24000 world.seed=1000
world.random_light=true world.pairs=0 world.hold_out=false
"""

import json
from dataclasses import dataclass

from entry import entry

from distill.data.folders import load_split
from distill.evaluation.judge import JudgeOptions, save_judge, train_judge
from distill.evaluation.labels import judge_accuracy
from distill.runtime.config import as_mapping
from distill.runtime.run import Run, RunOptions


@dataclass(frozen=True, kw_only=True)
class Config:
    """An independent classifier of renders, which trains and guides nothing."""

    run: RunOptions
    data: str = "outputs/judge_world"
    judge: JudgeOptions


def main(config: Config) -> None:
    train, test = (load_split(config.data, split) for split in ("train", "test"))
    run = Run(config.run, as_mapping(config), "judge")
    judge = train_judge(run, train, config.judge)
    metrics = {"test": judge_accuracy(judge, test.composite(slice(None)), test.rows)}
    save_judge(judge, run.directory / "judge", metrics)
    run.finish(metrics)
    print(json.dumps(metrics, indent=2))
    print(f"written: {run.directory}/judge")


if __name__ == "__main__":
    entry("train_judge", Config, main)
