#!/usr/bin/env bash
# Reproduce nano's training from start to finish: scripts/train_nano.sh PICTURES [OUTPUT] [--tiny MODEL]
#
# PICTURES holds captions.json, splits.json, annotations.jsonl (docs/nano.md) and the pictures, loose or in tar files.
# Everything is written to OUTPUT (default: nano-training). Rerun the same command to resume: finished
# steps are skipped, and an interrupted step resumes from its checkpoint.
# The result is OUTPUT/adapter, which ships as src/flash_vstream/models/nano_adapter.
#
# --tiny MODEL runs every step for two batches on the model in folder MODEL, to test the whole script in a minute.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

pictures= output= tiny_model=
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) [ $# -ge 2 ] || usage; tiny_model=$(realpath "$2"); shift 2 ;;
        -*) usage ;;
        *) if [ -z "$pictures" ]; then pictures=$1; elif [ -z "$output" ]; then output=$1; else usage; fi; shift ;;
    esac
done
[ -n "$pictures" ] || usage
for file in captions.json annotations.jsonl; do
    [ -f "$pictures/$file" ] || { echo "train_nano: $pictures holds no $file" >&2; exit 2; }
done
pictures=$(realpath "$pictures")
configs=$(realpath "$(dirname "$0")/../configs")
output=${output:-nano-training}
mkdir -p "$output/configs"
cd "$output" # the configs refer to each other's results as runs/NAME/result

model=${tiny_model:-nano-base}
for file in "$configs"/nano-{tower,stage1,stage2}.yaml; do
    if [ -n "$tiny_model" ]; then
        sed -e "s|^model: .*|model: $tiny_model|" -e 's/^steps: .*/steps: 2/' -e 's/^batch_size: .*/batch_size: 2/' \
            -e 's/questions: [0-9]*/questions: 2/' "$file" > "configs/$(basename "$file")"
    else
        cp "$file" configs/
    fi
done

# step NAME RESULT COMMAND...: run a command that writes RESULT last, unless it has already finished.
step() {
    local name=$1 result=$2
    shift 2
    if [ -e "$result" ] && [ -e "finished/$name" ]; then
        echo "train_nano: $name is finished" >&2
        return
    fi
    echo "train_nano: $name" >&2
    "${FLASH_VSTREAM:-flash-vstream}" "$@"
    mkdir -p finished && touch "finished/$name"
}

stage() { # stage NUMBER NAME CONFIG
    step "$2" "runs/$2/result" train "stage$1" "configs/$3.yaml" --data runs/tower/prepared --output "runs/$2"
}

step tower runs/tower/tower-check.json train tower configs/nano-tower.yaml --data "$pictures" --output runs/tower
stage 1 stage1 nano-stage1
stage 2 stage2 nano-stage2
step export adapter/card.json train export runs/stage2/result adapter
echo "train_nano: the adapter is in $PWD/adapter" >&2
