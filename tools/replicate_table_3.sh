#!/usr/bin/env bash
# A toy replica of the paper's Table 3: do generated pictures help a pose network, and a hand estimator?
#
#     bash tools/replicate_table_3.sh          # the same as tools/replicate_tables.sh 3
#     bash tools/replicate_table_3.sh quick    # a few steps and pictures: does it go through?  Its numbers mean nothing
#
# "Real" are pictures of the toy world's scenic looks, with hands, of shapes that nothing was generated from.  Training
# sets have equal size and poses: plain renderings of the objects alone, the same with half of them replaced by generated,
# by generated and judged, or by shaded pictures, and shaded pictures alone.  docs/paper.md says how long it takes.
# Interrupt it whenever you like: the same command goes on where it stopped.
# Outputs: runs/table-3/NAME/SEED/poses.json, hands/NAME/SEED.safetensors, table_3.md.
# MODEL=FILE generates with another model than the built-in one, VERIFIER=FILE judges with another network.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = quick ]; then
    OUT=${OUT:-runs/table-3-quick} STEPS=2 SEEDS=${SEEDS:-0 1} poses=8 tests=8 sampling="--steps 4"
    objects="--object mug --object-instances 1 --grasps-per-object 1"
elif [ -n "${1:-}" ]; then
    echo "unknown word '$1'; expected quick or nothing" >&2; exit 1
fi
out=${OUT:-runs/table-3} steps=${STEPS:-600} seeds=${SEEDS:-0 1 2} poses=${poses:-1000} tests=${tests:-416}
model=${MODEL:-hoi/assets/tiny.safetensors} verifier=${VERIFIER:-hoi/assets/verifier.safetensors}
keep="iou_hand>90%,iou_object>80%,pck>60%" # the cut that docs/measuring.md recommends
mkdir -p "$out"

toy="--shade --size 128 --framing tight --workers 2 --no-paraphrase"
learned="--object-seed 100 ${objects:---object-instances 20 --grasps-per-object 4}"
held_out="--object-seed 900 ${objects:---object-instances 8 --grasps-per-object 4}"
python make_dataset.py $toy $learned --style scenic --seed 100 --count $poses --out "$out/shaded"
python make_dataset.py $toy $learned --style lab --seed 101 --count $poses --out "$out/lab"
python make_dataset.py $toy $held_out --style scenic --seed 902 --count $tests --out "$out/test"
python tools/evaluation_folders.py plain "$out/shaded" "$out/plain"
python sample.py --data "$out/shaded" --checkpoint "$model" ${sampling:-} --out "$out/generated"
[ -e "$out/passing.txt" ] ||
    python -m hoi.verify "$out/generated" --verifier "$verifier" --keep "$keep" --list "$out/passing.txt"

names() { # FOLDER FIRST STEP: file names of every STEP-th record
    python -c "import sys; from hoi.data.folder import read_records
for record in read_records(sys.argv[1])[int(sys.argv[2])::int(sys.argv[3])]: print(record['file_name'])" "$@"
}
part() { # NAME FOLDER: the pictures of FOLDER that the list NAME.txt names, as a folder
    python -m hoi.verify "$out/$2" --keep "$out/$1.txt" --out "$out/parts/$1"
}
names "$out/plain" 0 1 > "$out/all.txt"
names "$out/plain" 0 2 > "$out/half-plain.txt"
for name in generated shaded; do names "$out/$name" 1 2 > "$out/half-$name.txt"; done
# Of those that pass the judge as many as a half, the others are plain: every pose once.
head -n "$(wc -l < "$out/half-generated.txt")" "$out/passing.txt" > "$out/judged.txt"
grep -vxFf "$out/judged.txt" "$out/all.txt" > "$out/beside-judged.txt" || [ $? = 1 ] # 1: none is left
part half-plain plain; part half-generated generated; part half-shaded shaded
part judged generated; part beside-judged plain

for seed in $seeds; do
    for name in plain half-generated judged half-shaded shaded; do
        case $name in
            plain | shaded) data=$out/$name ;;
            judged) data="$out/parts/judged $out/parts/beside-judged" ;;
            *) data="$out/parts/$name $out/parts/half-plain" ;;
        esac
        run=$out/$name/$seed
        mkdir -p "$run"
        [ -e "$run/pose.safetensors" ] || python -m hoi.metrics.pose_network train --data $data --seed $seed \
            --steps $steps --out "$run/pose.safetensors"
        [ -e "$run/poses.json" ] || python -m hoi.metrics.pose_network predict --data "$out/test" \
            --network "$run/pose.safetensors" --out "$run/poses.json"
        [ -e "$run/metrics.json" ] || python -m hoi.metrics --fake "$out/test" --poses "$run/poses.json" --boxes aabb \
            --bootstrap 0 --out "$run"
    done
    mkdir -p "$out/hands"
    for name in lab lab-generated lab-shaded; do # a hand estimator: the verifier's joints
        file=$out/hands/$name/$seed.safetensors
        [ -e "$file" ] || python -m hoi.verify train --data "$out/lab" $([ $name = lab ] || echo "$out/${name#lab-}") \
            --allow-generated --steps $steps --seed $seed --out "$file"
    done
done
python tools/pose_table.py --out "$out" --seeds $seeds
