"""A teacher from a captioned folder: CLIP in two stages, VAE and U-Net, each in its own `Run`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from distill.data.folders import CaptionedImages, load_split, read_rows
from distill.runtime import processes
from distill.runtime.errors import UserError
from distill.runtime.machine import pick_device
from distill.runtime.run import Run, RunOptions
from distill.teacher.cache import load_training_cache
from distill.teacher.clip import ClipOptions, hard_negative_stage, train_clip
from distill.teacher.folder import TeacherParts, load_parts, load_unet, save_parts, save_teacher
from distill.teacher.unet import SNAPSHOTS, UnetOptions, check_initial, make_scheduler, train_unet
from distill.teacher.vae import VaeOptions, psnr, reconstruct, train_vae
from distill.teacher.vocabulary import build_tokenizer, check_length, tokenizer_fingerprint, words_of

VALIDATION_IMAGES = 256  # at most, of the VAE's figure


@dataclass(frozen=True)
class Steps:
    """Training steps of each part."""

    clip: int = 4500  # both towers, random captions as negatives
    hard_negatives: int = 4500  # both towers again, captions one word apart as negatives
    vae: int = 9000
    unet: int = 13500


@dataclass(frozen=True)
class TeacherOptions:
    """Data, sizes and training; `data` is a captioned image folder with the splits train and validation."""

    data: str = "outputs/shapes64"
    reuse: str | None = None  # a teacher's folder: keep its tokenizer, CLIP and VAE, train the U-Net only
    reuse_unet: bool = False  # initialise from the reused folder's U-Net: fine-tune a finished teacher
    continue_vae: bool = False  # train the reused VAE further, `steps.vae` steps, before the U-Net
    new_vae: bool = False  # train another VAE, of the sizes in `vae`, in place of the reused one
    resolution: int = 64
    steps: Steps = field(default_factory=Steps)
    clip: ClipOptions = field(default_factory=ClipOptions)
    vae: VaeOptions = field(default_factory=VaeOptions)
    unet: UnetOptions = field(default_factory=UnetOptions)

    def __post_init__(self) -> None:
        for name in ("reuse_unet", "continue_vae", "new_vae"):
            if vars(self)[name] and self.reuse is None:
                raise UserError(f"{name} starts from a finished teacher: give teacher.reuse=its folder")
        if self.reuse_unet + self.continue_vae + self.new_vae > 1:
            raise UserError(
                "a U-Net does not fit the latents of another VAE: one of reuse_unet, continue_vae and new_vae"
            )
        multiple = self.vae.factor * 2 ** (len(self.unet.channels) - 1)
        if self.resolution % multiple or self.resolution % self.clip.patch:
            raise UserError(
                f"resolution {self.resolution} must be a multiple of {multiple} (the VAE factor times the"
                f" U-Net's) and of the CLIP patch {self.clip.patch}"
            )


def train_teacher(run: RunOptions, options: TeacherOptions) -> Path:
    """Train the missing parts and save the folder `<run.directory>/teacher`, whose path is returned.

    With `unet.snapshot_every` teachers of earlier steps are in `<run.directory>/unet/snapshots`.
    Each part resumes from its own checkpoints; `run.steps` is not used. Several processes share the batches
    of VAE and U-Net; CLIP, whose batch is its negatives, is trained by all of them alike. Raises `UserError`
    for data that does not exist or does not fit.
    """
    initial_unet = None
    if options.reuse is None:
        parts = _train_parts(run, options, *_load_splits(options))
    else:
        parts = _continued(run, options, load_parts(options.reuse, pick_device(run.device)))
        _check_captions([row["text"] for row in read_rows(Path(options.data) / "train")], parts)
        if options.reuse_unet:
            initial_unet = load_unet(options.reuse)
            check_initial(initial_unet, options.unet)

    unet_run = _part_run(run, "unet", options.steps.unet, options.unet)
    with processes.main_first():
        cache, labels = load_training_cache(parts, options.data, options.resolution)

    def snapshot(step: int, unet: UNet2DConditionModel) -> None:
        folder = unet_run.directory / SNAPSHOTS / f"{step:06d}"
        if not folder.exists():  # of a run that was resumed from before it: the same, and its evaluations
            save_teacher(folder, parts, unet, make_scheduler(options.unet))

    unet = train_unet(unet_run, cache, parts.vae, options.unet, initial_unet, labels, snapshot)
    unet_run.finish({})
    folder = Path(run.directory) / "teacher"
    if unet_run.main:
        save_teacher(folder, parts, unet, make_scheduler(options.unet))
    processes.barrier()
    return folder


def _load_splits(options: TeacherOptions) -> tuple[CaptionedImages, CaptionedImages]:
    train, validation = (
        load_split(options.data, split, options.resolution) for split in ("train", "validation")
    )
    return train, validation


def _part_run(
    run: RunOptions, name: str, steps: int, options: ClipOptions | VaeOptions | UnetOptions, **config: str
) -> Run:
    part = replace(run, directory=str(Path(run.directory) / name), steps=steps)
    return Run(part, {name: asdict(options), "seed": run.seed, **config}, name)


def _train_parts(
    run: RunOptions, options: TeacherOptions, data: CaptionedImages, validation: CaptionedImages
) -> TeacherParts:
    """Tokenizer, CLIP and VAE, trained on a split and saved in `<run.directory>/parts` for `reuse`."""
    tokenizer, vocabulary = build_tokenizer(data.texts, options.clip.context_length)
    check_length(
        tokenizer, sorted(set(data.texts)), remedy="raise teacher.clip.context_length, or shorten the caption"
    )
    token_ids = tokenizer_fingerprint(tokenizer)  # a checkpoint's embeddings fit these ids only

    clip_run = _part_run(run, "clip", options.steps.clip, options.clip, tokenizer=token_ids)
    clip = train_clip(clip_run, data, tokenizer, options.clip)
    clip_run.finish({})

    hard_run = _part_run(
        run, "hard_negatives", options.steps.hard_negatives, options.clip, tokenizer=token_ids
    )
    clip = hard_negative_stage(hard_run, clip, data, tokenizer, options.clip)
    hard_run.finish({})

    vae = _train_vae(run, options, data, validation)
    parts = TeacherParts(tokenizer, vocabulary, clip, vae)
    _save_parts(run, parts)
    return parts


def _save_parts(run: RunOptions, parts: TeacherParts) -> None:
    """Save them by one of several processes, before any goes on."""
    if processes.rank() == 0:
        save_parts(_parts_folder(run), parts)
    processes.barrier()


def _parts_folder(run: RunOptions) -> Path:
    return Path(run.directory) / "parts"


def _train_vae(
    run: RunOptions,
    options: TeacherOptions,
    data: CaptionedImages,
    validation: CaptionedImages,
    initial: AutoencoderKL | None = None,
) -> AutoencoderKL:
    start = {"start": "new"} if options.new_vae else {}  # which the options of the VAE do not say
    vae_run = _part_run(run, "vae", options.steps.vae, options.vae, **start)
    vae = train_vae(vae_run, data, validation, options.vae, initial)
    images = validation.composite(slice(0, VALIDATION_IMAGES))
    error = (reconstruct(vae, images) - images).square().mean()
    vae_run.finish({"scaling_factor": vae.config.scaling_factor, "validation_psnr": float(psnr(error))})
    return vae


def _continued(run: RunOptions, options: TeacherOptions, parts: TeacherParts) -> TeacherParts:
    """The parts with a VAE trained further, or another, where the options ask for it; saved for `reuse`."""
    if not (options.continue_vae or options.new_vae):
        return parts
    initial = None if options.new_vae else parts.vae
    vae = _train_vae(run, options, *_load_splits(options), initial)
    _save_parts(run, parts._replace(vae=vae))
    return load_parts(_parts_folder(run), pick_device(run.device))


def _check_captions(captions: Sequence[str], parts: TeacherParts) -> None:
    """Raise `UserError` for captions that a reused text encoder cannot read in full."""
    unknown = sorted({word for text in captions for word in words_of(text)} - set(parts.vocabulary))
    if unknown:
        raise UserError(
            f"words of the captions are not in the reused vocabulary: {', '.join(unknown[:5])};"
            " train without reuse"
        )
    check_length(parts.tokenizer, sorted(set(captions)), remedy="shorten the caption, or train without reuse")
