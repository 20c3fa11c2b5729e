#!/usr/bin/env bash
# Everything that docs/data.md shows, into outputs/: data, trainings, figures. Stopped, it resumes.
# bash scripts/reproduce_data.sh   (about nine hours on two cores; OMP_NUM_THREADS=1 for one)
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

"$python" scripts/train_controlnet.py teacher=digits28 data=outputs/mnist condition=edges probe=null run.steps=800 \
  adapter.validate_every=400 run.precision=bfloat16 run.directory=outputs/digits_edges
"$python" scripts/evaluate_control.py teacher=digits28 adapter=outputs/digits_edges/adapter data=outputs/mnist probe=null \
  judge=digits28 labels=none evaluation.guidance=1.5 precision=bfloat16 output=outputs/evaluate_digits_edges

# Sprites
dataset outputs/sprites16 source=emoji folder.resolution=16 folder.background=1
sprites=(teacher.data=outputs/sprites16 teacher.resolution=16 teacher.colour=true teacher.unet.batch=100
  teacher.unet.prediction=epsilon teacher.unet.zero_snr=false teacher.unet.schedule=linear teacher.unet.beta_start=1e-4
  teacher.unet.beta_end=0.02 teacher.unet.timesteps=500 teacher.unet.decay=1 teacher.unet.ema=0.995)
"$python" scripts/train_pixel_teacher.py conditioning=context_unet run.directory=outputs/sprites run.steps=3000 \
  run.precision=bfloat16 "${sprites[@]}"
"$python" scripts/train_judge.py attributes=group labels=none data=outputs/sprites16 resolution=16 \
  run.directory=outputs/judge_sprites run.steps=2000
for sampler in ddpm:500 ddim:25; do
  "$python" scripts/evaluate_generator.py teacher=outputs/sprites/teacher judge=outputs/judge_sprites/judge labels=none \
    data=outputs/sprites16 split=train "guidance=[1]" "steps=[${sampler#*:}]" sampler="${sampler%:*}" \
    evaluation.samples=300 evaluation.captions=5 precision=bfloat16 output=outputs/evaluate_sprites
done
"$python" scripts/sample.py 'prompts=["Food & Drink", "Smileys & Emotion", "Flags"]' teacher=outputs/sprites/teacher count=8 \
  guidance=1 "compare_samplers=[ddpm:500, ddim:25, ddpm_mean:500]" output=outputs/sprites_samplers

# Faces
dataset outputs/faces source=faces
"$python" scripts/train_pixel_teacher.py conditioning=context conditioning.column=attributes \
  run.directory=outputs/faces_teacher run.steps=1500 teacher.data=outputs/faces teacher.resolution=32 \
  teacher.colour=true teacher.unet.batch=64 teacher.unet.timesteps=100 teacher.unet.ema=0.995
"$python" scripts/train_judge.py attributes=faces labels=none data=outputs/faces resolution=32 \
  run.directory=outputs/judge_faces run.steps=1500
"$python" scripts/evaluate_generator.py teacher=outputs/faces_teacher/teacher judge=outputs/judge_faces/judge labels=none \
  data=outputs/faces "guidance=[1, 2]" "steps=[25]" evaluation.samples=500 output=outputs/evaluate_faces

# Faces by concatenation, and by other losses
dataset outputs/faces_white source=faces folder.background=1
faces=(teacher.resolution=32 teacher.colour=true teacher.unet.batch=64 teacher.unet.timesteps=100 teacher.unet.ema=0.99
  run.precision=bfloat16)
"$python" scripts/train_pixel_teacher.py conditioning=low_resolution run.directory=outputs/faces_low_resolution run.steps=800 \
  teacher.data=outputs/faces "${faces[@]}"
"$python" scripts/train_pixel_teacher.py conditioning=inpainting run.directory=outputs/faces_inpainting_white run.steps=700 \
  teacher.data=outputs/faces_white "${faces[@]}"
for loss in x0 previous; do
  "$python" scripts/train_pixel_teacher.py conditioning=context conditioning.column=attributes run.steps=500 \
    run.directory="outputs/faces_loss_$loss" teacher.unet.prediction=sample teacher.unet.loss="$loss" \
    teacher.data=outputs/faces "${faces[@]}"
  "$python" scripts/evaluate_generator.py teacher="outputs/faces_loss_$loss/teacher" judge=outputs/judge_faces/judge \
    labels=none data=outputs/faces "guidance=[2]" "steps=[25]" evaluation.samples=300 precision=bfloat16 \
    output="outputs/evaluate_faces_loss_$loss"
done

# Faces by captions at 64 pixels, and variations of a picture by their CLIP
dataset outputs/faces64 source=faces folder.resolution=64
"$python" scripts/train_teacher.py run.directory=outputs/faces_text teacher.data=outputs/faces64 teacher.steps.clip=800 \
  teacher.steps.hard_negatives=400 teacher.steps.vae=1500 teacher.steps.unet=1800 teacher.unet.ema=0.998 \
  run.precision=bfloat16
