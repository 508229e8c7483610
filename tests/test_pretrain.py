"""The training loop on tiny real shards: it learns, resumes exactly, and says clearly what is wrong."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clips_core import checkpoint
from clips_core.config import PretrainConfig, load_config
from clips_core.data import PretrainDataset, batches, random_crop
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, read_manifest
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.tokenizer import EOS, PAD, train_vocab
from clips_core.train import build_optimizer, learning_rate, pretrain, training_step

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def make_shards(folder: Path, count: int = 64) -> Path:
    """Pictures of one colour above another; web caption names one, the synthetic caption both."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        top, bottom = rng.choice(list(COLOURS), 2, replace=False)
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        pixels[:8], pixels[8:] = COLOURS[top], COLOURS[bottom]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        synthetic = f"The upper half is {top}. The lower half is {bottom}! It is {top} over {bottom}."
        samples.append(
            {"__key__": f"{i:04d}", "png": buffer.getvalue(), "txt": f"{top} stuff", "json": {"re_caption": synthetic}}
        )
    write_shards(samples, folder, per_shard=20)
    texts = [str(s["txt"]) for s in samples] + [s["json"]["re_caption"] for s in samples]  # type: ignore[index]
    train_vocab(texts, folder / "vocab.txt")
    return folder


def make_config(folder: Path, out: Path, *overrides: str) -> PretrainConfig:
    settings = [
        f"out={out}", f"data.train={folder}", f"data.vocab={folder / 'vocab.txt'}", "data.workers=0",
        "model={image_size: 16, patch_size: 8, embed_dim: 16, context_length: 12, learnable_tokens: 24, vocab_size: 200, "
        "vision: {width: 32, layers: 2, heads: 2}, text: {width: 32, layers: 2, heads: 2}, "
        "decoder: {width: 32, layers: 2, heads: 2}}",
        "samples=320", "batch_size=16", "learning_rate=2e-3", "precision=fp32", "log_every=1", "save_every=7",
        f"evaluation.shards={folder}", "evaluation.caption=txt",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*settings, *overrides])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def dataset(config: PretrainConfig, **changes: Any) -> PretrainDataset:
    from clips_core.tokenizer import ClipsTokenizer

    assert config.data.vocab is not None
    return PretrainDataset(config.data, changes.get("method", config.method), ClipsTokenizer(config.data.vocab),
                           16, 12, 24, changes.get("seed", 0))  # fmt: skip


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in MetricsLog(out / "metrics.jsonl").rows() if "loss" in row]


def test_batches_hold_what_they_say(shards: Path) -> None:
    data = dataset(make_config(shards, Path("unused")))
    batch = next(batches(data, 0, 16, 16, workers=0))
    assert batch["image"].shape == (16, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["texts"].shape == (16, 2, 12)
    lengths = (batch["target"] != PAD).sum(dim=1)
    assert batch["target"].shape[1] % 8 == 0 and 0 <= batch["target"].shape[1] - int(lengths.max()) < 8
    tokenizer = data.tokenizer
    for image, texts, target, length in zip(*(batch[k] for k in ("image", "texts", "target")), lengths, strict=True):
        web, sub = (tokenizer.decode(t[1:].tolist()) for t in texts)
        full = tokenizer.decode(target.tolist())
        assert target[length - 1] == EOS and full.count(".") == 2 and full.count("!") == 1  # the whole caption
        pieces = [piece.strip() for piece in full.replace("!", ".").split(".") if piece]
        assert sub in pieces and web.split()[0] in full.split()
        assert image[:, 0, 0].tolist() == list(COLOURS[web.split()[0]])


def test_order_is_a_permutation_per_epoch_and_independent_of_workers(shards: Path) -> None:
    config = make_config(shards, Path("unused"))
    data = dataset(config)
    epochs = [[int(data.order(epoch)[i]) for i in range(len(data))] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64)) and epochs[0] != epochs[1]
    a = list(batches(data, 8, 136, 16, workers=0))
    b = list(batches(dataset(config), 8, 136, 16, workers=2))
    assert len(a) == len(b) == 8
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_clip_mix_mixes_at_the_stated_rate(shards: Path) -> None:
    data = dataset(make_config(shards, Path("unused")), method="clip_mix")
    texts = torch.cat([batch["texts"] for batch in batches(data, 0, 2048, 64, workers=0)])
    web = [" stuff" in data.tokenizer.decode(text[0, 1:].tolist()) for text in texts]
    assert texts.shape[1] == 1
    assert abs(np.mean(web) - 0.8) < 4 * (0.8 * 0.2 / 2048) ** 0.5


