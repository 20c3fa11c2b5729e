"""Losses against each other at equal NFE, in one table.

python scripts/ablate.py subject=images "losses=[sds, csd, vsd]"
On a Gaussian mixture (seconds): python scripts/ablate.py subject=particles "ablation.prompts=[c0, c1]"
Text to 3D: python scripts/ablate.py subject=scenes ablation.budget=600 "ablation.seeds=[0, 1]"
"""

from dataclasses import dataclass

from entry import entry, load_group

from distill.objectives.options import ObjectiveOptions
from sds3d.evaluation.ablation_run import AblationRecipe, run_ablation


@dataclass(frozen=True, kw_only=True)
class Config(AblationRecipe):
    """Every loss, guidance scale, prompt and seed once."""

    losses: tuple[str, ...] = ("sds", "csd", "nfsd", "ism", "sdi", "vsd")  # names in configs/objective/


def main(config: Config) -> None:
    losses = {name: load_group("objective", name, ObjectiveOptions) for name in config.losses}
    print(run_ablation(config, losses))
    print(f"written: {config.output}: rows.json, rows.csv, table.md, index.html")


if __name__ == "__main__":
    entry("ablate", Config, main)
