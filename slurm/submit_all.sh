#!/usr/bin/env bash
# Submit prepare, train, export and evaluate as one chain; each starts when the one before is done.
#
#   slurm/submit_all.sh [flags of sbatch for training] -- --config configs/FILE.yaml [a.b=c ...] \
#       [-- options of the examination]
#
# Prints the job ids; where one job is not accepted, those before it are cancelled. Training may be
# requeued any number of times: the others wait for its end, and are cancelled if it fails.
# Partition and account for all: SBATCH_PARTITION, SBATCH_ACCOUNT.
set -euo pipefail

case "${1:---help}" in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
flags=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    flags+=("$1")
    shift
done
if [ "$#" -lt 2 ]; then
    echo "error: no -- between the flags and --config FILE; see --help" >&2
    exit 2
fi
shift
settings=()
for word in "$@"; do
    [ "$word" != -- ] || break
    settings+=("$word")
done
NMAR_HOME=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export NMAR_HOME

submitted=()
withdraw() { # a chain that cannot be submitted whole is not left half submitted
    [ "$?" -ne 0 ] && [ "${#submitted[@]}" -gt 0 ] || return 0
    echo "error: not all jobs were accepted (see above); cancelling ${submitted[*]}" >&2
    scancel "${submitted[@]}"
}
trap withdraw EXIT

submit() { # NAME FLAGS-AND-SCRIPT: sets nmar_id
    local name=$1 answer
    shift
    answer=$(sbatch --parsable "$@")
    nmar_id=${answer%%;*}
    [[ $nmar_id =~ ^[0-9]+$ ]] || { echo "error: sbatch answered '$answer', expected a job id" >&2; exit 1; }
    submitted+=("$nmar_id")
    printf '%-9s job %s\n' "$name" "$nmar_id" >&2
}
follow() { # NAME FLAGS-AND-SCRIPT: after the latest one, and cancelled if that fails
    local name=$1
    shift
    submit "$name" "--dependency=afterok:$nmar_id" --kill-on-invalid-dep=yes "$@"
}

submit prepare "$NMAR_HOME/slurm/prepare_traces.sh" "${settings[@]}"
follow train "${flags[@]}" "$NMAR_HOME/slurm/train_msft.sh" "${settings[@]}"
follow export "$NMAR_HOME/slurm/export.sh" "${settings[@]}"
follow evaluate "$NMAR_HOME/slurm/evaluate.sh" "$@"
printf '%s\n' "${submitted[@]}"
