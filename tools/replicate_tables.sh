#!/usr/bin/env bash
# Toy replicas of the paper's Tables 1 to 5: short, equally long fine-tunes of the miniature, three seeds each, measured
# on pictures of held-out shapes and views, beside the paper's own numbers.
#
#     bash tools/replicate_tables.sh 1            # LDM, DreamBooth, ControlNet, HOIDiffusion: 4 rows
#     bash tools/replicate_tables.sh 2            # the same rows, contact and joints
#     bash tools/replicate_tables.sh 3            # does the data help?  tools/replicate_table_3.sh
#     bash tools/replicate_tables.sh 4            # without normal, skeleton, segmentation; none; all; and with normals as
#                                                 # an estimator sees them: 8 rows
#     bash tools/replicate_tables.sh 5            # with and without regularisation: 2 rows
#     bash tools/replicate_tables.sh all          # everything: 11 rows, since tables share some, and Table 3
#     bash tools/replicate_tables.sh all quick    # a few steps and pictures: does it go through?  Its numbers mean nothing
#
# docs/paper.md says how long a row takes.  Interrupt it whenever you like: the same command goes on where it stopped.
# Seeds come one after the other, so that a whole table of the first stands early: SEEDS=0 makes that alone.
#
# It needs what tools/train_tiny.sh leaves in runs/toy: base/model.safetensors, lab, buffer, text/clip.safetensors.  The
# reference of the Frechet distance is laboratory pictures; the base model should not have seen any, as Stable Diffusion
# never saw DexYCB (train it on --style scenic).
# Outputs: runs/replica/NAME/SEED/model.safetensors, lab, scenic (pictures), numbers.json; table_N.md, sheet.png.
# STEPS=1200 OUT=runs/replica-1200 fine-tunes longer; VERIFIER=FILE takes another network than the built-in one.
set -euo pipefail
cd "$(dirname "$0")/.."
given=${OUT:-}
if [ "${2:-}" = quick ]; then
    OUT=${OUT:-runs/replica-quick} STEPS=2 SEEDS=${SEEDS:-0 1} count=4 references=8 batch=2 reg_batch=2 sampling="--steps 2"
    objects="--object mug --object-instances 1 --grasps-per-object 1"
    EVALUATION=$OUT/evaluation lab=$OUT/lab buffer_of=$OUT/reference # nothing of the full size is encoded
elif [ -n "${2:-}" ]; then
    echo "unknown word '$2'; expected quick or nothing" >&2; exit 1
fi
out=${OUT:-runs/replica} steps=${STEPS:-600} seeds=${SEEDS:-0 1 2} toy=${TOY:-runs/toy} sampling=${sampling:-}
evaluation=${EVALUATION:-runs/evaluation} verifier=${VERIFIER:-hoi/assets/verifier.safetensors}
count=${count:-208} references=${references:-2000} batch=${batch:-12} reg_batch=${reg_batch:-4}
objects=${objects:---object-instances 4 --grasps-per-object 4}
lab=${lab:-$toy/lab} buffer_of=${buffer_of:-$toy/buffer}
baselines="all none dreambooth controlnet" # DreamBooth's prior is pictures of `all`
ablations="all none no-normal no-skeleton no-segmentation estimated estimated-no-skeleton estimated-no-segmentation"
case ${1:-} in
    1) tables=1 names=$baselines ;;
    2) tables=2 names=$baselines ;;
    3) exec bash tools/replicate_table_3.sh ${2:-} ;;
    4) tables="4 4e" names=$ablations ;;
    5) tables=5 names="all no-regularization" ;;
    all) tables="1 2 4 4e 5" names="$baselines no-regularization ${ablations#all none}" ;;
    *) echo "unknown table '${1:-}'; expected 1, 2, 3, 4, 5 or all" >&2; exit 1 ;;
esac
for needed in "$toy"/{{base/model,text/clip}.safetensors,{lab,buffer}/metadata.jsonl} "$verifier"; do
    [ -e "$needed" ] || { echo "$needed is missing; the head of $0 says what makes it. Without training, the end of" \
        "docs/lesson.md compares conditions at sampling time, in a quarter of an hour" >&2; exit 1; }
done
python -c "import sys; from hoi.common.tensors import WeightFile
sys.exit(any(name.startswith('condition_encoders') for name in WeightFile(sys.argv[1])) and
    f'{sys.argv[1]} has condition encoders; every row must begin with a base model without any')" "$toy/base/model.safetensors"

