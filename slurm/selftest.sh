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

# Slurm runs a copy of this script from its spool: the folder it was submitted from is the tree.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    cd -- "${SLURM_SUBMIT_DIR:?}" || exit 2
else
    cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2
fi
[[ -f launcher/selftest.py ]] || fail "$PWD: has no launcher/selftest.py, expected to be submitted from the repository's root"

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
if [[ -n ${PYTHON:-} ]]; then
    python=("$PYTHON")
elif [[ -n ${NMAR_VENV:-}${NMAR_CONTAINER:-} && -f slurm/lib.sh ]]; then
    export NMAR_HOME=$PWD
    # shellcheck disable=SC1091,SC2154 # it sets nmar_python
    source slurm/lib.sh && set_up && python=("${nmar_python[@]}")
elif [[ -x .venv/bin/python ]]; then
    python=(.venv/bin/python)
else
    python=(python3)
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

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
