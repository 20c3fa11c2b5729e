"""The benchmark from its options to its page: a run per prompt or picture and seed, each graded."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.evaluation.graders import load_graders
from distill.runtime.config import as_mapping
from distill.runtime.files import read_json
from distill.runtime.machine import machine_info, pick_device
from distill.runtime.names import slug
from distill.teacher.load import load_teacher
from distill.teacher.pictures import check_takes_pictures
from sds3d.evaluation.benchmark import averages, grade_run, paired, run_suite
from sds3d.evaluation.page import means_by_group, save_page
from sds3d.evaluation.subjects import Subject, SuiteName, suite_of
from sds3d.text_to_3d.recipe import TextTo3dRecipe, run_text_to_3d


def for_subject(recipe: TextTo3dRecipe, subject: Subject, seed: int, directory: Path | str) -> TextTo3dRecipe:
    """The recipe for one prompt or picture, without the options that a subclass adds."""
    prompt = "" if subject.is_picture else subject.name
    return TextTo3dRecipe(
        prompt=prompt,
        image=str(picture_path(Path(directory), subject)) if subject.is_picture else None,
        teacher=recipe.teacher,
        autoencoder=recipe.autoencoder,
        run=replace(recipe.run, directory=str(directory), seed=seed),
        text_to_3d=replace(recipe.text_to_3d, prompt=prompt),
        image_to_3d=recipe.image_to_3d,
        caption=recipe.caption,
        scene=recipe.scene,
        objective=recipe.objective,
        control=recipe.control,
        export=recipe.export,
    )


def picture_path(directory: Path, subject: Subject) -> Path:
    """The picture of a run in `directory`, beside the runs: those of all seeds have the same."""
    return directory.parent / "pictures" / f"{slug(subject.name)}.png"


def run_benchmark(
    recipe: TextTo3dRecipe,
    suite: SuiteName,
    prompts: Sequence[str] | None,
    output: Path | str,
    judge: str,
    compare: Path | str | None = None,
    seeds: int | None = None,
) -> dict[str, tuple[float, float]]:
    """Run and grade what has no row in `output` yet, and write the page; returns means and intervals.

    prompts: in place of the suite's. seeds: of each prompt, from `run.seed` on, by default as many as the
    suite has. compare: the output of another benchmark. Raises `UserError` before the first run for a prompt
    that is not about the world.
    """
    chosen = suite_of(suite, seeds, tuple(prompts) if prompts else None)
    chosen = replace(chosen, seeds=tuple(recipe.run.seed + seed for seed in chosen.seeds))
    subjects = [Subject(name) for name in chosen.names]
    for subject in subjects:
        subject.check()
    # On the CPU: what is needed of it is a name and a resolution.
    teacher, folder, device = load_teacher(recipe.teacher), Path(output), pick_device(recipe.run.device)
    if any(subject.is_picture for subject in subjects):
        check_takes_pictures(teacher)
    graders = load_graders(teacher.name_or_path, judge, device=device)
    before = None if compare is None else read_json(Path(compare) / "rows.json")["rows"]

    def compute(subject: Subject, seed: int, directory: Path) -> dict[str, Any]:
        if subject.is_picture:
            subject.save_picture(picture_path(directory, subject))
        run_text_to_3d(for_subject(recipe, subject, seed, directory))
        return grade_run(directory, subject, teacher.resolution, graders, device)

    options = json.dumps(as_mapping(for_subject(recipe, Subject(""), 0, "")), sort_keys=True)
    query = {"options": hashlib.sha256(options.encode()).hexdigest()[:16], "judge": judge}
    rows = run_suite(chosen, folder, query, compute)
    differences = {} if before is None else paired(before, rows)
    title = f"{'Image' if suite == 'images' else 'Text'}-to-3D, suite {suite}"
    save_page(folder, title, rows, machine_info(), differences)
    groups = means_by_group(rows)
    if not groups:
        return averages(rows)
    return {f"{group}: {name}": value for group, means in groups.items() for name, value in means.items()}
