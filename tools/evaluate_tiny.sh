#!/usr/bin/env bash
# The figures of the built-in model: 208 pictures of shapes and views that it was not trained on.
#
#     bash tools/evaluate_tiny.sh [CHECKPOINT]             # about 3 minutes on two CPU cores; prints the table
#     bash tools/evaluate_tiny.sh CHECKPOINT guidance      # one table for each guidance scale, on other shapes again
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:-hoi/assets/tiny.safetensors}
mode=${2:-report}
out=runs/evaluation
toy="--shade --size 128 --framing tight --grasps-per-object 4 --style any --no-paraphrase --workers 2"
case $mode in
    report) shaded=$out/shaded shapes=900 num=208 scales=default ;;
    guidance) shaded=$out/shaded_guidance shapes=800 num=104 scales="2 3 4.5" ;; # the scale is chosen on these
    *) echo "unknown mode '$mode'; expected report or guidance" >&2; exit 1 ;;
esac

python make_dataset.py $toy --content hand_object=1 --object-instances 4 --object-seed $shapes --seed $shapes --looks 1 \
    --count $num --out $shaded
for scale in $scales; do
    generated=$out/generated-$(sha256sum "$checkpoint" | cut -c1-12)-$shapes-$scale
    flag=$([ "$scale" = default ] || echo "--guidance-scale $scale")
    python sample.py --data $shaded --checkpoint "$checkpoint" --out "$generated" $flag
    echo "shapes from $shapes on, guidance $scale"
    python -m hoi.verify measure --shaded $shaded --generated "$generated"
done