"$python" scripts/evaluate_generator.py teacher=outputs/faces_text/teacher judge=null labels=none data=outputs/faces64 \
  "guidance=[1, 3]" "steps=[25]" evaluation.samples=300 evaluation.captions=10 precision=bfloat16 \
  output=outputs/evaluate_faces_text
"$python" scripts/train_pixel_teacher.py conditioning=clip_image conditioning.clip=outputs/faces_text/teacher \
  run.directory=outputs/faces_variations run.steps=1000 teacher.data=outputs/faces "${faces[@]}"

# Autoencoders of factors 1 to 16, a U-Net on each at equal work (at 16 six tenths of it)
autoencoder() {  # factor, channels of the VAE's levels and of latents, steps of the U-Net, its EMA
  run=outputs/factor$1 quarter=$(($4 / 4))
  "$python" scripts/train_teacher.py run.directory="$run" teacher.reuse=outputs/faces_text/teacher teacher.new_vae=true \
    teacher.data=outputs/faces teacher.resolution=32 teacher.vae.factor="$1" teacher.vae.channels="[$2]" \
    teacher.vae.latent_channels="$3" teacher.steps.vae=1000 teacher.steps.unet="$4" teacher.unet.ema="$5" \
    teacher.unet.snapshot_every="$quarter" run.precision=bfloat16
  "$python" scripts/evaluate_teacher.py teacher="$run/teacher" judge=outputs/judge_faces/judge labels=none \
    data=outputs/faces evaluation.samples=20 evaluation.steps=4 output="$run/evaluation"
  for step in $quarter $((2 * quarter)) $((3 * quarter)) "$4"; do
    folder=$run/unet/snapshots/$(printf %06d "$step")
    "$python" scripts/evaluate_generator.py teacher="$folder" judge=outputs/judge_faces/judge labels=none \
      data=outputs/faces "guidance=[1]" "steps=[10]" sampler=dpm evaluation.samples=300 evaluation.captions=2 \
      evaluation.each=2 precision=bfloat16 output="$folder/figures"
  done
}
autoencoder 1 16 3 40 0.9
autoencoder 2 16,32 4 160 0.97
autoencoder 4 16,32,64 8 624 0.99
autoencoder 8 16,32,64,128 16 2312 0.998
autoencoder 16 16,32,64,128,128 32 4000 0.998
"$python" scripts/draw_curves.py outputs/factor{1,2,4,8,16}/unet/snapshots "metrics=[frechet]" \
  "scales=[0.594, 0.150, 0.0386, 0.0107, 0.0037]" "label=work in TFLOP" output=outputs/factors.png

# Emoji: CLIP, then the VAE of shapes64 further, then a U-Net
dataset outputs/emoji64 source=emoji folder.resolution=64
"$python" scripts/train_teacher.py run.directory=outputs/emoji_clip teacher.data=outputs/emoji64 teacher.steps.clip=1500 \
  teacher.steps.hard_negatives=500 teacher.steps.vae=1 teacher.steps.unet=1 run.precision=bfloat16
if [ ! -d outputs/emoji_parts/vae ]; then
  mkdir -p outputs/emoji_parts
  cp -r outputs/emoji_clip/parts/clip outputs/emoji_clip/parts/tokenizer distill/weights/shapes64/vae outputs/emoji_parts
fi
"$python" scripts/train_teacher.py run.directory=outputs/emoji_teacher teacher.data=outputs/emoji64 \
  teacher.reuse=outputs/emoji_parts teacher.continue_vae=true teacher.steps.vae=1200 teacher.vae.learning_rate=5e-4 \
  teacher.steps.unet=2400 "teacher.unet.channels=[128]" teacher.unet.layers=2 teacher.unet.ema=0.998 run.precision=bfloat16
"$python" scripts/evaluate_generator.py teacher=outputs/emoji_teacher/teacher judge=null labels=none data=outputs/emoji64 \
  split=train "guidance=[1, 4]" "steps=[25]" evaluation.samples=500 evaluation.captions=40 precision=bfloat16 \
  output=outputs/evaluate_emoji

# CLIP beside logistic regression
"$python" scripts/classify.py output=outputs/classify_world.json
"$python" scripts/classify.py data=outputs/mnist column=label clip=outputs/emoji_teacher/teacher "template=keycap: {}" \
  output=outputs/classify_digits.json

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
"$python" scripts/ablate.py subject=images "losses=[sds, sds_jacobian]" "ablation.seeds=[0]" \
  "ablation.prompts=[a red teapot, a blue torus, a yellow chair]" output=outputs/ablate_jacobian_images
