"""A run in the browser, while it trains and after: python scripts/view.py run_directory=outputs/text_to_3d/a-red-teapot-seed0"""

from typing import Any

from entry import entry


def main(config: dict[str, Any]) -> None:
    from distill.runtime.config import build
    from sds3d.viewer import Viewer, ViewerOptions

    options = build(ViewerOptions, config["viewer"], "viewer")
    viewer = Viewer(config["run_directory"], options, config["device"])
    print(f"open http://{options.host}:{viewer.server.get_port()} (Ctrl-C to stop)", flush=True)
    viewer.serve()


if __name__ == "__main__":
    entry("view", main)
