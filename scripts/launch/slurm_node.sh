#!/usr/bin/env bash
# One node's part of slurm.sh, started there by srun: torchrun with a process for each GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # each process has loader workers of its own

# No NCCL variable is set: its defaults find NVLink and InfiniBand. On a cluster with several networks where it picks the wrong one
# (the start hangs, or NCCL_DEBUG=INFO shows a slow interface), export NCCL_SOCKET_IFNAME before sbatch.

# torchrun ignores USR1, which srun sends to the whole process group. It must not be told to end itself either: it would give its
# processes 30 seconds, and a large model takes longer to save.
(
    trap '' USR1
    exec "${PYTHON:-python}" -m torch.distributed.run \
        --nnodes "${SLURM_JOB_NUM_NODES:?}" --node-rank "${SLURM_NODEID:?}" --nproc-per-node "${SLURM_GPUS_ON_NODE:?}" \
        --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}" --max-restarts 0 \
        "$root/scripts/pretrain.py" "$@"
) &
torchrun=$!
# TERM is what the training processes save on, so they get it, and torchrun does not.
trap 'pkill -TERM --parent "$torchrun" || true' USR1

wait "$torchrun" || true
while kill -0 "$torchrun" 2>/dev/null; do # a trap ends a wait before its time
    wait "$torchrun" || true
done
status=0
wait "$torchrun" || status=$? # bash remembers it
exit "$status"
