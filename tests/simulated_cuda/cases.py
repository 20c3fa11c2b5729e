"""Arguments with which the tests run each script and config: the smallest sizes that do all of its work."""

from collections.abc import Sequence

RUN = ("run.steps=2", "run.trackers=[]", "run.checkpoint_every=1", "run.preview_every=2", "run.plan=false")
EXPORT = ("export.frames=2", "export.resolution=32", "export.mesh.resolution=24", "export.texture.size=64")
ORIENTATION = (
    "text_to_3d.stages.orientation.views=4",
    "text_to_3d.stages.orientation.checks=[{fraction: 0.5, draws: 1}]",
)
REFINEMENT = (
    "text_to_3d.stages.sdedit_refinement.views=2",
    "text_to_3d.stages.sdedit_refinement.steps=4",
    "text_to_3d.stages.sdedit_refinement.strengths=[0.5]",
)
TEXT_TO_3D = ("prompt=a red teapot", *RUN, *EXPORT, "text_to_3d.views=2")
NO_REFINEMENT = ("text_to_3d.stages.sdedit_refinement=null", "text_to_3d.stages.orientation=null")
OPTIMISE_IMAGE = ("prompt=a red teapot", *RUN, "optimise_image.particles=2", "optimise_image.frames=2")
ONE_STEP = (
    *RUN,
    "distill.batch=4",
    "distill.monitor.every=2",
    "distill.monitor.captions=2",
    "distill.monitor.real=8",
    "distill.critic_diagnostics.every=1",
)
CONTROL = ("evaluation.samples=4", "evaluation.steps=2", "evaluation.batch=2")
ADAPTER = (
    *RUN,
    "adapter.batch=2",
    "adapter.validate_every=1",
    "adapter.validation.samples=2",
    "adapter.validation.steps=2",
)
TEACHER = (
    "run.trackers=[]",
    "run.preview_every=2",
    *(f"teacher.steps.{part}=2" for part in ("clip", "hard_negatives", "vae", "unet")),
    "teacher.clip.batch=4",
    "teacher.vae.batch=4",
    "teacher.unet.batch=4",
    "teacher.clip.width=32",
    "teacher.clip.layers=1",
    "teacher.vae.channels=[8, 8, 16, 16]",
    "teacher.unet.channels=[16, 32]",
    "teacher.unet.heads=2",
)
SMALL_FIELD = ("scene.render.samples=32", "scene.field.encoding.log2_hashmap_size=14")
SCENE = "outputs/scene"  # a finished text-to-3D run
TINY, STOCK = "teacher=tiny", "teacher=stable_diffusion"
# What a script needs beside its defaults, in a folder that holds their data, `outputs/shapes64`.
SCRIPTS: dict[str, Sequence[str]] = {
    "ablate": [TINY, "subject=scenes", "losses=[sds]", "ablation.prompts=[a red teapot]",
               "ablation.seeds=[0]", "ablation.budget=16", "output=outputs/ablation", "text_to_3d.views=2",
               "text_to_3d.stages.orientation=null"],
    "bench": [TINY, *TEXT_TO_3D, *NO_REFINEMENT, f"scene_from={SCENE}", "runs=1"],
    "bench_one_step": [TINY, *ONE_STEP, "runs=1"],
    "benchmark_3d": [TINY, *TEXT_TO_3D[1:], *NO_REFINEMENT, "prompts=[a red teapot]"],
    "distill_one_step": [TINY, *ONE_STEP, "run.directory=outputs/one_step", "run.plan=true"],
    "distill_points": ["seeds=[0]", "points.budget=64", "points.init_steps=2", "points.pairs=16",
                       "methods=[dmd2]"],
    "doctor": [],
    "draw_curves": [f"runs=[{SCENE}]"],
    "draw_scores": ["scores.arrows=3"],
    "evaluate_control": [*CONTROL, "student=shapes64"],
    "evaluate_generator": ["students=[shapes64]", "steps=[2]", "limit=8", "evaluation.samples=8",
                           "evaluation.captions=2", "evaluation.each=2", "evaluation.batch=4"],
    "evaluate_teacher": [TINY, "limit=8", "evaluation.samples=4", "evaluation.steps=2",
                         "evaluation.guidance=[2]"],
    "evaluate_views": ["teacher=multi_view", "sampling.steps=2", "multi_view.objects=[cube]",
                       "novel_views.objects=[cube]", "novel_views.unseen=1", "novel_views.pictures=1"],
    "export": [f"run_directory={SCENE}", "output=outputs/export", *EXPORT],
    "classify": ["clip=tiny", "column=object", "train=16", "test=16"],
    "label_images": [TINY, f"folder={SCENE}/previews", "captions=[a red teapot, a blue torus]"],
    "make_dataset": ["source=attributes", "source.table=table.csv", "source.images=outputs/shapes64/test"],
    "make_pairs": [TINY, "pairs.count=4", "pairs.steps=2", "pairs.batch=2", "output=outputs/more_pairs"],
    "make_shapes": ["output=outputs/more_shapes", "world.train=4", "world.validation=2", "world.test=2",
                    "workers=1"],
    "nearest_images": ["queries=[a red teapot]", "clip=tiny", "limit=4"],
    "optimise_image": [TINY, *OPTIMISE_IMAGE],
    "plan": ["experiment=tiny_dreamfusion"],
    "sample": [TINY, "prompts=[a red teapot, a blue torus]", "count=2", "steps=2", "animation=true"],
    "save_student": ["student=shapes64", "output=outputs/saved_student"],
    "text_to_3d": [TINY, *TEXT_TO_3D, "run.steps=3", "run.directory=outputs/text_to_3d", "run.plan=true",
                   *ORIENTATION, *REFINEMENT],
    "train_controlnet": [*ADAPTER, "condition=depth", "run.directory=outputs/adapter"],
    "train_judge": ["data=outputs/shapes64", *RUN, "judge.batch=8", "judge.width=8"],
    "train_pixel_teacher": [*RUN, "conditioning.column=group", "teacher.data=outputs/shapes64",
                            "teacher.resolution=16", "teacher.unet.channels=[16, 32]",
                            "teacher.unet.batch=4"],
    "train_probe": [*RUN, "probe.batch=4", "probe.width=8"],
    "train_teacher": TEACHER,
    "train_tiny_autoencoder": [TINY, *RUN, "autoencoder.batch=4", "autoencoder.channels=8"],
    "train_upscaler": [*RUN, "data=outputs/shapes64", "resolution=64", "upscaler.patch=8",
                       "upscaler.batch=2", "upscaler.width=8", "upscaler.blocks=1"],
}  # fmt: skip
APART = {"entry", "sweep", "arguments", "view"}  # no script; a server, which has a test of its own
TRAINED = {"distill_one_step": "outputs/one_step", "text_to_3d": "outputs/text_to_3d",
           "train_controlnet": "outputs/adapter"}  # fmt: skip
