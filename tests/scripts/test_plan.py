"""scripts/plan.py as a user runs it."""

import json

import pytest
from command_line import script


def test_plan_of_a_script_and_of_a_preset(tmp_path):
    output = tmp_path / "plan.json"
    arguments = ["script=distill_one_step", "method=sid", "machine=a100", f"output={output}"]
    text = script("plan", *arguments, "distill.batch=4", "run.steps=10")
    assert "student, backward" in text and "10 steps on a100" in text and "peak memory" in text
    values = json.loads(output.read_text())
    assert values["machine"] == "a100" and values["fits"] and values["tflop"] > 0

    text = script(
        "plan", "experiment=tiny_dreamfusion", "machine=h100", "text_to_3d.views=2", "prompt=a cube"
    )
    assert "VAE encoder, backward" in text and "on h100" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give experiment=NAME (configs/experiment/) or script=NAME, one of both"),
        (["script=sample"], "script is 'sample': expected one of text_to_3d, distill_one_step"),
        (["experiment=sd99"], "experiment is 'sd99': expected one of"),
        (["script=distill_one_step", "machine=tpu"], "machine is 'tpu': expected here or one of h100"),
        (["script=distill_one_step", "distill.bach=3"], "distill.bach is not an option"),
        (["script=text_to_3d", "teacher=a/b", "machine=a100"], "teacher 'a/b' cannot be planned"),
    ],
)
def test_bad_input(arguments, message):
    assert message in script("plan", *arguments, code=2)
