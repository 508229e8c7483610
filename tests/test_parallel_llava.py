"""Two processes on the CPU: ZeRO against DDP, what each holds, exact resume, and FSDP's layers by torch's own hands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_runs import World, make_world, rows, weights

from clips_core.config import to_dict
from clips_core.errors import InputError
from llava_bridge.batching import Collator
from llava_bridge.config import LoraConfig
from llava_bridge.conversations import Encoder, read_conversations
from llava_bridge.loss import supervised_loss
from llava_bridge.mllm import load_mllm
from llava_bridge.train import align, newest_checkpoint, settings, tune

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMON: dict[str, Any] = {"group": "none", "lora": LoraConfig(4, 8, 0.0), "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "lora ddp": {"method": "lora", "parallel": "ddp"},
    "lora zero2": {"method": "lora", "parallel": "zero2"},
    "lora zero3": {"method": "lora", "parallel": "zero3"},
    "full ddp": {"method": "full", "parallel": "ddp", "tower_learning_rate": 1e-4},
    "full zero2": {"method": "full", "parallel": "zero2", "tower_learning_rate": 1e-4},
    "full zero3": {"method": "full", "parallel": "zero3", "tower_learning_rate": 1e-4},
    "parts ddp": {"method": "full", "parallel": "ddp", "device_batch_size": 1},
    "parts zero3": {"method": "full", "parallel": "zero3", "device_batch_size": 1, "gradient_checkpointing": True},
    "qlora ddp": {"method": "qlora", "parallel": "ddp"},
}
KILLED = {name: RUNS[name] for name in ("full zero2", "full zero3", "lora zero3", "lora ddp")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Often one process has pictures, and the other none."""
    world = make_world(tmp_path_factory.mktemp("parallel"), mixed=True)
    align(world.align_config("align", samples=4))
    return world


def torchrun(world: World, todo: list[list[str | None]], processes: int = 2) -> "subprocess.CompletedProcess[str]":
    """Do what is listed in so many processes."""
    (world.folder / "todo.json").write_text(json.dumps(todo))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(ROOT / "tests" / "llava_distributed.py"), str(world.folder / "todo.json")], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=540,
    )  # fmt: skip


def write_recipe(world: World, name: str, changes: dict[str, Any]) -> str:
    path = world.folder / f"{name}.yaml"
    path.write_text(json.dumps(to_dict(world.tune_config(name, **COMMON, **changes))))
    return str(path)


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """All runs under one launch, of which each has to leave the processes as it found them."""
    todo: list[list[str | None]] = [
        ["tune", write_recipe(world, name, changes), None] for name, changes in RUNS.items()
    ]
    align_zero = world.align_config("align zero2", parallel="zero2", samples=8)
    (world.folder / "align zero2.yaml").write_text(json.dumps(to_dict(align_zero)))
    todo.append(["align", str(world.folder / "align zero2.yaml"), None])
    todo.append(["fsdp", str(world.folder), None])
    done = torchrun(world, todo)
    assert done.returncode == 0, done.stderr[-9000:]
    return world


