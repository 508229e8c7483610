"""Two processes (gloo) against one with the same global batch, and one that goes on where two were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clips_core import train
from clips_core.distributed import from_main, gather_objects, gather_rows, process_group, sum_over_processes, world_size
from clips_core.errors import InputError
from clips_core.shards import Shards, write_shards
from tests.test_pretrain import losses, make_config, make_shards

ROOT = Path(__file__).parent.parent
SETTINGS = ["samples=96", "save_every=2", "evaluation.every=48", "data.shuffle_chunks=2"]
VARIANTS = {
    "ddp": ["sharding=ddp"],
    "ddp in micro-batches": ["sharding=ddp", "micro_batch=3", "ema_decay=0.8", "data.lanes=2"],
    "fsdp": ["sharding=fsdp"],
    "fsdp in micro-batches": [
        "sharding=fsdp", "micro_batch=3", "ema_decay=0.8", "activation_checkpointing=true", "max_grad_norm=1",
    ],
    "fsdp, coca": ["sharding=fsdp", "method=coca"],
    "frozen image tower": ["sharding=fsdp", "frozen=[visual]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most pictures have no synthetic caption: often a micro-batch, or a process, has none."""
    folder = make_shards(tmp_path_factory.mktemp("whole"))
    good = Shards(folder)
    samples = [
        {k: v for k, v in good[i].items() if k != "__shard__" and (k != "json" or i % 7 == 0)} for i in range(64)
    ]
    thinned = tmp_path_factory.mktemp("shards")
    write_shards(samples, thinned, per_shard=16)
    (thinned / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    return thinned


def torchrun(program: Path, *arguments: str) -> list[str]:
    port = 20_000 + os.getpid() % 20_000
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return [*launcher, str(program), *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_processes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants under one launch, and last a run that is killed in its fourth step."""
    folder = tmp_path_factory.mktemp("two")
    runs = [[str(shards), str(folder / name), [*SETTINGS, *settings]] for name, settings in VARIANTS.items()]
    runs.append([str(shards), str(folder / "killed"), [*SETTINGS, *VARIANTS["fsdp in micro-batches"], "die=3"]])
    (folder / "runs.json").write_text(json.dumps(runs))
    command = torchrun(ROOT / "tests" / "distributed_runs.py", str(folder / "runs.json"))
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert (folder / "frozen image tower" / "manifest.json").exists(), done.stderr[-9000:]
    assert done.returncode != 0 and not (folder / "killed" / "manifest.json").exists()
    return folder


def assert_same(run: Path, other: Path) -> None:
    assert [step for step, _ in losses(run)] == [step for step, _ in losses(other)]
    for (_, a), (_, b) in zip(losses(run), losses(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    a, b = (load_file(folder / "export" / "open_clip" / "open_clip_model.safetensors") for folder in (run, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        difference = (value - b[name]).abs()
        if name.endswith(
            "in_proj_bias"
        ):  # the keys' has no gradient but rounding errors, which Adam blows up to full steps
            difference[len(difference) // 3 : 2 * len(difference) // 3] = 0
        assert difference.max().item() <= 1e-5 * max(1.0, b[name].abs().max().item()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_equal_one(shards: Path, two_processes: Path, tmp_path: Path, name: str) -> None:
    one = train.pretrain(make_config(shards, tmp_path / "one", *SETTINGS, *VARIANTS[name]))
    assert_same(two_processes / name, one)
    a, b = (json.loads((folder / "manifest.json").read_text())["outputs"] for folder in (two_processes / name, one))
    assert a["processes"] == 2 and b["processes"] == 1
    assert a["zero_shot"] == b["zero_shot"] and a["best"] == b["best"]
    a, b = (
        {row["step"]: row.get("gradient_norm") for row in read_rows(folder)} for folder in (two_processes / name, one)
    )
    assert a == pytest.approx(b, rel=1e-4)


def read_rows(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_one_process_goes_on_where_two_were_killed(shards: Path, two_processes: Path) -> None:
    saved = sorted(path.name for path in (two_processes / "killed" / "checkpoints").iterdir())
    assert saved == ["step-00000002"]
    settings = [*SETTINGS, *VARIANTS["fsdp in micro-batches"]]
    train.pretrain(make_config(shards, two_processes / "killed", *settings))
    assert_same(two_processes / "killed", two_processes / "fsdp in micro-batches")


def test_sigterm_to_one_process_saves_and_ends_all(shards: Path, tmp_path: Path) -> None:
    """Through the script that torchrun starts; the shell sees an exit status of its own."""
    settings = [f"out={tmp_path / 'run'}", f"data.train={shards}", f"data.vocab={shards / 'vocab.txt'}", "data.workers=1",
                "model={image_size: 16, patch_size: 8, embed_dim: 16, context_length: 12, learnable_tokens: 24, "
                "vocab_size: 200, vision: {width: 32, layers: 2, heads: 2}, text: {width: 32, layers: 2, heads: 2}, "
                "decoder: {width: 32, layers: 2, heads: 2}}", "samples=1000000", "batch_size=16", "learning_rate=1e-3",
                "log_every=1", "save_every=1000000"]  # fmt: skip
    process = subprocess.Popen(
        torchrun(ROOT / "scripts" / "pretrain.py", *settings), cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped: saved at step" in errors and "exitcode: 75" in errors.replace(" ", " ")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (saved / "checkpoint.json").exists()


def test_a_single_process_needs_no_group() -> None:
    with process_group():
        assert world_size() == 1
        value = torch.arange(3.0)
        assert torch.equal(gather_rows(value), value) and torch.equal(sum_over_processes(value), value)
        assert gather_objects("x") == ["x"] and from_main({"a": 1}) == {"a": 1}


def test_an_incomplete_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchrun"),
        process_group(),
    ):
        pass
