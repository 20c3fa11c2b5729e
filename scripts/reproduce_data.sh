#!/usr/bin/env bash
# Everything that docs/data.md shows, into outputs/: data, trainings, figures. Stopped, it resumes.
# bash scripts/reproduce_data.sh   (about three hours on two cores; OMP_NUM_THREADS=1 for one)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v .venv/bin/python || command -v python)

dataset() {  # a folder, and the options of make_dataset.py that write it
  [ -f "$1/dataset.json" ] || "$python" scripts/make_dataset.py output="$@"
}

# Digits
dataset outputs/mnist source=mnist
"$python" scripts/train_judge.py attributes=label labels=none data=outputs/mnist resolution=28 \
  run.directory=outputs/judge_digits run.steps=4000
"$python" scripts/train_pixel_teacher.py run.directory=outputs/digits
"$python" scripts/evaluate_generator.py teacher=outputs/digits/teacher judge=outputs/judge_digits/judge labels=none \
  data=outputs/mnist "guidance=[1, 1.5]" "steps=[25]" evaluation.samples=1000 output=outputs/evaluate_digits
"$python" scripts/distill_one_step.py teacher=outputs/digits/teacher data=outputs/mnist judge=outputs/judge_digits/judge \
  run.directory=outputs/digits_student run.steps=400
"$python" scripts/evaluate_generator.py teacher=outputs/digits/teacher "students=[outputs/digits_student/student]" \
  "steps=[]" judge=outputs/judge_digits/judge labels=none data=outputs/mnist evaluation.samples=1000 \
  output=outputs/evaluate_digits

# Sprites
dataset outputs/sprites16 source=emoji folder.resolution=16 folder.background=1
sprites=(teacher.data=outputs/sprites16 teacher.resolution=16 teacher.colour=true teacher.unet.batch=100
  teacher.unet.prediction=epsilon teacher.unet.zero_snr=false teacher.unet.schedule=linear teacher.unet.beta_start=1e-4
  teacher.unet.beta_end=0.02 teacher.unet.timesteps=500 teacher.unet.decay=1 teacher.unet.ema=0.995)
"$python" scripts/train_pixel_teacher.py conditioning=context_unet run.directory=outputs/sprites run.steps=1200 \
  run.precision=bfloat16 "${sprites[@]}"
"$python" scripts/train_judge.py attributes=group labels=none data=outputs/sprites16 resolution=16 \
  run.directory=outputs/judge_sprites run.steps=2000
for sampler in ddpm:500 ddim:25 ddpm_mean:500; do
  "$python" scripts/evaluate_generator.py teacher=outputs/sprites/teacher judge=outputs/judge_sprites/judge labels=none \
    data=outputs/sprites16 split=train "guidance=[1]" "steps=[${sampler#*:}]" sampler="${sampler%:*}" \
    evaluation.samples=500 output=outputs/evaluate_sprites
done

# Faces
dataset outputs/faces source=faces
"$python" scripts/train_pixel_teacher.py conditioning=context conditioning.column=attributes \
  run.directory=outputs/faces_teacher run.steps=1500 teacher.data=outputs/faces teacher.resolution=32 \
  teacher.colour=true teacher.unet.batch=64 teacher.unet.timesteps=100 teacher.unet.ema=0.995
"$python" scripts/train_judge.py attributes=faces labels=none data=outputs/faces resolution=32 \
  run.directory=outputs/judge_faces run.steps=1500
"$python" scripts/evaluate_generator.py teacher=outputs/faces_teacher/teacher judge=outputs/judge_faces/judge labels=none \
  data=outputs/faces "guidance=[1, 2]" "steps=[25]" evaluation.samples=500 output=outputs/evaluate_faces

# Upscaler
"$python" scripts/make_shapes.py output=outputs/renders512 world.resolution=512 world.train=800 world.validation=16 \
  world.test=100 world.seed=512
"$python" scripts/train_upscaler.py run.precision=bfloat16
"$python" scripts/sample.py "prompts=[a red teapot, a blue car, a green duck, a yellow chair]" count=2 guidance=2 \
  upscale=512 output=outputs/upscaled

# Scores
"$python" scripts/draw_scores.py
"$python" scripts/sample.py "prompts=[a red teapot, a blue car]" count=4 guidance=2 steps=50 \
  "formulations=[vp, ve, flow]" output=outputs/formulations
"$python" scripts/ablate.py subject=particles "losses=[sds, sds_jacobian]" "ablation.prompts=[c0, c1]" \
  output=outputs/ablate_jacobian
