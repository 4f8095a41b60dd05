#!/usr/bin/env bash
# SmolLM2-135M-Instruct from end to end: convert -> prepare -> train -> export -> examine.
# Arguments are configuration overrides (a.b=c).
set -euo pipefail

BIN=${BIN:?the bin folder of the virtual environment}
CONFIG=${CONFIG:?a run configuration}
RUN=${RUN:?the run folder: output in the configuration}
MODEL=${MODEL:?the model folder: model.path in the configuration}
PATH="$BIN:$PATH"

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

settings=("output=$RUN" "data.store=$RUN/store" "model.path=$MODEL" "tokenizer.path=$MODEL" "$@")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    ranks=(--num_gpus "$gpus")
    settings+=("training.micro_batch_rows=1")
    if [ $((4 % gpus)) -ne 0 ]; then
        settings+=("training.global_batch_rows=$gpus")
    fi
else
    export DS_ACCELERATOR=cpu
    ranks=(--num_gpus 2)
    settings+=("training.world_size=2")
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
examples=examples/quickstart

say "convert the weights"
python examples/smollm2/convert.py --output "$MODEL"

say "prepare traces"
python launcher/prepare.py --config "$CONFIG" "${settings[@]}"

say "train"
deepspeed --log_level warning "${ranks[@]}" --master_port "$port" \
    launcher/train.py --config "$CONFIG" "${settings[@]}"

say "export"
python launcher/export.py --run "$RUN" --output "$RUN/export" --overwrite

say "examine on held-out problems"
python launcher/evaluate_undo.py --model "$RUN/export" --heldout $examples/chain_sum.heldout.jsonl \
    --train $examples/chain_sum.train.jsonl --batch-size 64 --output "$RUN/report.json"
say "done"
