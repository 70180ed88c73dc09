#!/bin/bash
#SBATCH --job-name=regrow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# sbatch examples/clusters/slurm.sh RECIPE OUT: the same command continues a job that was stopped.
# The recipe, the models, the text and OUT are in folders that all nodes share.
set -euo pipefail
export RECIPE=$1 OUT=$2
export PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export REGROW_TIMEOUT=120 # minutes
srun --kill-on-bad-exit=1 bash -c '
    torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$PROCESSES" \
        --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
        -m regrow run "$RECIPE" --out "$OUT"'