GROUPS = {
    "objective": "text_to_3d",
    "control": "text_to_3d",
    "scene": "text_to_3d",
    "method": "distill_one_step",
}
MULTI_VIEW = {  # of text_to_3d.py, with a teacher that takes cameras and pictures
    "score_distillation": ["image=picture.png", "recipe=score_distillation",
                           "text_to_3d.stages.sdedit_refinement=null"],
    "sampled_views": ["prompt=a red teapot", "text_to_3d.stages.sampled_views.views=4",
                      "text_to_3d.stages.sampled_views.steps=2"],
}  # fmt: skip
ARGUMENTS: dict[str, Sequence[str]] = {  # of single configs
    "objective/dds": ["optimise_image.source=image.png", "optimise_image.source_prompt=a blue torus",
                      "optimise_image.start=source"],
    "scene/hash_large": SMALL_FIELD,
    "control/depth": ["control.mesh=mesh.glb", "teacher=shapes64"],
    "control/silhouette": ["control.mesh=mesh.glb", "teacher=shapes64"],
}  # fmt: skip
EXPERIMENT = {  # of the presets' scripts
    "text_to_3d": ("prompt=a red teapot", *EXPORT, "text_to_3d.views=1", *SMALL_FIELD),
    "distill_one_step": (*ONE_STEP, "data=outputs/shapes64", "distill.accumulate=1"),
    "train_controlnet": (*ADAPTER, "data=outputs/shapes64", "adapter.accumulate=1"),
}
STOCK_EXPERIMENT = {  # of presets for teachers that are not here: what they download
    "distill_one_step": ("judge=judge64", "features=null")
}
PREPARATION: dict[str, Sequence[str]] = {  # run once, in this order
    "make_shapes": ["world.train=16", "world.validation=4", "world.test=12", "world.supersample=1",
                    "workers=1", "world.geometry=true"],
    "make_pairs": [TINY, "pairs.count=8", "pairs.steps=2", "pairs.batch=4"],
    "text_to_3d": [TINY, *TEXT_TO_3D, f"run.directory={SCENE}", *NO_REFINEMENT],
}  # fmt: skip
