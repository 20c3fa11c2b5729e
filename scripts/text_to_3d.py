"""A sentence, or a picture, to a mesh and a turntable.

python scripts/text_to_3d.py prompt="a red teapot"
python scripts/text_to_3d.py image=photo.png
torchrun --nproc-per-node 2 scripts/text_to_3d.py prompt="a red teapot"
"""

from dataclasses import dataclass

from entry import entry

from distill.planning.start import plan_start, record_work
from sds3d.planning import text_to_3d_subject
from sds3d.text_to_3d.recipe import TextTo3dRecipe, run_text_to_3d, with_caption

FILES = "mesh.glb, mesh.obj, mesh.ply, turntable.mp4, turntable.gif, renders.png, result.json"


@dataclass(frozen=True, kw_only=True)
class Config(TextTo3dRecipe):
    """Everything a text-to-3D run depends on."""


def main(config: Config) -> None:
    config = with_caption(config)
    plan = plan_start(text_to_3d_subject(config), config)
    result = run_text_to_3d(config)
    record_work(result, plan)
    print(f"written: {result.parent}: {FILES}")


if __name__ == "__main__":
    entry("text_to_3d", Config, main, parallel=True)
