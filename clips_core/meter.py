"""What a run costs: pictures a second, share of time waiting for data, MFU, memory; and where such numbers are sent."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips_core.data import Batch
from clips_core.errors import InputError
from clips_core.plan import GPUS
from clips_core.tokenizer import PAD


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((gpu.peak for key, gpu in GPUS.items() if key in name), None)


class Meter:
    """Rates since the last reading.

    Args:
        batch_size: pictures of a step, over all processes.
        flops: of a picture, forward and backward.
        processes: how many share the work.
    """

    def __init__(self, batch_size: int, flops: float, processes: int, device: torch.device):
        self.batch_size, self.flops, self.processes, self.device = batch_size, flops, processes, device
        self.peak = peak_flops(device)
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited, self.steps = time.monotonic(), 0.0, 0
        self.real, self.places = torch.zeros((), dtype=torch.int64), 0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; what `next` takes counts as waiting for data."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            self.waited += time.monotonic() - before
            self.steps += 1
            self.real += (batch.tensors["texts"] != PAD).sum()
            self.places += batch.tensors["texts"].numel()
            yield batch

    def read(self) -> dict[str, float]:
        """`images_per_second`, `data_wait` (share), `real_tokens` (share of the text encoder's), `memory` (bytes, peak), `mfu`."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.steps * self.batch_size / seconds
        values = {
            "images_per_second": rate,
            "data_wait": self.waited / seconds,
            "real_tokens": self.real.item() / max(1, self.places),
            "memory": float(peak_memory(self.device)),
        }
        if self.peak is not None:
            values["mfu"] = rate * self.flops / (self.peak * self.processes)
        self._restart()
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak, or on a CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Trackers:
    """TensorBoard and Weights & Biases, as far as the config names them. The metrics file is written in any case.

    Raises:
        InputError: with the pip line, if one is not installed.
    """

    def __init__(self, names: list[str], out: Path, config: Mapping[str, Any]):
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in names:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("trackers: tensorboard is not installed: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(str(out / "tensorboard"))
        if "wandb" in names:
            try:
                import wandb  # type: ignore[import-not-found]
            except ImportError:
                raise InputError("trackers: wandb is not installed: pip install wandb") from None
            self.wandb = wandb.init(project="clips-llava", name=out.name, dir=str(out), config=dict(config), resume="allow",
                                    id="".join(c if c.isalnum() else "-" for c in str(out.resolve()))[-120:])  # fmt: skip

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics: numbers, and dicts of numbers."""
        step, numbers = int(row["step"]), dict(_numbers(row))
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | Tensor) and name != "step":
            yield f"{prefix}{name}", float(value)
