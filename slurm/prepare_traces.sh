#!/usr/bin/env bash
# Records into checked, packed traces: a run's stores.
#
#   sbatch [--ntasks=K] slurm/prepare_traces.sh --config configs/FILE.yaml [a.b=c ...]
#
# Any number of tasks, on any nodes: the same bytes. A job that was killed goes on when it is submitted
# again. NMAR_VENV or NMAR_CONTAINER choose the environment; see docs/cluster.md.
#SBATCH --job-name=nmar-prepare
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=nmar-prepare-%j.log
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
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
find_home
# shellcheck source=slurm/lib.sh
. "$NMAR_HOME/slurm/lib.sh"
set_up
learn_output "$@"
prepare=("${nmar_python[@]}" "$NMAR_HOME/launcher/prepare.py" "$@")
[ "${SLURM_NTASKS:-1}" -gt 1 ] || exec "${prepare[@]}"
exec srun --kill-on-bad-exit=1 "${prepare[@]}"
