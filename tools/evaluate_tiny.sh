#!/usr/bin/env bash
# The README's figures of the built-in model: 208 pictures of shapes and views that it was not trained on.
#
#     bash tools/evaluate_tiny.sh [CHECKPOINT]        # about 15 minutes on two CPU cores; prints the table
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:-hoi/assets/tiny.safetensors}
out=runs/evaluation
toy="--shade --size 128 --framing tight --grasps-per-object 4 --style any --no-paraphrase --workers 2"

# The judge learns from shaded pictures of its own shapes; the records that it judges are of others.
python make_dataset.py $toy --content hand_object=0.8 object=0.1 scenery=0.1 --object-instances 6 --object-seed 500 \
    --seed 500 --looks 3 --num 3600 --out $out/judge_data
[ -f $out/judge.safetensors ] || python -m hoi.verify train --data $out/judge_data --out $out/judge.safetensors --minutes 6
python make_dataset.py $toy --content hand_object=1 --object-instances 4 --object-seed 900 --seed 900 --looks 1 \
    --num 208 --out $out/shaded
generated=$out/generated-$(sha256sum "$checkpoint" | cut -c1-12)
python sample.py --data $out/shaded --checkpoint "$checkpoint" --out "$generated"
python -m hoi.verify measure --judge $out/judge.safetensors --shaded $out/shaded --generated "$generated"