mkdir -p "$out/latents" # one autoencoder, one set of pictures: encoded once for all fine-tunes

# The records of tools/evaluate_tiny.sh: laboratory ones for the Frechet distance, whose reference is other views of their
# shapes, scenic ones for everything else.  All models learn from laboratory pictures.
shapes="--shade --size 128 --framing tight --no-paraphrase --workers 2 --content hand_object=1 $objects"
[ "$lab" = "$toy/lab" ] || python make_dataset.py $shapes --style lab --seed 1 --looks 1 --count 8 --out "$lab"
python make_dataset.py $shapes --style scenic --object-seed 900 --seed 900 --looks 1 --count $count --out "$evaluation/scenic"
python make_dataset.py $shapes --style lab --object-seed 7300 --seed 7300 --looks 1 --count $count --out "$evaluation/lab"
python make_dataset.py $shapes --style lab --object-seed 7300 --seed 7301 --looks 2 --count $references \
    --out "$out/reference"
if [[ $names = *dreambooth* ]]; then # conditions of its prior: of shapes that are learned from, not those of the test
    python make_dataset.py $shapes --style scenic --object-seed 100 --seed 910 --looks 1 --count $count --out "$out/prior"
fi
for place in lab scenic; do
    python -c "import sys; from hoi.data.folder import read_records
for record in read_records(sys.argv[1]): print(record['text'])" "$evaluation/$place" > "$out/captions-$place.txt"
    sed -E 's/grasping an? /grasping a sks /' "$out/captions-$place.txt" > "$out/captions-$place-sks.txt"
done
if [[ $names = *estimated* ]]; then # of pictures as they are, normals as MiDaS would see them
    python tools/evaluation_folders.py normals "$lab" "$out/estimated/train"
    for place in lab scenic; do
        python tools/evaluation_folders.py normals "$evaluation/$place" "$out/estimated/$place"
    done
fi

fine_tune() { # NAME SEED: a model, and its pictures of both sets of records
    local run=$out/$1/$2 data=$lab conditions=$evaluation text=
    local how="--conditions skeleton normal segmentation" buffer="--reg-data $buffer_of --reg-batch-size $reg_batch"
    case $1 in
        no-normal) how="--conditions skeleton segmentation" ;;
        *no-skeleton) how="--conditions normal segmentation" ;;
        *no-segmentation) how="--conditions skeleton normal" ;;
        none) how="--conditions none" text=.txt ;; # the same as --baseline ldm
        dreambooth)
            how="--baseline dreambooth" text=-sks.txt buffer="--reg-data $out/all/$2/prior --reg-batch-size $reg_batch"
            python sample.py --data "$out/prior" --checkpoint "$out/all/$2/model.safetensors" --seed "$2" $sampling \
                --out "$out/all/$2/prior"
            ;;
        controlnet) how="--baseline controlnet" buffer= ;; # all that it could forget is frozen
        no-regularization) buffer= ;;
    esac
    case $1 in estimated*) data=$out/estimated/train conditions=$out/estimated ;; esac
    mkdir -p "$run"
    ln -sfn ../../latents "$run/latents"
    python train.py --stage hoi --data "$data" $buffer $how \
        --base "$toy/base/model.safetensors" --out "$run" --steps "$steps" --batch-size $batch --learning-rate 1e-3 \
        --clip-gradient 0.3 --warmup-steps 100 --cosine --caption-dropout 0.1 --ema-decay 0.998 \
        --save-every 200 --keep-states 1 --seed "$2"
    for place in lab scenic; do
        # A model without conditions gets the same captions and the same noise.
        local given="--data $conditions/$place"
        [ -z "$text" ] || given="--no-conditions --prompts-file $out/captions-$place$text"
        python sample.py $given --checkpoint "$run/model.safetensors" --seed "$2" $sampling --out "$run/$place"
    done
}
for seed in $seeds; do
    for name in $names; do fine_tune $name $seed; done
done
python tools/replica_table.py --tables $tables --seeds $seeds --evaluation "$evaluation" --reference "$out/reference" \
    --clip "$toy/text/clip.safetensors" --verifier "$verifier" --out "$out"
# Beside the other tables: both have a folder `shaded`.
[ "$1" != all ] || OUT=${given:+$given/table-3} bash tools/replicate_table_3.sh ${2:-}
