"""Training of an adapter on a frozen teacher, with control fidelity on held-out conditions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.control.adapter import controlled, make_adapter
from distill.control.conditions import adapter_input
from distill.control.network import AdapterNetwork, Control
from distill.core.conditioning import Conditioning
from distill.data.folders import batch_indices
from distill.data.latents import LatentCache
from distill.evaluation.control import ControlEvaluationOptions, adapter_sampler
from distill.evaluation.fidelity import fidelity, has_figures, means
from distill.evaluation.generate import Sampler, SamplingBatch, generate
from distill.evaluation.probe import Probe
from distill.runtime import processes
from distill.runtime.errors import UserError
from distill.runtime.optim import accumulated_step, cosine_annealing
from distill.runtime.run import Run
from distill.runtime.transfer import upload, upload_all
from distill.teacher.pipeline import PipelineTeacher


@dataclass(frozen=True)
class AdapterOptions:
    """How an adapter is trained."""

    batch: int = 32  # samples at once
    accumulate: int = 1  # batches of an update: less memory for the same result
    learning_rate: float = 5e-4
    final_lr_scale: float = 0.1  # of the learning rate, at the end of a half cosine; 1: a constant rate
    # as in the paper (section 3.3): without a caption, only the condition describes the content
    caption_dropout: float = 0.5
    # fraction of the depth images that are reduced to their silhouette: the adapter then reads either
    silhouettes: float = 0.0
    validate_every: int = 200  # steps between two evaluations on held-out conditions
    validation: ControlEvaluationOptions = ControlEvaluationOptions(samples=48, steps=10, seed=1)

    def __post_init__(self) -> None:
        positive = min(self.batch, self.accumulate, self.validate_every) >= 1 and self.learning_rate > 0
        if not positive or not 0 < self.final_lr_scale <= 1 or not 0 <= self.caption_dropout <= 1:
            raise UserError(
                "batch, accumulate, validate_every and learning_rate must be positive, final_lr_scale "
                "within (0, 1] and caption_dropout within [0, 1]"
            )
        if not 0 <= self.silhouettes < 1:
            raise UserError(f"silhouettes is {self.silhouettes:g}: expected a fraction in [0, 1)")


@dataclass(frozen=True)
class HeldOut:
    """Held-out captions, condition images (N, 1 or 3, H, W) uint8, and true images (N, 3, H, W) in [0, 1].

    probe: None where no figure needs one, or none fits the images.
    """

    captions: list[str]
    conditions: Tensor
    images: Tensor
    probe: Probe | None = None


@dataclass(frozen=True)
class AdapterBatch:
    """Latents and noise (B, C, h, w), times (B,), condition images (B, 3, H, W) in [0, 1], captions."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    images: Tensor
    conditioning: Conditioning
    weight: float = 1.0  # of its mean loss in that of the update