def test_random_crop_keeps_the_area() -> None:
    rng = np.random.default_rng(0)
    sizes = [random_crop(Image.new("RGB", (60, 40)), 0.4, rng).size for _ in range(300)]
    assert all(w * h >= 0.38 * 2400 and w <= 60 and h <= 40 for w, h in sizes) and len(set(sizes)) > 100


def test_loss_is_the_weighted_sum_and_gradients_reach_everything(shards: Path) -> None:
    config = make_config(shards, Path("unused"))
    torch.manual_seed(0)
    model = CLIPS(config.model)
    batch = next(batches(dataset(config), 0, 16, 16, workers=0))
    metrics = training_step(model, batch, config)
    expected = (metrics["contrastive_web"] + metrics["contrastive_sub"]) / 2 + 2 * metrics["caption"]
    torch.testing.assert_close(metrics["loss"], expected)
    metrics["loss"].backward()
    unused = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert not unused
    no_target = {**batch, "target": batch["target"][:, :0]}
    metrics = training_step(model, no_target, config)
    assert metrics["caption"].item() == 0.0
    metrics["loss"].backward()


def test_learning_rate_warms_up_and_ends_at_zero(shards: Path) -> None:
    config = make_config(shards, Path("unused"), "warmup_samples=64")
    rates = [learning_rate(samples, config) for samples in range(0, 320, 16)]
    assert max(rates) == rates[4] == pytest.approx(2e-3)
    assert rates[:4] == sorted(rates[:4]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(320, config) == pytest.approx(0.0, abs=1e-12)


def test_pretraining_learns_and_explains_itself(shards: Path, tmp_path: Path) -> None:
    out = pretrain(make_config(shards, tmp_path / "run", "samples=960", "evaluation.every=320"))
    rows = MetricsLog(out / "metrics.jsonl").rows()
    train = [row for row in rows if "loss" in row]
    assert train[-1]["caption"] < 0.5 * train[0]["caption"]
    assert train[-1]["contrastive_web"] < train[0]["contrastive_web"] - 0.3
    evaluations = [row["samples"] for row in rows if "zero_shot" in row]
    assert evaluations == [320, 640, 960]
    manifest = read_manifest(out, "pretrain")
    assert manifest["outputs"]["flops_per_sample"] > 0 and manifest["config"]["method"] == "clips"
    assert "export/hf/model.safetensors" in manifest["weights"]
    before = (out / "manifest.json").stat().st_mtime_ns
    pretrain(make_config(shards, tmp_path / "run", "samples=960", "evaluation.every=320"))
    assert (out / "manifest.json").stat().st_mtime_ns == before  # already finished: nothing is done again
    with pytest.raises(InputError, match=r"config\.seed: 0 → 1"):
        pretrain(make_config(shards, tmp_path / "run", "samples=960", "evaluation.every=320", "seed=1"))


KILL = """
import os, sys
from clips_core import checkpoint, train
from tests.test_pretrain import make_config
from pathlib import Path
mode, shards, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
save, dcp_save, step = checkpoint.save, checkpoint.dcp.save, train.training_step
calls = 0
def killed_step(*args):
    global calls
    calls += 1
    if calls == 11: os._exit(9)
    return step(*args)
def killed_save(state, checkpoint_id, **kwargs):
    global calls
    calls += 1
    dcp_save(state, checkpoint_id=checkpoint_id, **kwargs)
    if calls == 2: os._exit(9)
if mode == "step": train.training_step = killed_step
if mode == "save": checkpoint.dcp.save = killed_save
train.pretrain(make_config(shards, out))
"""


@pytest.mark.parametrize("mode", ["step", "save"])
def test_killed_run_goes_on_bit_identically(shards: Path, tmp_path: Path, mode: str) -> None:
    whole = pretrain(make_config(shards, tmp_path / "whole"))
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", KILL, mode, str(shards), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode == 9
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert losses(tmp_path / "killed")[-1][0] >= 10
    killed = pretrain(make_config(shards, tmp_path / "killed"))
    assert losses(killed) == losses(whole)
    a, b = (load_file(run / "export" / "open_clip" / "open_clip_model.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_interrupt_saves_at_once(shards: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom clips_core.train import pretrain\nfrom tests.test_pretrain import make_config\n"
        "pretrain(make_config(Path(sys.argv[1]), Path(sys.argv[2]), 'samples=100000', 'save_every=100000'))"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(shards), str(tmp_path / "run")],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not losses(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "run the same command to go on" in errors
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((saved / "checkpoint.json").read_text())["step"] == losses(tmp_path / "run")[-1][0]


def test_damaged_checkpoint_falls_back(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(shards, tmp_path)
    model = CLIPS(config.model)
    optimizer = build_optimizer(model, config)
    training_step(model, next(batches(dataset(config), 0, 16, 16, 0)), config)["loss"].backward()
    optimizer.step()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "c", step, model, optimizer, {"seconds": float(step)}, keep=2)
    assert [path.name for path in sorted((tmp_path / "c").iterdir())] == ["step-00000002", "step-00000003"]
    victim = next((tmp_path / "c" / "step-00000003").rglob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    fresh = CLIPS(config.model)
    assert checkpoint.load_latest(tmp_path / "c", fresh, build_optimizer(fresh, config)) == (2, {"seconds": 2.0})
    assert "is damaged" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"txt": ""}, r"key '0003': the caption 'txt' is empty"),
        ({"png": b"\x89PNG\r\n\x1a\n and no more"}, r"key '0003': not a readable picture"),
        ({"txt": b"\xff\xfe"}, r"key '0003'.*utf-8"),
        ({"json": b"{"}, r"key '0003': caption 'json.re_caption' cannot be read"),
        ({"png": None}, r"key '0003': no picture \(looked for jpg"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_is_named(shards: Path, tmp_path: Path, damage: dict[str, Any], message: str, workers: int) -> None:
    from clips_core.shards import Shards

    good = Shards(shards)
    samples = [{k: v for k, v in good[i].items() if k != "__shard__"} for i in range(32)]
    samples[3] = {k: v for k, v in (samples[3] | damage).items() if v is not None}
    write_shards(samples, tmp_path / "bad")
    config = make_config(shards, tmp_path / "run", f"data.train={tmp_path / 'bad'}", f"data.workers={workers}",
                         "evaluation.shards=null", "samples=32")  # fmt: skip
    with pytest.raises(InputError, match=message) as caught:
        pretrain(config)
    assert "shard-000000.tar" in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_sample_without_synthetic_caption_trains_on_its_web_caption(shards: Path, tmp_path: Path) -> None:
    from clips_core.shards import Shards

    good = Shards(shards)
    write_shards([{k: v for k, v in good[i].items() if k in ("__key__", "png", "txt")} for i in range(32)], tmp_path)
    data = dataset(make_config(shards, tmp_path / "x", f"data.train={tmp_path}"))
    batch = next(batches(data, 0, 16, 16, workers=0))
    assert batch["target"].shape[1] == 0 and torch.equal(batch["texts"][:, 0], batch["texts"][:, 1])


def test_vocabulary_must_fit(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 110"):
        pretrain(make_config(shards, tmp_path, "model.vocab_size=110"))


def test_torchrun_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        pretrain(make_config(shards, tmp_path))
