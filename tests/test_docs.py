"""What the documents say is what the code does: the table of losses, the loss that is added live."""

import re
from pathlib import Path

import yaml

from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import build

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "losses.md").read_text()


def test_the_table_states_every_loss_and_its_cost() -> None:
    told = {name: int(cost) for name, cost in re.findall(r"^\| `(\w+)` .*\| (\d+) \|$", TEXT, re.MULTILINE)}
    configs = (ROOT / "configs" / "objective").glob("*.yaml")
    assert told == {
        path.stem: build(ObjectiveOptions, yaml.safe_load(path.read_text()), path.stem).cost()
        for path in configs
    }


def test_the_loss_that_is_added_live_is_one() -> None:
    (added,) = re.findall(r"<<'YAML'\n(.*?)\nYAML\n", TEXT, re.DOTALL)
    options = build(ObjectiveOptions, yaml.safe_load(added), "my_csd")
    assert [options.cost(progress) for progress in (0.0, 0.5, 1.0)] == [2, 3, 2]
