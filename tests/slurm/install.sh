#!/usr/bin/env bash
# Install Slurm and munge where root and apt are there. Exit codes: 0 they are here, 3 they can't be.
set -euo pipefail
present() { command -v slurmctld slurmd sbatch srun munged > /dev/null; }
present && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "Slurm's tests need slurmctld, slurmd, sbatch and munged: Debian's slurm-wlm and munge" >&2
    exit 3
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge
present
