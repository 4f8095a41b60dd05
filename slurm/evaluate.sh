#!/usr/bin/env bash
# Examine <output>/export on the held-out records; options of the examination follow --.
#
#   sbatch slurm/evaluate.sh --config configs/FILE.yaml [a.b=c ...] [-- --num-problems 50 ...]
#
# One task. NMAR_VENV or NMAR_CONTAINER choose the environment; see docs/cluster.md.
#SBATCH --job-name=nmar-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=nmar-evaluate-%j.log
set -euo pipefail

find_home() { # Slurm runs a copy of this script from a spool folder, so the project is looked for
    local place
    for place in "${NMAR_HOME:-}" "$(dirname -- "${BASH_SOURCE[0]}")/.." \
        "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
        if [ -n "$place" ] && [ -r "$place/slurm/lib.sh" ]; then
            NMAR_HOME=$(cd -- "$place" && pwd) && export NMAR_HOME && return
        fi
    done
    echo "error: slurm/lib.sh not found; submit from the project's folder or set NMAR_HOME" >&2
    exit 2
}

case "${1:---help}" in
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
find_home
# shellcheck source=slurm/lib.sh
. "$NMAR_HOME/slurm/lib.sh"
set_up
settings=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    settings+=("$1")
    shift
done
[ "$#" -eq 0 ] || shift
learn_output "${settings[@]}"
heldout=() training=()
mapfile -d '' -t heldout < <(get data.heldout "${settings[@]}")
mapfile -d '' -t training < <(get data.train "${settings[@]}")
exec "${nmar_python[@]}" "$NMAR_HOME/launcher/evaluate_undo.py" --model "$nmar_output/export" \
    --heldout "${heldout[@]}" --train "${training[@]}" --output "$nmar_output/report.json" "$@"
