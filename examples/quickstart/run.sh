#!/usr/bin/env bash
# The main job from end to end: prepare -> train -> export -> evaluate.
# Arguments are configuration overrides (a.b=c), for example objective.preset=sft.
set -euo pipefail

BIN=${BIN:?the bin folder of the virtual environment}
CONFIG=${CONFIG:?a run configuration}
RUN=${RUN:?the run folder: output in the configuration}
PATH="$BIN:$PATH"

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

launch=(deepspeed --log_level warning)
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    ranks=() # all visible GPUs
    expected=()
else
    export DS_ACCELERATOR=cpu
    ranks=(--num_gpus 2)
    expected=(training.world_size=2)
fi
# Several jobs may share this machine.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

say "prepare traces"
python launcher/prepare.py --config "$CONFIG" output="$RUN" "$@"

say "train"
"${launch[@]}" "${ranks[@]}" --master_port "$port" \
    launcher/train.py --config "$CONFIG" output="$RUN" "${expected[@]}" "$@"

say "export"
python launcher/export.py --run "$RUN" --output "$RUN/export" --overwrite

say "evaluate on held-out problems"
heldout=(examples/quickstart/*.heldout.jsonl)
training=(examples/quickstart/*.train.jsonl)
python launcher/evaluate_undo.py --model "$RUN/export" --heldout "${heldout[@]}" \
    --train "${training[@]}" --output "$RUN/report.json"
say "done"
