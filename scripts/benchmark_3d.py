"""Text to 3-D against the true meshes: python scripts/benchmark_3d.py suite=tiny"""

from pathlib import Path
from typing import Any

from entry import entry
from text_to_3d import main as text_to_3d


def main(config: dict[str, Any]) -> None:
    from distill.evaluation.ablation.images import Graders
    from distill.evaluation.judge import load_judge
    from distill.runtime.errors import UserError
    from distill.runtime.files import read_json
    from distill.runtime.machine import machine_facts
    from distill.teacher.folder import load_clip
    from distill.teacher.latent import Teacher
    from sds3d.evaluation.benchmark import TINY, averages, full_suite, grade_run, paired, run_suite, truth_of
    from sds3d.evaluation.page import save_page

    suites = {"tiny": TINY, "full": full_suite()}
    if config["suite"] not in suites:
        raise UserError(f"suite is {config['suite']!r}: expected tiny or full")
    prompts = config["prompts"] or suites[config["suite"]]
    for prompt in prompts:
        truth_of(prompt)  # before anything is made
    teacher, folder = Teacher.load(config["teacher"]), Path(config["output"])
    graders = Graders(load_clip(teacher.place), load_judge(config["judge"]))
    before = None if config["compare"] is None else read_json(Path(config["compare"]) / "rows.json")["rows"]

    def make(prompt: str, directory: Path) -> None:
        options = {**config["text_to_3d"], "prompt": prompt}
        run = {**config["run"], "directory": str(directory)}
        own = {
            key: value
            for key, value in config.items()
            if key not in ("suite", "prompts", "output", "compare", "judge")
        }
        text_to_3d({**own, "prompt": prompt, "text_to_3d": options, "run": run})

    rows = run_suite(
        prompts, folder, make, lambda directory, prompt: grade_run(directory, prompt, teacher, graders)
    )
    compared = {} if before is None else paired(before, rows)
    save_page(folder, f"Text to 3-D, suite {config['suite']}", rows, machine_facts(), compared)
    for name, (mean, width) in averages(rows).items():
        print(f"{name:20} {mean:8.3f} +- {width:.3f}")
    print(f"written: {folder}: index.html, rows.json")


if __name__ == "__main__":
    entry("benchmark_3d", main)
