"""Teachers of pixels that read a context: a number for each of some names, such as the parts of a mixture."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.runtime.errors import UserError
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.pixels import PixelTeacher

WEIGHTED_NAME = re.compile(r"(?:([-+]?(?:\d+\.?\d*|\.\d+))\s+)?(\S.*)")


@final
class ContextDenoiser(DiffusersDenoiser):
    """`UNet2DConditionModel` with a projection of vectors, or a `ContextUnet`; the embedding is (B, 1, K)."""

    def call_network(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As of every denoiser of diffusers."""
        dtype = self.network.dtype
        context = conditioning.embedding[:, 0].to(dtype)
        return self.network(x.to(dtype), timestep, None, class_labels=context).sample

    @property
    def bottleneck(self) -> nn.Module:
        """The U-Net's middle block."""
        return self.network.mid_block


@final
class ContextTeacher(PixelTeacher):
    """A U-Net on pixels whose prompts are names with weights: "food", "hero, 0.6 spell"; "" is all zeros."""

    denoiser_class = ContextDenoiser

    def __init__(
        self,
        pipeline: Any,
        names: Sequence[str],
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
        column: str = "context",
    ) -> None:
        """names: of the numbers of a context, in their order; column: of contexts in the rows of its data."""
        super().__init__(pipeline, name_or_path, identity)
        self.names, self.column = list(names), column

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """As of every teacher: the names and weights of the row's context, or its caption without one."""
        context = row.get(self.column)
        if not isinstance(context, Mapping):
            return str(row["text"])
        return ", ".join(f"{float(weight):g} {name}" for name, weight in context.items() if weight)

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for what is no list of names."""
        parse_context(prompt, self.names)

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """Contexts (B, 1, K)."""
        rows = [parse_context(prompt, self.names) for prompt in prompts]
        return Conditioning(torch.tensor(rows, device=self.device)[:, None])


def parse_context(prompt: str, names: Sequence[str]) -> list[float]:
    """The numbers (K) that a prompt gives the K names: names with commas between them, each after its weight,
    which is 1 where it is left out.

    Raises `UserError` for another name.
    """
    values = dict.fromkeys(names, 0.0)
    for part in filter(None, (part.strip() for part in prompt.split(","))):
        match = WEIGHTED_NAME.fullmatch(part)
        weight, name = (None, part) if part in values or match is None else match.groups()
        if name not in values:
            raise UserError(
                f"the prompt {prompt!r} has {name!r}: expected names with commas between them, each after a "
                f"weight or alone, of {', '.join(names)}"
            )
        values[name] += 1.0 if weight is None else float(weight)
    return list(values.values())
