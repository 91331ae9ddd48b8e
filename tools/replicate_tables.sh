#!/usr/bin/env bash
# Toy replicas of the paper's Tables 4, 5 and 2: short, equally long fine-tunes of the miniature, each measured on 208
# pictures of held-out shapes and views, beside the paper's own numbers.
#
#     bash tools/replicate_tables.sh 4      # without normal, skeleton, segmentation; none; all: 5 fine-tunes
#     bash tools/replicate_tables.sh 5      # with and without regularisation: 2 fine-tunes
#     bash tools/replicate_tables.sh 2      # all conditions against none: 2 fine-tunes
#     bash tools/replicate_tables.sh all    # the three tables: 6 fine-tunes, since they share some
#
# On one CPU core, with other work on the second, a fine-tune took 12 to 20 minutes (17 to 20 pictures a second) and its
# 208 pictures 3; data are prepared in 3 before the first one, and at the end every model is measured in some seconds:
# `all` took two hours.  Interrupt it whenever you like: the same command goes on where it stopped.
#
# It needs what tools/train_tiny.sh leaves in runs/toy: base/model.safetensors, lab, buffer, text/clip.safetensors.
# Outputs: runs/replica/NAME/model.safetensors, pictures, numbers.json of each; table_4.md, table_5.md, table_2.md.
# STEPS=1200 OUT=runs/replica-1200 fine-tunes longer; VERIFIER=FILE takes another network than the built-in one.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/replica} toy=${TOY:-runs/toy} evaluation=${EVALUATION:-runs/evaluation} steps=${STEPS:-600}
verifier=${VERIFIER:-hoi/assets/verifier.safetensors}
case ${1:-} in
    4) tables=4 names="all no-normal no-skeleton no-segmentation none" ;;
    5) tables=5 names="all no-regularization" ;;
    2) tables=2 names="all none" ;;
    all) tables="4 5 2" names="all none no-regularization no-normal no-skeleton no-segmentation" ;;
    *) echo "unknown table '${1:-}'; expected 4, 5, 2 or all" >&2; exit 1 ;;
esac
for needed in "$toy"/{{base/model,text/clip}.safetensors,{lab,buffer}/metadata.jsonl} "$verifier"; do
    [ -e "$needed" ] || { echo "$needed is missing; the head of $0 says what makes it. Without training, the end of" \
        "docs/lesson.md compares conditions at sampling time, in a quarter of an hour" >&2; exit 1; }
done

mkdir -p "$out/latents" # one autoencoder, one set of pictures: encoded once for all fine-tunes

# The records are those of tools/evaluate_tiny.sh; other views of their shapes are the reference of the Frechet distance:
# in every look, as the captions are, while all models learn from laboratory pictures.
shapes="--shade --size 128 --framing tight --grasps-per-object 4 --style any --no-paraphrase --workers 2
    --content hand_object=1 --object-instances 4 --object-seed 900"
python make_dataset.py $shapes --seed 900 --looks 1 --count 208 --out "$evaluation/shaded"
python make_dataset.py $shapes --seed 901 --looks 2 --count 2000 --out "$out/reference"
python -c "import sys; from hoi.data.folder import read_records
for record in read_records(sys.argv[1]): print(record['text'])" "$evaluation/shaded" > "$out/captions.txt"

for name in $names; do
    conditions="skeleton normal segmentation" buffer="--reg-data $toy/buffer --reg-batch-size 8"
    case $name in
        no-normal) conditions="skeleton segmentation" ;;
        no-skeleton) conditions="normal segmentation" ;;
        no-segmentation) conditions="skeleton normal" ;;
        none) conditions=none ;;
        no-regularization) buffer= ;;
    esac
    mkdir -p "$out/$name"
    ln -sfn ../latents "$out/$name/latents"
    python train.py --stage hoi --data "$toy/lab" $buffer --conditions $conditions \
        --base "$toy/base/model.safetensors" --out "$out/$name" --steps "$steps" --batch-size 24 --learning-rate 1e-3 \
        --clip-gradient 0.3 --warmup-steps 100 --cosine --caption-dropout 0.1 --ema-decay 0.998 \
        --save-every 200 --keep-states 1
    # A model without conditions gets the same captions and the same noise.
    given="--data $evaluation/shaded"
    [ "$name" != none ] || given="--no-conditions --prompts-file $out/captions.txt"
    python sample.py $given --checkpoint "$out/$name/model.safetensors" --out "$out/$name/pictures"
done
python tools/replica_table.py --tables $tables --shaded "$evaluation/shaded" --reference "$out/reference" \
    --clip "$toy/text/clip.safetensors" --verifier "$verifier" --out "$out"
