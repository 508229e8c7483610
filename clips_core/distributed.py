"""The process group of a torchrun launch; in a single process every function here is the identity."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clips_core.errors import InputError


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them at the end. Yields this process's device.

    Raises:
        InputError: if the launch has more processes on this machine than GPUs, or is incomplete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start torchrun with that --nproc-per-node"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1 or dist.is_initialized():
        yield device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start with torchrun")
    # Both backends under CUDA: tensors go through NCCL, checkpoints' plans and Python objects through gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum in place over all processes; also returned."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_rows(value: Tensor) -> Tensor:
    """The rows of all processes, [W · b, …], in the order of their ranks. Outside of autograd. All give as many."""
    if not dist.is_initialized():
        return value
    rows = value.new_empty(dist.get_world_size() * len(value), *value.shape[1:])
    dist.all_gather_into_tensor(rows, value.contiguous())
    return rows


def max_over_processes(value: int) -> int:
    """The largest of all processes' values: one small message through gloo, cheap enough for every step."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: Any) -> list[Any]:
    """A small Python value of every process, on all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, on all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
