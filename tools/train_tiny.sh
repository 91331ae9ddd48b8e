#!/usr/bin/env bash
# From nothing to a trained miniature: data, autoencoder, text encoder, base model, background buffer, fine-tuning.
#
#     bash tools/train_tiny.sh                 # the full recipe, of hours; its result takes the place of the built-in model
#     bash tools/train_tiny.sh hour            # about an hour; its model is in runs/toy-hour and replaces nothing
#
# Everything lands in runs/toy (runs/toy-hour).  Interrupt it whenever you like: the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=${1:-full}
out=runs/toy
case $recipe in
    full) pictures=24000 lab=8000 instances=20 vae=4500 text=700 base=2750 buffer=400 hoi=2200 verifier=38 ;;
    hour) pictures=4800 lab=1600 instances=6 vae=900 text=300 base=1200 buffer=200 hoi=800 verifier=5 out=runs/toy-hour ;;
    *) echo "unknown recipe '$recipe'; expected full or hour" >&2; exit 1 ;;
esac
# Shapes from 100 on: sample.py shows shape 0, evaluate_tiny.sh measures by shapes from 800 on.
toy="--shade --size 128 --framing tight --object-seed 100 --object-instances $instances --grasps-per-object 4 --workers 2"

# The base model sees scenic looks only; laboratory ones first come with fine-tuning, as DexYCB does to Stable Diffusion.
python make_dataset.py $toy --content hand_object=0.65 object=0.12 scenery=0.23 --style scenic --looks 4 \
    --count $pictures --out $out/scenic
python make_dataset.py $toy --content hand_object=1 --style lab --looks 3 --count $lab --seed 1 --out $out/lab

python train.py --stage vae --data $out/scenic $out/lab --out $out/vae --steps $vae --learning-rate 1e-3 --clip-gradient 0.3 \
    --ema-decay 0.995
python train.py --stage text --data $out/scenic --out $out/text --steps $text
python train.py --stage base --data $out/scenic --base $out/vae/model.safetensors \
    --text-encoder-from $out/text/model.safetensors --out $out/base --steps $base --no-cosine --clip-gradient 0.3 --ema-decay 0.998
python sample.py --no-conditions --checkpoint $out/base/model.safetensors --count $buffer --out $out/buffer
python train.py --stage hoi --data $out/scenic $out/lab --reg-data $out/buffer --base $out/base/model.safetensors \
    --out $out/hoi --steps $hoi --batch-size 24 --reg-batch-size 8 --learning-rate 8e-4 --clip-gradient 0.3 \
    --warmup-steps 60 --caption-dropout 0.1 --condition-dropout 0.35 --ema-decay 0.997
# The verifier, which says what pictures show; it sees drawn ones only.  Minutes, not steps.
[ -f $out/verifier.safetensors ] || python -m hoi.verify train --data $out/scenic $out/lab --out $out/verifier.safetensors --minutes $verifier
[ "$recipe" = hour ] || python tools/export_weights.py $out/hoi/model.safetensors --format built-in --out hoi/assets/tiny.safetensors
echo "done: look at $out/hoi/preview_*.png, then python sample.py --checkpoint $out/hoi/model.safetensors; to measure by its verifier: python -m hoi.verify DIR --verifier $out/verifier.safetensors"
