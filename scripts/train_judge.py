"""Train and save a judge.

judge64, of single objects: python scripts/train_judge.py
Its data: python scripts/make_shapes.py output=outputs/judge_world world.train=24000 world.seed=1000
world.random_light=true world.pairs=0 world.hold_out=false

pairs64, of pairs and of the azimuth of single objects (see configs/attributes/pairs.yaml):
python scripts/make_shapes.py output=outputs/pairs_world world.train=64000 world.validation=0 world.seed=2000
world.pairs=1 world.hold_out=false
python scripts/make_shapes.py output=outputs/azimuth_world world.train=48000 world.validation=0
world.seed=3000 world.pairs=0 world.random_light=true world.hold_out=false
python scripts/train_judge.py attributes=pairs "data=[outputs/pairs_world, outputs/azimuth_world]"
initial=judge64 run.directory=outputs/judge_pairs run.steps=30000
"""

import json
from dataclasses import dataclass

from entry import entry

from distill.evaluation.judge_run import JudgeRecipe, run_judge


@dataclass(frozen=True, kw_only=True)
class Config(JudgeRecipe):
    """An independent classifier of renders, which trains and guides nothing."""


def main(config: Config) -> None:
    print(json.dumps(run_judge(config), indent=2))
    print(f"written: {config.run.directory}/judge")


if __name__ == "__main__":
    entry("train_judge", Config, main)
