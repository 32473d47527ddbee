#!/usr/bin/env bash
# One task per host, which starts a process per GPU: sbatch --nodes 4 examples/slurm.sh --config qwen3-8b-4b
# PRESET=zero3 sbatch ... for another of TRL's presets, or the path of a file of `accelerate config`.
# Before the time limit it saves a checkpoint and queues itself again, until the run is finished.
#SBATCH --job-name=tipdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
set -euo pipefail

preset=${PRESET:-fsdp2}
gpus=${SLURM_GPUS_ON_NODE:-8}
if [ ! -f "$preset" ]; then
  preset=$(python -c "import sys, trl; print(f'{trl.__path__[0]}/accelerate_configs/{sys.argv[1]}.yaml')" "$preset")
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads to the end: head would break the pipe
export HEAD=$head PRESET_FILE=$preset PROCESSES=$((SLURM_NNODES * gpus))
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then  # queued again, by itself below or by Slurm
  set -- --resume_from_checkpoint auto "$@"
fi

# single quotes: SLURM_NODEID is each task's own; tipdistill.supervise hands signals to the processes that train
srun --kill-on-bad-exit=1 bash -c '
  exec python -m tipdistill.supervise \
    accelerate launch --config_file "$PRESET_FILE" --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port 29500 \
    -m tipdistill.cli train "$@"' train "$@" &
run=$!
trap 'kill -USR1 "$run"' USR1
while kill -0 "$run" 2>/dev/null; do  # a signal ends `wait`, not the run
  wait "$run" || true
done
code=0
wait "$run" || code=$?
if [ "$code" -eq 138 ]; then  # 128 + SIGUSR1: a checkpoint is saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