class AdapterTrainer:
    """An adapter and its teacher; `train` runs inside a `Run`."""

    def __init__(
        self,
        run: Run,
        teacher: PipelineTeacher,
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
        if options.silhouettes and condition != "depth":
            raise UserError(
                f"adapter.silhouettes is {options.silhouettes:g}, but images of {condition} have no "
                "silhouette to be reduced to: give condition=depth, or leave it 0"
            )
        self.run, self.teacher, self.options = run, teacher, options
        self.cache, self.conditions, self.condition = cache, conditions, condition
        self.adapter = make_adapter(teacher)
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=options.learning_rate, weight_decay=0.01
        )
        if run.options.gradient_checkpointing:
            self.adapter.enable_gradient_checkpointing()
            teacher.enable_gradient_checkpointing()  # gradients flow through its decoder half
        if run.compiled:
            self.adapter.compile()
            teacher.network.compile()

    def train(self, held_out: HeldOut | None = None) -> AdapterNetwork:
        """Run to the end; the adapter in evaluation mode."""
        run, options = self.run, self.options
        schedule = cosine_annealing(self.optimizer, run.options.steps, options.final_lr_scale)
        run.track(adapter=self.adapter, optimizer=self.optimizer, schedule=schedule)

        for step in run.steps():
            if step == 0:
                self.validate(held_out)
            loss = self.step(step)
            schedule.step()
            run.log(loss=loss)
            if run.due(options.validate_every):
                self.validate(held_out)
        return self.adapter.eval().requires_grad_(False)

    def step(self, step: int) -> Tensor:
        """One update by the teacher's own denoising loss; returns the loss."""
        return accumulated_step(self.optimizer, self.losses(step), max_norm=1.0, scaler=self.run.scaler)

    def losses(self, step: int) -> Iterator[Tensor]:
        """The weighted losses of this process's parts of an update's batch."""
        for batch in self.batches(step):
            with self.run.precision.autocast():
                loss = self.loss(batch)
            yield batch.weight * loss

    def loss(self, batch: AdapterBatch) -> Tensor:
        """The teacher's denoising loss through the adapter."""
        teacher = controlled(self.teacher, [Control(self.adapter, batch.images)])
        return teacher.denoising_loss(batch.latents, batch.noise, batch.t, batch.conditioning)

    def batches(self, step: int) -> Iterator[AdapterBatch]:
        """This process's batches of an update, on the run's device.

        Those of all processes together depend neither on their number nor on `accumulate`.
        """
        run, options, cache = self.run, self.options, self.cache
        count = options.batch * options.accumulate
        rows = batch_indices(len(cache), count, step, run.options.seed)
        times = torch.randint(self.teacher.schedule.num_train_timesteps, (count,), generator=run.generator)
        noise = torch.randn((count, *self.teacher.latent_shape), generator=run.generator)
        dropped = torch.rand(count, generator=run.generator) < options.caption_dropout
        reduced = None
        if options.silhouettes:
            reduced = torch.rand(count, generator=run.generator) < options.silhouettes
        for local in processes.local_rows(count, options.accumulate):
            part = local.rows
            indices = rows[part]
            host = [cache.latents_of(indices), noise[part], times[part], self.conditions[indices]]
            latents, eps, t, images = upload_all(host, run.device)
            conditioning = cache.conditioning_of(indices, dropped[part])
            conditioning = conditioning.apply(lambda value: upload(value, run.device))
            images = adapter_input(images)
            if reduced is not None:
                chosen = upload(reduced[part], run.device)[:, None, None, None]
                images = torch.where(chosen, (images > 0).to(images), images)
            yield AdapterBatch(latents, eps, t, images, conditioning, local.weight)

    @torch.no_grad()
    def validate(self, held_out: HeldOut | None) -> None:
        """Log the fidelity of samples; the preview holds triples of condition, sample and true image."""
        run, options = self.run, self.options.validation
        preview = run.due(run.options.preview_every) or run.step == 0
        if held_out is None or not (preview or has_figures(self.condition, held_out.probe)):
            return
        conditions = held_out.conditions[: options.samples]
        captions = held_out.captions[: options.samples]
        samples = generate(
            self.teacher, captions, self.sampler(conditions), options.batch, options.seed
        ).images
        run.log(**means(fidelity(self.condition, samples, conditions, held_out.probe)))
        if preview:
            triples = interleave(adapter_input(conditions), samples, held_out.images)
            run.preview("validation", triples[:36])  # two triples a row of the preview's square grid

    def sampler(self, conditions: Tensor) -> Sampler:
        """The teacher through the adapter in training, at the run's precision."""
        sampler = adapter_sampler(self.teacher, self.adapter, conditions, self.options.validation)

        def sample(batch: SamplingBatch) -> Tensor:
            with self.run.precision.autocast():
                return sampler.sample(batch)

        return replace(sampler, sample=sample)


def interleave(*columns: Tensor) -> Tensor:
    """Images (B, 3, H, W) of each column in turn: the first of every column, then the second of every one."""
    count = min(len(column) for column in columns)
    return torch.stack([column[:count] for column in columns], 1).flatten(0, 1)
