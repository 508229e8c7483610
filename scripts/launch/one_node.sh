#!/usr/bin/env bash
# Pretrain on one machine with any number of GPUs:
#
#     scripts/launch/one_node.sh 1 one_node/clips_b16_112 batch_size=4096 data.train=…
#     scripts/launch/one_node.sh 8 one_node/clips_b16_112 data.train=…
#
# The global batch is the recipe's, however many GPUs share it. Ctrl-C saves and ends; the same command goes on. PYTHON names
# another interpreter than the one in PATH.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 GPUS RECIPE [key=value …]" >&2
    exit 2
fi
gpus=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Each process has loader workers of its own: with as many threads as cores in every one, they would only wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --standalone: a free port of this machine, so that two runs do not meet.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$root/scripts/pretrain.py" "$@"
