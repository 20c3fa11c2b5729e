"""Training an adapter: the teacher frozen, its pictures known, fidelity watched on held-out conditions."""

from dataclasses import dataclass

import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.nn import functional as F

from distill.control.adapter import Control, controlled, make_adapter
from distill.control.conditions import as_input
from distill.core.score import Prediction
from distill.data.folders import batches
from distill.data.latents import LatentCache
from distill.evaluation.control import ControlEvaluationOptions, images_of, teacher_sampler
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.probe import Probe
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import Teacher


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is trained. `caption_dropout` as in the paper: so that the picture is read where the text says nothing.

    Every `validate_every` steps it is held against conditions it has not seen.
    """

    batch: int = 32
    learning_rate: float = 5e-4
    final_rate: float = 0.1
    caption_dropout: float = 0.5
    validate_every: int = 200
    validation: ControlEvaluationOptions = ControlEvaluationOptions(samples=48, steps=10, seed=1)

    def __post_init__(self) -> None:
        if (
            min(self.batch, self.validate_every) < 1
            or self.learning_rate <= 0
            or not 0 < self.final_rate <= 1
            or not 0 <= self.caption_dropout <= 1
        ):
            raise UserError(
                "batch, validate_every and learning_rate must be positive, final_rate within (0, 1] and caption_dropout within [0, 1]"
            )


@dataclass(frozen=True)
class HeldOut:
    """What validation draws from: captions, their pictures uint8, the true images (N, 3, H, W)."""

    texts: list[str]
    pictures: Tensor
    images: Tensor


def adapter_loss(
    teacher: Teacher, adapter: ControlNetModel, batch: tuple[Tensor, Tensor, Tensor, Tensor], pictures: Tensor
) -> Tensor:
    """The teacher's own denoising loss on (latents, noise, t, text states), seen through the adapter with its pictures (B, 3, H, W)."""
    clean, noise, t, states = batch
    x_t = teacher.schedule.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
    told: Prediction = controlled(teacher, [Control(adapter, pictures)]).predict(x_t, t, states)
    if teacher.score.prediction_type == "epsilon":
        return F.mse_loss(told.eps, noise)
    return F.mse_loss(told.v, teacher.schedule.velocity(clean, noise, t))


class AdapterTraining:
    """An adapter and its teacher; `train` runs inside a `Run`."""

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        cache: LatentCache,
        pictures: Tensor,
        condition: str,
        options: AdapterOptions,
    ) -> None:
        """pictures (N, 1 or 3, H, W) uint8 belong to the cache's latents. Raises `UserError` where their numbers differ."""
        if len(pictures) != len(cache.latents):
            raise UserError(
                f"{len(pictures)} condition pictures for {len(cache.latents)} images: one an image is expected"
            )
        self.run, self.teacher, self.cache, self.pictures, self.condition, self.options = (
            run,
            teacher,
            cache,
            pictures,
            condition,
            options,
        )
        self.adapter = make_adapter(teacher)
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=options.learning_rate, weight_decay=0.01
        )

    def train(self, held_out: HeldOut, probe: Probe) -> ControlNetModel:
        """Run to the end; the adapter in evaluation mode."""
        run, options = self.run, self.options
        run.track(adapter=self.adapter, optimizer=self.optimizer)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, run.options.steps, options.learning_rate * options.final_rate
        )
        run.track(decay=decay)
        for step in run.steps():
            if step == 0:
                self.validate(held_out, probe)
            loss = self.step(step)
            decay.step()
            run.log(loss=loss)
            if run.due(options.validate_every):
                self.validate(held_out, probe)
        return self.adapter.eval().requires_grad_(False)

    def step(self, step: int) -> Tensor:
        """One update; its loss."""
        run, options, cache = self.run, self.options, self.cache
        index = batches(len(cache.latents), options.batch, step, run.options.seed)
        t = torch.randint(self.teacher.schedule.num_train_timesteps, (len(index),), generator=run.generator)
        noise = torch.randn(cache.latents[index].shape, generator=run.generator)
        dropped = torch.rand(len(index), generator=run.generator) < options.caption_dropout
        states = cache.states[torch.where(dropped, len(cache.states) - 1, cache.caption[index])]
        batch = tuple(value.to(run.device) for value in (cache.latents[index], noise, t, states))
        loss = adapter_loss(self.teacher, self.adapter, batch, as_input(self.pictures[index]).to(run.device))  # type: ignore[arg-type]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def validate(self, held_out: HeldOut, probe: Probe) -> None:
        """Figures of samples of held-out conditions, logged; a strip of condition, sample and truth for the first of them."""
        chosen = self.options.validation
        pictures, texts = held_out.pictures[: chosen.samples], held_out.texts[: chosen.samples]
        samples = images_of(
            teacher_sampler(self.teacher, chosen), self.teacher, self.adapter, texts, pictures, chosen
        )
        self.run.log(**means(fidelity(self.condition, samples, pictures, probe)))
        if self.run.due(self.run.options.preview_every) or self.run.step == 0:
            self.run.preview(
                "strip", strip(as_input(pictures), samples, held_out.images)[:36]
            )  # six triples a row of the preview's square grid


def strip(*columns: Tensor) -> Tensor:
    """Images (B, 3, H, W) each, interleaved: the first of each column, then the second."""
    count = min(len(column) for column in columns)
    return torch.stack([column[:count] for column in columns], 1).flatten(0, 1)
