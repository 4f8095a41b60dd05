#!/usr/bin/env bash
# The main job from end to end: prepare -> train -> export -> examine.
# Arguments are configuration overrides (a.b=c), for example objective.preset=sft.
set -euo pipefail

BIN=${BIN:?the bin folder of the virtual environment}
CONFIG=${CONFIG:?a run configuration}
RUN=${RUN:?the run folder: output in the configuration}
PATH="$BIN:$PATH"

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

settings=("output=$RUN" "data.store=$RUN/store" "tokenizer.path=$RUN/tokenizer.model" "$@")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    ranks=(--num_gpus "$gpus")
    # The configuration's four rows a step suit one, two or four ranks; other numbers get one each.
    if [ "$gpus" -gt 2 ]; then
        settings+=("training.micro_batch_rows=1")
    fi
    if [ $((4 % gpus)) -ne 0 ]; then
        settings+=("training.global_batch_rows=$gpus")
    fi
else
    export DS_ACCELERATOR=cpu
    ranks=(--num_gpus 2)
    settings+=("training.world_size=2")
fi
# Several jobs may share this machine.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
files() { # the record files of a part, one a line
    python -c 'import sys; from nmar_ds.config import load_config
print(*getattr(load_config(sys.argv[1], sys.argv[3:]).data, sys.argv[2]), sep="\n")' "$CONFIG" "$1" "${settings[@]}"
}

say "prepare traces"
python launcher/prepare.py --config "$CONFIG" "${settings[@]}"

say "train"
deepspeed --log_level warning "${ranks[@]}" --master_port "$port" \
    launcher/train.py --config "$CONFIG" "${settings[@]}"

say "export"
python launcher/export.py --run "$RUN" --output "$RUN/export" --overwrite

say "examine on held-out problems"
mapfile -t heldout < <(files heldout)
mapfile -t training < <(files train)
python launcher/evaluate_undo.py --model "$RUN/export" --heldout "${heldout[@]}" \
    --train "${training[@]}" --output "$RUN/report.json"
say "done"
