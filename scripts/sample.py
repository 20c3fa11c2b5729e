"""Images from a teacher or a student, one row a prompt.

python scripts/sample.py "a red teapot" "a blue torus" (student=shapes64)
"""

from dataclasses import dataclass

from entry import entry

from distill.apps.sample import SampleOptions, run_sample


@dataclass(frozen=True, kw_only=True)
class Config(SampleOptions):
    """Images of prompts from a teacher, or from a student."""


def main(config: Config) -> None:
    print(f"written: {run_sample(config)}")


if __name__ == "__main__":
    entry("sample", Config, main, positional="prompts")
