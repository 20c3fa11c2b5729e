"""Training of an adapter on a frozen teacher, with control fidelity on held-out conditions."""

from dataclasses import dataclass

import torch
from diffusers import ControlNetModel
from torch import Tensor

from distill.control.adapter import Control, controlled, make_adapter
from distill.control.conditions import adapter_input
from distill.data.folders import batch_indices
from distill.data.latents import LatentCache
from distill.evaluation.control import ControlEvaluationOptions, adapter_sampler
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.generate import generate
from distill.evaluation.probe import Probe
from distill.runtime.errors import UserError
from distill.runtime.optim import cosine_annealing, optimizer_step
from distill.runtime.run import Run
from distill.teacher.latent import LatentDiffusionTeacher


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is trained."""

    batch: int = 32
    learning_rate: float = 5e-4
    final_lr_scale: float = 0.1  # of the learning rate, at the end of a half cosine
    # as in the paper (section 3.3): without a caption, only the condition describes the content
    caption_dropout: float = 0.5
    validate_every: int = 200  # steps between two evaluations on held-out conditions
    validation: ControlEvaluationOptions = ControlEvaluationOptions(samples=48, steps=10, seed=1)

    def __post_init__(self) -> None:
        positive = min(self.batch, self.validate_every) >= 1 and self.learning_rate > 0
        if not positive or not 0 < self.final_lr_scale <= 1 or not 0 <= self.caption_dropout <= 1:
            raise UserError(
                "batch, validate_every and learning_rate must be positive, final_lr_scale within (0, 1] "
                "and caption_dropout within [0, 1]"
            )


@dataclass(frozen=True)
class HeldOut:
    """Held-out captions, condition images (N, 1 or 3, H, W) uint8, and true images (N, 3, H, W) in [0, 1]."""

    captions: list[str]
    conditions: Tensor
    images: Tensor


class AdapterTrainer:
    """An adapter and its teacher; `train` runs inside a `Run`."""

    def __init__(
        self,
        run: Run,
        teacher: LatentDiffusionTeacher,
        cache: LatentCache,
        conditions: Tensor,
        condition: str,
        options: AdapterOptions,
    ) -> None:
        """conditions: images (N, 1 or 3, H, W) uint8 of the cache's N latents, all of one `condition`.

        Raises `UserError` where their numbers differ.
        """
        if len(conditions) != len(cache):
            raise UserError(f"{len(conditions)} condition images for {len(cache)} images: expected one each")
        self.run, self.teacher, self.options = run, teacher, options
        self.cache, self.conditions, self.condition = cache, conditions, condition
        self.adapter = make_adapter(teacher)
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=options.learning_rate, weight_decay=0.01
        )

    def train(self, held_out: HeldOut, probe: Probe) -> ControlNetModel:
        """Run to the end; the adapter in evaluation mode."""
        run, options = self.run, self.options
        schedule = cosine_annealing(self.optimizer, run.options.steps, options.final_lr_scale)
        run.track(adapter=self.adapter, optimizer=self.optimizer, schedule=schedule)

        for step in run.steps():
            if step == 0:
                self.validate(held_out, probe)
            loss = self.step(step)
            schedule.step()
            run.log(loss=loss)
            if run.due(options.validate_every):
                self.validate(held_out, probe)
        return self.adapter.eval().requires_grad_(False)

    def step(self, step: int) -> Tensor:
        """One update by the teacher's own denoising loss; returns the loss."""
        run, options, cache = self.run, self.options, self.cache
        indices = batch_indices(len(cache), options.batch, step, run.options.seed)
        latents, count = cache.latents[indices], len(indices)
        t = torch.randint(self.teacher.schedule.num_train_timesteps, (count,), generator=run.generator)
        noise = torch.randn(latents.shape, generator=run.generator)
        dropped = torch.rand(count, generator=run.generator) < options.caption_dropout
        conditioning = cache.conditioning_of(indices, dropped).to(run.device)
        latents, noise, t = (value.to(run.device) for value in (latents, noise, t))

        control = Control(self.adapter, adapter_input(self.conditions[indices]).to(run.device))
        loss = controlled(self.teacher, [control]).denoising_loss(latents, noise, t, conditioning)
        optimizer_step(self.optimizer, loss, max_norm=1.0)
        return loss.detach()

    @torch.no_grad()
    def validate(self, held_out: HeldOut, probe: Probe) -> None:
        """Log the fidelity of samples; the preview holds triples of condition, sample and true image."""
        run, options = self.run, self.options.validation
        conditions = held_out.conditions[: options.samples]
        captions = held_out.captions[: options.samples]
        sampler = adapter_sampler(self.teacher, self.adapter, conditions, options)
        samples = generate(self.teacher, captions, sampler, options.batch, options.seed).images
        run.log(**means(fidelity(self.condition, samples, conditions, probe)))
        if run.due(run.options.preview_every) or run.step == 0:
            triples = interleave(adapter_input(conditions), samples, held_out.images)
            run.preview("validation", triples[:36])  # two triples a row of the preview's square grid


def interleave(*columns: Tensor) -> Tensor:
    """Images (B, 3, H, W) of each column in turn: the first of every column, then the second of every one."""
    count = min(len(column) for column in columns)
    return torch.stack([column[:count] for column in columns], 1).flatten(0, 1)
