#!/usr/bin/env bash
# Submit prepare, train, export and evaluate as one chain; each starts when the one before is done.
#
#   slurm/submit_all.sh [flags of sbatch for training] -- --config configs/FILE.yaml [a.b=c ...] \
#       [-- options of the examination]
#
# Prints the job ids. Training may be requeued any number of times: the others wait for its end, and
# are cancelled if it fails. Partition and account for all: SBATCH_PARTITION, SBATCH_ACCOUNT.
set -euo pipefail

case "${1:---help}" in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
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

submit() { # NAME FLAGS-AND-SCRIPT: prints the id
    local name=$1 id
    shift
    id=$(sbatch --parsable "$@")
    printf '%-9s job %s\n' "$name" "${id%%;*}" >&2
    printf '%s\n' "${id%%;*}"
}
after() { printf -- '--dependency=afterok:%s' "$1"; }

prepare=$(submit prepare "$NMAR_HOME/slurm/prepare_traces.sh" "${settings[@]}")
train=$(submit train "$(after "$prepare")" --kill-on-invalid-dep=yes "${flags[@]}" \
    "$NMAR_HOME/slurm/train_msft.sh" "${settings[@]}")
export=$(submit export "$(after "$train")" --kill-on-invalid-dep=yes \
    "$NMAR_HOME/slurm/export.sh" "${settings[@]}")
evaluate=$(submit evaluate "$(after "$export")" --kill-on-invalid-dep=yes \
    "$NMAR_HOME/slurm/evaluate.sh" "$@")
printf '%s\n' "$prepare" "$train" "$export" "$evaluate"
