#!/bin/bash
# A run on several nodes that goes on after a preemption, after the end of its time, and after a node has died:
#
#   sbatch examples/slurm.sh /shared/runs/first dino-r50 --data /shared/my_data --epochs 24
#
# The first word is the run's folder, the rest are those of `detrellis train`. Folder and data have to lie where all nodes
# see them under the same path, and so has the environment with detrellis.
#SBATCH --job-name=detrellis
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
set -uo pipefail

run=$1
shift
words=(train "$@" --out "$run")
if [ -e "$run/last.state.pt" ]; then
    words=(train --resume "$run")
fi

# Slurm tells this script 180 seconds before the time is over, and when the job is preempted. srun passes the signal on,
# torchrun to its processes; all stop after the same step, and the run is saved.
ended=
trap 'ended=1; kill -TERM "$step" 2> /dev/null' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m detrellis "${words[@]}" &
step=$!
code=0
while kill -0 "$step" 2> /dev/null; do # a signal interrupts wait
    wait "$step"
    code=$?
done

if [ -n "$ended" ] && [ "$code" -ne 0 ]; then # otherwise it has finished
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
