"""The benchmark from its options to its page: a text-to-3D run per prompt, graded against the true mesh."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from distill.evaluation.graders import load_graders
from distill.runtime.config import as_mapping
from distill.runtime.files import read_json
from distill.runtime.machine import machine_info, pick_device
from distill.teacher.load import load_teacher
from sds3d.evaluation.benchmark import TINY, averages, full_suite, grade_run, paired, run_suite, truth_of
from sds3d.evaluation.page import save_page
from sds3d.text_to_3d.recipe import TextTo3dRecipe, run_text_to_3d


def for_prompt(recipe: TextTo3dRecipe, prompt: str, directory: Path | str) -> TextTo3dRecipe:
    """The recipe for one prompt, without the options that a subclass adds."""
    return TextTo3dRecipe(
        prompt=prompt,
        teacher=recipe.teacher,
        run=replace(recipe.run, directory=str(directory)),
        text_to_3d=replace(recipe.text_to_3d, prompt=prompt),
        scene=recipe.scene,
        objective=recipe.objective,
        control=recipe.control,
        export=recipe.export,
    )


def run_benchmark(
    recipe: TextTo3dRecipe,
    suite: Literal["tiny", "full"],
    prompts: Sequence[str] | None,
    output: Path | str,
    judge: str,
    compare: Path | str | None = None,
) -> dict[str, tuple[float, float]]:
    """Run and grade what has no row in `output` yet, and write the page; returns means and intervals.

    prompts: in place of the suite's. compare: the output of another benchmark. Raises `UserError` before the
    first run for a prompt that is not about the world.
    """
    prompts = prompts or (TINY if suite == "tiny" else full_suite())
    for prompt in prompts:
        truth_of(prompt)
    # On the CPU: what is needed of it is a name and a resolution.
    teacher, folder, device = load_teacher(recipe.teacher), Path(output), pick_device(recipe.run.device)
    graders = load_graders(teacher.name_or_path, judge, device=device)
    before = None if compare is None else read_json(Path(compare) / "rows.json")["rows"]

    def compute(prompt: str, directory: Path) -> dict[str, Any]:
        run_text_to_3d(for_prompt(recipe, prompt, directory))
        return grade_run(directory, prompt, teacher.resolution, graders, device)

    options = json.dumps(as_mapping(for_prompt(recipe, "", "")), sort_keys=True)
    query = {"options": hashlib.sha256(options.encode()).hexdigest()[:16], "judge": judge}
    rows = run_suite(prompts, folder, query, compute)
    differences = {} if before is None else paired(before, rows)
    save_page(folder, f"Text-to-3D, suite {suite}", rows, machine_info(), differences)
    return averages(rows)
