"""The prompts of an objective: their conditionings by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distill.core.conditioning import Conditioning
from distill.objectives.options import ObjectiveOptions
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class PromptConditionings:
    """Conditionings by prompt name, one row a sample, or a single row that all samples have in common."""

    by_name: Mapping[str, Conditioning]

    def select(self, name: str, count: int) -> Conditioning:
        """The conditioning of one prompt, `count` rows. Raises `UserError` for a prompt that is not given."""
        if name not in self.by_name:
            fixes = {"negative": "give negative_prompt", "reference": "give the reference's prompt"}
            names = ", ".join(self.by_name)
            fix = fixes.get(name, f"add it to the objective's prompts, or use one of {names}")
            raise UserError(f"the objective has a term with the prompt {name!r}: {fix}")
        return self.by_name[name].expand(count)

    @property
    def views(self) -> int:
        """Rows of a group of views of one object; 1: each row is an object of its own."""
        return max((conditioning.views for conditioning in self.by_name.values()), default=1)

    def apply(self, function: Callable[[Conditioning], Conditioning]) -> "PromptConditionings":
        """The same function applied to the conditioning of every prompt."""
        return PromptConditionings({name: function(value) for name, value in self.by_name.items()})

    def updated(self, **others: Conditioning) -> "PromptConditionings":
        """The same with further prompts."""
        return PromptConditionings({**self.by_name, **others})


def encode_prompts(
    encode: Callable[[Sequence[str]], Conditioning],
    prompts: Sequence[str],
    options: ObjectiveOptions,
    negative: str = "",
    reference: str = "",
) -> PromptConditionings:
    """The conditionings that an objective evaluates, through a teacher's `encode_text`; prompts are one a
    sample.

    An empty negative or reference prompt counts as not given.
    """
    common = {"unconditional": "", "negative": negative, "reference": reference}
    by_name = {}
    for name in options.prompt_names:
        if name == "conditional":
            by_name[name] = encode(prompts)
        elif name in options.prompts:
            template = options.prompts[name]
            by_name[name] = encode([template.replace("{prompt}", prompt) for prompt in prompts])
        elif name in common and (common[name] or name == "unconditional"):
            by_name[name] = encode([common[name]])
    return PromptConditionings(by_name)
