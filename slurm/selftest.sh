#!/usr/bin/env bash
# A user's acceptance of their own nodes: about ten minutes, one page of PASS and FAIL.
#
#   sbatch --nodes=2 slurm/selftest.sh [--output DIR] [--phases A,B] [--min-bandwidth GB/s] ...
#   bash slurm/selftest.sh --ranks 2   # one machine, no Slurm
#
# One task per GPU (or CPU rank): add --gpus-per-node and --ntasks-per-node to sbatch as your
# cluster wants them. Each phase is a job step of its own, so a phase that hangs or dies takes no
# other with it. PYTHON names the interpreter (default: .venv/bin/python, else python3), or
# NMAR_VENV or NMAR_CONTAINER do, as for the other job scripts.
# Exit codes: 0 all passed; 1 something failed; 2 bad arguments.
#SBATCH --job-name=nmar-selftest
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:20:00
#SBATCH --output=selftest-%j.log
set -uo pipefail

fail() { printf 'error: %s\n' "$1" >&2; exit 2; }

find_home() { # Slurm runs a copy of this script from a spool folder, so the project is looked for
    local place
    for place in "${NMAR_HOME:-}" "$(dirname -- "${BASH_SOURCE[0]}")/.." \
        "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.."; do
        if [ -n "$place" ] && [ -r "$place/slurm/lib.sh" ]; then
            NMAR_HOME=$(cd -- "$place" && pwd) && export NMAR_HOME && return
        fi
    done
    fail "slurm/lib.sh not found; submit from the project's folder or set NMAR_HOME"
}

case "${1:-}" in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
ranks=1 output=runs/selftest phases=preflight,isolation,exactness,resume,bandwidth more=()
while (($#)); do
    [[ $1 == -* && $# -ge 2 ]] || fail "$1: expected pairs such as --output DIR (or a value is missing)"
    case $1 in
        --ranks) ranks=$2 ;;
        --output) output=$2 ;;
        --phases) phases=$2 ;;
        --dtype | --min-bandwidth | --timeout-seconds) more+=("$1" "$2") ;;
        *) fail "$1: unknown, expected --ranks, --output, --phases, --dtype, --min-bandwidth or --timeout-seconds" ;;
    esac
    shift 2
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks: is $ranks, expected a whole number"
IFS=, read -r -a names <<<"$phases"
for name in "${names[@]}"; do
    case $name in
        preflight | isolation | exactness | resume | bandwidth) ;;
        *) fail "--phases: $name is none of preflight, isolation, exactness, resume, bandwidth" ;;
    esac
done
find_home
cd -- "$NMAR_HOME" || exit 2
# shellcheck source=slurm/lib.sh
. slurm/lib.sh
set_up
python=("${nmar_python[@]}")
if [[ -n ${PYTHON:-} ]]; then
    python=("$PYTHON")
elif [[ -z ${NMAR_VENV:-}${NMAR_CONTAINER:-} && -x .venv/bin/python ]]; then
    python=(.venv/bin/python)
fi

launch() { # <phase>: one process per rank
    local -a command=(launcher/selftest.py --output "$output" --phases "$1" --no-summary "${more[@]}")
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        "${python[@]}" -m torch.distributed.run --nproc_per_node "$ranks" --master_addr 127.0.0.1 \
            --master_port "$("${python[@]}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" \
            "${command[@]}"
        return
    fi
    # torchrun's names for what Slurm knows; every phase meets at a port of its own.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + step) % 40000))
    export MASTER_ADDR MASTER_PORT
    # shellcheck disable=SC2016 # the tasks expand these
    srun --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
        exec "$@"' selftest "${python[@]}" "${command[@]}"
}

step=0
for name in "${names[@]}"; do
    rm -f -- "$output/$name.json"
    launch "$name" || printf 'phase %s ended with exit code %s\n' "$name" "$?"
    step=$((step + 1))
done
exec "${python[@]}" launcher/selftest.py --output "$output" --phases "$phases" --summary
