"""A study's steps: commands of this package that a reader could have typed, run as processes of their own."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from clips_core.errors import InputError, Stopped

# Keys that the study sets itself, and where to say so instead.
OWN_KEYS = {
    "out": "each training has a folder under the study's own `out`",
    "tower": "say it in towers",
    "align": "stage 2 goes on from the study's own stage 1",
    "model": "the benchmarks are answered by the study's own models",
    "seed": "say it in seeds",
}


class Command(NamedTuple):
    """A step of a training, and the file that is there once it is finished."""

    words: list[str]
    finished: Path

    def __str__(self) -> str:
        return shlex.join(self.words)


def launcher(gpus: int) -> list[str]:
    """What starts a stage on so many GPUs of this machine."""
    if gpus == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]


def run_step(step: Command) -> None:
    """Run a command to its end. Ctrl-C reaches it first: it saves, and so do we go.

    It shares our claims to folders: were we killed, nobody would start the same step beside it.

    Raises:
        KeyboardInterrupt, Stopped: as it was told.
        InputError: if it fails. Why has been printed.
    """
    process = subprocess.Popen(step.words, close_fds=False)
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))  # a scheduler tells us alone
    try:
        status = process.wait()
    except KeyboardInterrupt:  # of the terminal, which tells both
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (75, -signal.SIGTERM):
        raise Stopped("a step was told to stop; run the same command to go on from its last checkpoint")
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        raise InputError(f"a step of the study failed with exit status {status} (its message stands above): {step}")
    if not step.finished.exists():
        raise InputError(f"a step of the study ended, but wrote no {step.finished}: {step}")
