#!/usr/bin/env bash
# The figures of the built-in model, on shapes and views that it was not trained on, each beside the truth's own.
#
#     bash tools/evaluate_tiny.sh [CHECKPOINT [VERIFIER]]  # 1,248 pictures: about 20 minutes on two CPU cores
#     bash tools/evaluate_tiny.sh CHECKPOINT guidance      # one table for each guidance scale, on other shapes again
#
# Tables: scenic looks, with the skeleton alone as a share of all three conditions; the same with another record's
# skeleton, where "other records" are the skeletons that were not shown; laboratory looks; material words beside a
# colour; colour words on a wooden table.
set -euo pipefail
cd "$(dirname "$0")/.."
checkpoint=${1:-hoi/assets/tiny.safetensors}
mode=${2:-hoi/assets/verifier.safetensors}
out=runs/evaluation
toy="--shade --size 128 --framing tight --grasps-per-object 4 --no-paraphrase --workers 2 --content hand_object=1 --looks 1"
digest=$(sha256sum "$checkpoint" | cut -c1-12)

if [ "$mode" = guidance ]; then # the scale is chosen on these
    shaded=$out/shaded_guidance
    python make_dataset.py $toy --style any --object-instances 4 --object-seed 800 --seed 800 --count 104 --out $shaded
    for scale in 2 3 4.5; do
        generated=$out/$digest/guidance-$scale
        python sample.py --data $shaded --checkpoint "$checkpoint" --out "$generated" --guidance-scale $scale
        python tools/measure_generated.py --shaded $shaded --generated "$generated"
    done
    exit
fi

python make_dataset.py $toy --style scenic --object-instances 4 --object-seed 900 --seed 900 --count 208 --out $out/scenic
python make_dataset.py $toy --style lab --object-instances 4 --object-seed 7300 --seed 7300 --count 208 --out $out/lab
for kind in materials table skeletons; do
    python tools/evaluation_folders.py $kind $out/scenic $out/$kind
done

sample() { # FOLDER NAME FLAG ...: pictures of a folder's conditions and texts
    python sample.py --data $out/$1 --checkpoint "$checkpoint" --out $out/$digest/$2 "${@:3}"
}
measure() { # FOLDER NAME ...: a table; more names are shown as shares of the first
    folder=$1; shift
    echo; echo "$folder"
    python tools/measure_generated.py --verifier "$mode" --shaded $out/$folder --generated "${@/#/$out/$digest/}"
}
alone="--cond-scale normal=0 segmentation=0"
sample scenic scenic
sample scenic skeleton-alone $alone
sample skeletons skeletons $alone
sample lab lab
sample materials materials
sample table table
measure scenic scenic skeleton-alone
for name in skeletons lab materials table; do
    measure $name $name
done
