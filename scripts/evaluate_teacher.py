"""Grade one or several teachers on a test split, on the same captions and noise seeds.

python scripts/evaluate_teacher.py teacher=shapes64 data=outputs/shapes64
Any captioned folder: python scripts/evaluate_teacher.py data=photos labels=none judge=null

At full size, beside each other: python scripts/evaluate_teacher.py "teachers=[shapes64, outputs/t/teacher]"
data=outputs/held_out reference=outputs/held_out limit=6000 pair_judge=outputs/judge_pairs/judge
evaluation.samples=5000 evaluation.steps=50 "evaluation.guidance=[1, 2, 3]"
Its data: python scripts/make_shapes.py output=outputs/held_out world.train=0 world.validation=0
world.test=12000 world.seed=2026
"""

from dataclasses import dataclass

from entry import entry

from distill.evaluation.teacher_run import TeacherEvaluation, run_teacher_evaluation


@dataclass(frozen=True, kw_only=True)
class Config(TeacherEvaluation):
    """Teachers, a test split, and what grades samples; rows are kept, so that a run resumes."""


def main(config: Config) -> None:
    print(run_teacher_evaluation(config))
    print(f"written: {config.output}: evaluation.json, samples.png")


if __name__ == "__main__":
    entry("evaluate_teacher", Config, main)