def held(world: World, run: str) -> list[dict[str, float]]:
    return [json.loads((world.folder / run / f"held-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in RUNS if "zero" in name])
def test_zero_trains_as_ddp_does(trained: World, name: str) -> None:
    run, other = trained.folder / name, trained.folder / f"{name.split()[0]} ddp"
    assert [r["loss"] for r in rows(run)] == pytest.approx([r["loss"] for r in rows(other)], rel=1e-4)
    for key in ("tokens", "supervised_tokens", "padding", "lr"):
        assert [r[key] for r in rows(run)] == [r[key] for r in rows(other)]
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert (value - b[key]).abs().max() <= 2e-2 * 1e-3 * len(rows(run)) + 1e-6, key  # a part of Adam's steps
    written = json.loads((run / "deepspeed.json").read_text())
    assert written["zero_optimization"]["stage"] == int(name[-1])
    assert written["train_batch_size"] == 4 and not (run / "checkpoints").exists()


def test_two_processes_train_as_one_does(trained: World) -> None:
    for name in ("lora ddp", "full ddp", "parts ddp", "qlora ddp"):
        one = tune(trained.tune_config(f"one, {name}", **COMMON, **RUNS[name]))
        assert [r["loss"] for r in rows(one)] == pytest.approx(
            [r["loss"] for r in rows(trained.folder / name)], rel=1e-4
        )


def test_what_each_process_holds(trained: World) -> None:
    for method in ("lora", "full"):
        ddp, zero2, zero3 = (held(trained, f"{method} {parallel}") for parallel in ("ddp", "zero2", "zero3"))
        for rank in (0, 1):
            assert zero2[rank]["weights"] == ddp[rank]["weights"]
            assert zero2[rank]["optimizer"] == pytest.approx(ddp[rank]["optimizer"] / 2, rel=0.05)
            assert zero3[rank]["weights"] == pytest.approx(ddp[rank]["weights"] / 2, rel=0.05)
            assert zero3[rank]["optimizer"] == pytest.approx(ddp[rank]["optimizer"] / 2, rel=0.05)


def test_stage_1_under_zero(trained: World) -> None:
    one = align(trained.align_config("align one", samples=8))
    assert [r["loss"] for r in rows(one)] == pytest.approx(
        [r["loss"] for r in rows(trained.folder / "align zero2")], rel=1e-4
    )


def test_killed_while_one_process_saves(trained: World) -> None:
    """A checkpoint without the part of rank 1 does not count; run again, all goes on as if nothing had happened."""
    recipes = {}
    for name, changes in KILLED.items():
        recipes[name] = write_recipe(trained, f"killed {name}", changes)
        done = torchrun(trained, [["tune", recipes[name], "while checkpoint 4 is written"]])
        assert done.returncode != 0
        folder = trained.folder / f"killed {name}" / "checkpoints"
        left = {path.name: (path / "complete.json").is_file() for path in folder.iterdir()}
        assert left == {"checkpoint-2": True, "checkpoint-4": False}, done.stderr[-3000:]
    config = trained.tune_config("killed full zero3", **COMMON, **RUNS["full zero3"])
    whole = json.loads((config.out / "checkpoints" / "checkpoint-2" / "complete.json").read_text())
    assert {"mp_rank_00" in name for name in whole["sizes"]} == {
        True,
        False,
    }  # DeepSpeed's files are among those that count
    run = {**whole["run"], "processes": 3}
    assert run["config"] == settings(config)
    with pytest.raises(InputError, match=r"holds another run \(processes: 2 → 3\)"):
        newest_checkpoint(config.out / "checkpoints", run)

    done = torchrun(trained, [["tune", recipe, None] for recipe in recipes.values()])
    assert done.returncode == 0, done.stderr[-9000:]
    for name in KILLED:
        run, reference = trained.folder / f"killed {name}", trained.folder / name
        a, b = ([(r["step"], r["loss"], r["lr"]) for r in rows(folder)] for folder in (run, reference))
        assert a == b
        for key, value in weights(reference).items():
            assert torch.equal(weights(run)[key], value), (name, key)


def test_one_process_alone_may_take_zero(world: World) -> None:
    recipe = write_recipe(world, "alone", {**RUNS["full zero3"], "samples": 8})
    done = torchrun(world, [["tune", recipe, None]], processes=1)
    assert done.returncode == 0, done.stderr[-9000:]
    one = tune(world.tune_config("not zero", **COMMON, **{**RUNS["full ddp"], "samples": 8}))
    assert [r["loss"] for r in rows(one)] == pytest.approx([r["loss"] for r in rows(world.folder / "alone")], rel=1e-4)


def test_the_launcher_and_the_scripts(world: World) -> None:
    """As a user starts it: the stage's own script, one process per "GPU"."""
    config = write_recipe(world, "launched", {"method": "lora", "samples": 8})
    command = [str(ROOT / "scripts" / "launch" / "llava.sh"), "tune", "2", config, "seed=0"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=world.folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("vision tower") == 1  # one table, not two
    assert json.loads((world.folder / "launched" / "manifest.json").read_text())["outputs"]["processes"] == 2
    usage = subprocess.run([*command[:1], "chat", "2", config], env=environment, capture_output=True, text=True)
    assert usage.returncode == 2 and "usage:" in usage.stderr


def test_fully_shard_with_our_layers(trained: World) -> None:
    """Losses, gradients and shares of a LLaVA that torch's fully_shard wraps by `layer_classes`, against the whole one."""
    parts = held(trained, "fsdp")
    for part in parts:
        assert part["held"] == pytest.approx(part["whole"] / 2, rel=0.05)
    gradients = torch.load(trained.folder / "fsdp" / "gradients.pt", weights_only=True)
    model, processor = load_mllm(trained.folder / "align", torch.float32)
    config = trained.tune_config("fsdp")
    encoder = Encoder(processor, model.config.image_seq_length, 2048)
    samples = [encoder.chat(c) for c in read_conversations(config.data.json, config.data.images)]
    for rank, part in enumerate(parts):
        mine = [s for s in samples if bool(s.images) == (rank == 0)][:2]
        loss = supervised_loss(model, model.get_output_embeddings(), Collator(processor)(mine))
        assert part["loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
    expected = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}  # FSDP averages
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            gradients[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-9, msg=name
        )
