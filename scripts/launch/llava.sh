#!/usr/bin/env bash
# One stage of a LLaVA on one machine with any number of GPUs:
#
#     scripts/launch/llava.sh align 8 llava15_vicuna7b_align tower=… data.json=… data.images=… out=…
#     scripts/launch/llava.sh tune  8 llava15_vicuna7b_tune  tower=… align=… data.json=… data.images=… out=…
#
# The global batch is the recipe's, however many GPUs share it. Killed, the same command goes on from the newest whole checkpoint.
# PYTHON names another interpreter than the one in PATH.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^(align|tune)$ || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 align|tune GPUS RECIPE [key=value …]" >&2
    exit 2
fi
stage=$1
gpus=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Each process has loader workers of its own: with as many threads as cores in every one, they would only wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --standalone: a free port of this machine, so that two runs do not meet.
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$root/scripts/$stage.py" "$@"
