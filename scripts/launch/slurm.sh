#!/usr/bin/env bash
# Pretrain on 8 nodes of 8 GPUs under SLURM. Submit from the checkout, with its environment active; options before the file's name
# change what is set below:
#
#     sbatch --partition=gpu --account=… scripts/launch/slurm.sh paper/l14_84 data.train=…
#     sbatch --nodes=1 scripts/launch/slurm.sh one_node/clips_b16_112 data.train=…
#
# Ten minutes before the time limit the run saves, ends, and puts itself back into the queue; there it goes on from that checkpoint,
# exactly. So a run of any length takes one submission. `scancel` ends it for good.
#
#SBATCH --job-name=clips
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=104
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

: "${SLURM_JOB_ID:?start with: sbatch scripts/launch/slurm.sh RECIPE [key=value …]}"
# SLURM runs a copy of this file from its spool, so the checkout is where sbatch was called.
root=${SLURM_SUBMIT_DIR:?}
if [[ ! -f $root/scripts/launch/slurm_node.sh ]]; then
    echo "submit from the checkout: $root has no scripts/launch/slurm_node.sh" >&2
    exit 2
fi

mapfile -t hosts < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
MASTER_ADDR=${hosts[0]:?scontrol names no host}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job, since jobs may share a head node
export MASTER_ADDR MASTER_PORT

# B: in --signal sends USR1 to this shell alone; it passes it to the nodes' launchers, which know whom to tell.
limit_is_near=no
trap 'limit_is_near=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
# scancel's TERM reaches the nodes by itself: stay until they have saved.
trap 'echo "cancelled: waiting for the nodes" >&2' TERM

# One launcher a node; when one fails, the others end too, instead of waiting for it in NCCL until the job's limit.
srun --kill-on-bad-exit=1 bash "$root/scripts/launch/slurm_node.sh" "$@" &
step=$!
wait "$step" || true
while kill -0 "$step" 2>/dev/null; do # a trap ends a wait before its time
    wait "$step" || true
done
status=0
wait "$step" || status=$? # bash remembers it

if [[ $limit_is_near == yes && $status -ne 0 ]]; then # 0: it finished while it was told to stop
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
