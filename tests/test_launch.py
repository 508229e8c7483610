"""The launch files: real torchrun over two processes, and SLURM's commands played by small scripts on this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"

# Stands in for scripts/pretrain.py: trains until it is told to stop, then saves together with the others; the next start
# finishes.
TRAINING = """
import os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2" and os.environ["OMP_NUM_THREADS"] == "1"
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
if not (folder / f"saved-{rank}").exists():
    (folder / f"ready-{rank}").touch()
    deadline = time.monotonic() + 60
    while not stop and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    (folder / f"saved-{rank}").write_text("told to stop" if stop else "")
    while len(list(folder.glob("saved-*"))) < 2:
        time.sleep(0.05)
    raise SystemExit(75)
(folder / f"finished-{rank}").write_text(" ".join(sys.argv[2:]))
"""

# srun: one task a node, each in a process group of its own, as SLURM's are.
SLURM = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        set -m
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
        echo "${pids[@]}" > "$SHIMS/tasks"
        status=0
        for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
        exit $status
    """,
    "scancel": 'for pid in $(cat "$SHIMS/tasks"); do kill -s "${1#--signal=}" -- "-$pid"; done',
    "scontrol": """
        if [[ $1 == show ]]; then echo 127.0.0.1; echo elsewhere; else echo "$*" >> "$SHIMS/requeued"; fi
    """,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real launch files and the training above."""
    shutil.copytree(LAUNCH, tmp_path / "scripts" / "launch")
    (tmp_path / "scripts" / "pretrain.py").write_text(TRAINING)
    (tmp_path / "shims").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "shims" / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / "shims" / name).chmod(0o755)
    return tmp_path


def environment(checkout: Path, **more: str) -> dict[str, str]:
    shims = checkout / "shims"
    return {**os.environ, "PATH": f"{shims}:{os.environ['PATH']}", "SHIMS": str(shims), "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable, **more}  # fmt: skip


def free_job_id() -> int:
    """A SLURM job whose port is free: 20000 + id % 20000."""
    for job in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + job)) != 0:
                return job
    raise RuntimeError("no free port")


def wait_for(*paths: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["llava.sh", "one_node.sh", "slurm.sh", "slurm_node.sh"])
def test_shell_files_are_well_formed(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / name], check=True)


def test_near_the_limit_a_job_saves_and_queues_again_then_finishes(checkout: Path) -> None:
    """Two nodes. USR1 to the batch shell alone, as SLURM sends it."""
    job = free_job_id()
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
             "SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(checkout)}  # fmt: skip
    spooled = shutil.copy(checkout / "scripts" / "launch" / "slurm.sh", checkout / "spooled.sh")

    def start() -> "subprocess.Popen[str]":
        command = ["bash", str(spooled), str(checkout), "a recipe", "key=value"]
        return subprocess.Popen(command, env=environment(checkout, **slurm), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)  # fmt: skip

    first = start()
    wait_for(*(checkout / f"ready-{rank}" for rank in (0, 1)), process=first)
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert [(checkout / f"saved-{rank}").read_text() for rank in (0, 1)] == ["told to stop"] * 2, output
    assert (checkout / "shims" / "requeued").read_text() == f"requeue {job}\n"

    second = start()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert [(checkout / f"finished-{rank}").read_text() for rank in (0, 1)] == ["a recipe key=value"] * 2
    assert (checkout / "shims" / "requeued").read_text() == f"requeue {job}\n"  # not once more


def test_a_failure_is_not_queued_again(checkout: Path) -> None:
    (checkout / "scripts" / "pretrain.py").write_text("raise SystemExit(3)")
    slurm = {"SLURM_JOB_ID": str(free_job_id()), "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1",
             "SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(checkout)}  # fmt: skip
    command = ["bash", str(checkout / "scripts" / "launch" / "slurm.sh"), "recipe"]
    done = subprocess.run(command, env=environment(checkout, **slurm), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and not (checkout / "shims" / "requeued").exists()


def test_one_node_starts_a_process_for_each_gpu(checkout: Path) -> None:
    for rank in (0, 1):
        (checkout / f"saved-{rank}").touch()
    launcher = checkout / "scripts" / "launch" / "one_node.sh"
    done = subprocess.run([launcher, "2", checkout, "recipe", "seed=1"], cwd="/", env=environment(checkout),
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (checkout / "finished-1").read_text() == "recipe seed=1"
    usage = subprocess.run([launcher, "recipe", "seed=1"], env=environment(checkout), capture_output=True, text=True)
    assert usage.returncode == 2 and "usage:" in usage.stderr
