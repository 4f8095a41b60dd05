#!/usr/bin/env bash
# Train on a Slurm cluster: one task per GPU (or CPU rank), requeued until the run is complete.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_msft.sh \
#       --config configs/FILE.yaml [a.b=c ...]
#
# Flags of sbatch choose nodes, GPUs, time and the seconds of warning (--signal=B:USR2@SECONDS).
# NMAR_VENV or NMAR_CONTAINER choose the environment; docs/cluster.md tells the rest.
# Exit codes: 0 complete; 1 failed; 2 bad input; 3 no progress; 4 run folder in use; 6 STOP file.
#SBATCH --job-name=nmar-train
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@180
#SBATCH --output=nmar-train-%j.log
set -uo pipefail

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
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
find_home
# shellcheck source=slurm/lib.sh
. "$NMAR_HOME/slurm/lib.sh"
[ -n "${SLURM_JOB_ID:-}" ] || die 2 "not inside a job: start this with sbatch"
nmar_step='' nmar_signalled='' nmar_warned=''
trap 'forward USR2' USR2
trap 'forward TERM' TERM
set_up
learn_output "$@"
meeting_place
say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: ${SLURM_NTASKS:-1} tasks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT, newest checkpoint $(newest)"

[ ! -L "$nmar_output/slurm" ] || die 2 "$nmar_output/slurm: is a link, expected a folder or nothing: not requeued"
export NMAR_EXIT_CODES="$nmar_output/slurm/job-$SLURM_JOB_ID/codes-${SLURM_RESTART_COUNT:-0}"
mkdir -p -- "$NMAR_EXIT_CODES" || die 2 "cannot write $nmar_output: not requeued"

# Preflight: a bad node is named before hours are spent on it.
if [ "${NMAR_PREFLIGHT:-1}" != 0 ]; then
    run_step "${nmar_python[@]}" "$NMAR_HOME/launcher/preflight.py" "$@"
    [ "$nmar_code" -ne 2 ] || die 2 "preflight: bad input: not requeued"
    [ "$nmar_code" -eq 0 ] || { say "preflight failed with $nmar_code"; decide; }
fi

run_step "${nmar_python[@]}" -u "$NMAR_HOME/launcher/train.py" "$@"
decide
