"""Train and save the judge: python scripts/train_judge.py data=outputs/judge_world"""

import json
from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.data.folders import load_split
    from distill.evaluation.judge import JudgeOptions, accuracy, save_judge, train_judge
    from distill.runtime.config import build
    from distill.runtime.run import Run, RunOptions

    options = build(JudgeOptions, config["judge"], "judge")
    train, test = (load_split(config["data"], split) for split in ("train", "test"))
    run = Run(build(RunOptions, config["run"], "run"), config, "judge")
    judge = train_judge(run, train, options)
    figures = {"test": accuracy(judge, test)}
    save_judge(judge, run.directory / "judge", figures)
    run.finish(figures)
    print(json.dumps(figures, indent=2))
    print(f"written: {run.directory}/judge")


if __name__ == "__main__":
    entry("train_judge", main)
