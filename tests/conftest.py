"""What holds for every test: no network, no trace in the user's caches, few threads."""

import atexit
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator

import pytest

# Read by libraries at import, so set before any of them: conftest.py is imported first.
os.environ.setdefault("OMP_NUM_THREADS", "2")  # tensors here are tiny: more threads only wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="clips-llava-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["MPLBACKEND"] = "agg"

# A shell that is not interactive starts background jobs deaf to Ctrl-C, and they pass that on: tests press it all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)

_connect = socket.socket.connect


def _connect_to_this_machine_only(self: socket.socket, address: object) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        assert isinstance(address, tuple)
        if address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}: tests run without a network")
    _connect(self, address)  # type: ignore[arg-type]


socket.socket.connect = _connect_to_this_machine_only  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 32 columns gain nothing from a second thread, and waiting for it on a busy machine costs a lot."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
