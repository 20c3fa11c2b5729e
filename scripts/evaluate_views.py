"""Grade a teacher that is conditioned on cameras: azimuths, groups of views, novel views of a picture.

python scripts/evaluate_views.py teacher=outputs/teacher/teacher judge=outputs/judge_pairs/judge
Without a judge of azimuths (scripts/train_judge.py attributes=pairs) they are left out.
"""

import json
from dataclasses import dataclass

from entry import entry

from sds3d.evaluation.views.run import ViewEvaluation, run_view_evaluation


@dataclass(frozen=True, kw_only=True)
class Config(ViewEvaluation):
    """A teacher of cameras against the true views of the world's objects; results resume by ability."""


def main(config: Config) -> None:
    print(json.dumps(run_view_evaluation(config), indent=2))
    print(f"written: {config.output}: evaluation.json, *.png")


if __name__ == "__main__":
    entry("evaluate_views", Config, main)
