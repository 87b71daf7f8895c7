#!/usr/bin/env bash
# One merge as a Slurm job array: each task writes its part of the files, and a last job checks and joins them.
#
#   parts=$(sbatch --parsable slurm_array.sh BASE ADAPTER OUT)
#   sbatch --dependency=afterok:"$parts" --array=0 slurm_array.sh BASE ADAPTER OUT --finish
#
# BASE, ADAPTER and OUT are on a file system that all nodes share and that locks files (NFS 4, CephFS, Lustre with flock).
# A task that failed is submitted again with sbatch --array=ITS_NUMBER: files that it finished are kept.
#SBATCH --job-name=adapter-merge
#SBATCH --array=1-8
#SBATCH --cpus-per-task=2
#SBATCH --mem=2G
#SBATCH --time=01:00:00
set -euo pipefail
parts=8 # as in --array; a task that is submitted again alone would count itself only

if [[ "${4:-}" == --finish ]]; then
    exec adapter-merge merge "$1" "$2" -o "$3" --device cpu --finish
fi
exec adapter-merge merge "$1" "$2" -o "$3" --device cpu --shards "$SLURM_ARRAY_TASK_ID/$parts"
