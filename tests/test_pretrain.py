"""The training loop on tiny real shards: it learns, resumes exactly, and says clearly what is wrong."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from clips_core import checkpoint, formats, train
from clips_core.average import Average
from clips_core.config import PretrainConfig, load_config, to_dict
from clips_core.data import PretrainDataset, batches
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, read_manifest
from clips_core.model import CLIPS, sin_cos_positions
from clips_core.shards import write_shards
from clips_core.step import training_step
from clips_core.tokenizer import EOS, PAD, ClipsTokenizer, train_vocab
from clips_core.train import build_optimizer, clip_gradients, learning_rate, pretrain

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


def dataset(config: PretrainConfig) -> PretrainDataset:
    assert config.data.vocab is not None
    return PretrainDataset(config, ClipsTokenizer(config.data.vocab))


def first_batch(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return next(batches(dataset(config), 0, 1, config.batch_size, workers=0)).tensors


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in MetricsLog(out / "metrics.jsonl").rows() if "loss" in row]


def test_batches_hold_what_they_say(shards: Path, tmp_path: Path) -> None:
    data = dataset(make_config(shards, tmp_path))
    batch = next(batches(data, 0, 1, 16, workers=0)).tensors
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


def test_clip_mix_mixes_at_the_stated_rate(shards: Path, tmp_path: Path) -> None:
    data = dataset(make_config(shards, tmp_path, "method=clip_mix", "model.decoder=null"))
    texts = torch.cat([batch.tensors["texts"] for batch in batches(data, 0, 32, 64, workers=0)])
    web = [" stuff" in data.tokenizer.decode(text[0, 1:].tolist()) for text in texts]
    assert texts.shape[1] == 1
    assert abs(np.mean(web) - 0.8) < 4 * (0.8 * 0.2 / 2048) ** 0.5


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
from clips_core import checkpoint, formats, train
from tests.test_pretrain import make_config
from pathlib import Path
mode, shards, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
save, dcp_save, step = checkpoint.save, checkpoint.dcp.save, train.training_step
calls = 0
def killed_step(*args):
    global calls
    calls += 1
    if calls == int(mode) + 1: os._exit(9)  # the first call counts FLOPs
    return step(*args)
def killed_save(state, checkpoint_id, **kwargs):
    global calls
    calls += 1
    dcp_save(state, checkpoint_id=checkpoint_id, **kwargs)
    if calls == 2: os._exit(9)
if mode != "save": train.training_step = killed_step
if mode == "save": checkpoint.dcp.save = killed_save
train.pretrain(make_config(shards, out))
"""


@pytest.mark.parametrize("mode", ["11", "3", "save"])  # in a step; before the first save; during the second one
def test_killed_run_goes_on_bit_identically(shards: Path, tmp_path: Path, mode: str) -> None:
    whole = pretrain(make_config(shards, tmp_path / "whole"))
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", KILL, mode, str(shards), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode == 9
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert losses(tmp_path / "killed")[-1][0] >= (2 if mode == "3" else 10)
    killed = pretrain(make_config(shards, tmp_path / "killed"))
    assert losses(killed) == losses(whole)
    a, b = (load_file(run / "export" / "open_clip" / "open_clip_model.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_unfinished_folder_takes_no_other_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "export", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(make_config(shards, tmp_path))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"beginning of another run \(config.learning_rate: 0.002 → 0.001\)"):
        pretrain(make_config(shards, tmp_path, "learning_rate=1e-3"))
    pretrain(make_config(shards, tmp_path, "save_every=100", "data.workers=1", "micro_batch=7"))  # how, and not what


def stop(process: "subprocess.Popen[str]", run: Path, sent: signal.Signals) -> str:
    """Send a signal to a training after its first step; what it says on stderr."""
    deadline = time.monotonic() + 60
    while not losses(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    return process.communicate(timeout=60)[1]


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
    errors = stop(process, tmp_path / "run", signal.SIGINT)
    assert process.returncode != 0 and "run the same command to go on" in errors
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((saved / "checkpoint.json").read_text())["step"] == losses(tmp_path / "run")[-1][0]


def test_damaged_checkpoint_falls_back(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(shards, tmp_path)
    model = CLIPS(config.model)
    optimizer = build_optimizer(model, config)
    training_step(model, model.logit_scale, first_batch(config), config)
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
        ({"txt": ""}, r"key '0003': the caption 'txt' or 'caption' is empty"),
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
    batch = next(batches(data, 0, 1, 16, workers=0)).tensors
    assert batch["target"].shape[1] == 0 and torch.equal(batch["texts"][:, 0], batch["texts"][:, 1])


def test_vocabulary_must_fit(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 110"):
        pretrain(make_config(shards, tmp_path, "model.vocab_size=110"))


def test_a_run_goes_on_from_an_earlier_one_at_a_higher_resolution(shards: Path, tmp_path: Path, capsys: Any) -> None:
    """As in the paper's stages: all weights but the position embeddings, which are those of the new grid."""
    first = pretrain(make_config(shards, tmp_path / "low", "samples=64"))
    settings = ["model.image_size=32", "samples=16", "learning_rate=0", "weight_decay=0", f"init_from={first}"]
    second = pretrain(make_config(shards, tmp_path / "high", *settings))
    assert f"going on from {first}, its caption decoder too" in capsys.readouterr().out
    for name in ("open_clip/open_clip_model", "clips/decoder"):
        a, b = (load_file(run / "export" / f"{name}.safetensors") for run in (first, second))
        moved = {key for key in a if a[key].shape != b[key].shape or not torch.equal(a[key], b[key])}
        assert moved == ({"visual.positional_embedding"} if "open_clip" in name else set())
        if moved:
            assert torch.equal(b[moved.pop()], sin_cos_positions(4, 32))
    assert any(name.startswith("init_from") for name in read_manifest(second)["inputs"])
    pretrain(make_config(shards, tmp_path / "smaller", *settings, "model.learnable_tokens=8"))
    assert "the caption decoder starts anew" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"init_from .*: its .* is \[.*\], and this model's"):
        pretrain(make_config(shards, tmp_path / "other", *settings, "model.embed_dim=8"))


def test_frozen_parts_do_not_move_and_averaged_weights_are_exported(shards: Path, tmp_path: Path) -> None:
    first = pretrain(make_config(shards, tmp_path / "first", "samples=64"))
    settings = ["samples=64", f"init_from={first}", "frozen=[visual]", "learning_rate=1e-2"]
    plain = pretrain(make_config(shards, tmp_path / "plain", *settings))
    averaged = pretrain(make_config(shards, tmp_path / "averaged", *settings, "ema_decay=0.5"))
    a, b, c = (
        load_file(run / "export" / "open_clip" / "open_clip_model.safetensors") for run in (first, plain, averaged)
    )
    assert all(torch.equal(a[name], b[name]) == name.startswith("visual.") for name in a if name != "text.attn_mask")
    assert losses(plain) == losses(averaged)  # averaging does not touch the training
    distance = [sum(float((x[name] - a[name]).norm()) for name in a) for x in (b, c)]
    assert 0 < distance[1] < distance[0]  # it lags behind


def test_the_average_is_what_it_says(shards: Path, tmp_path: Path) -> None:
    model = CLIPS(make_config(shards, tmp_path).model)
    average, expected = Average(model, 0.9), model.text.text_projection.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.text.text_projection += torch.randn_like(model.text.text_projection)
        average.update(model)
        expected = 0.9 * expected + 0.1 * model.text.text_projection.detach()
    torch.testing.assert_close(average.tensors["text.text_projection"], expected)
    assert "visual.positional_embedding" not in average.tensors  # it does not train


def test_a_step_that_is_not_finite_is_skipped_and_names_its_samples(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls, bad = 0, {4}

    def spoiled(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        metrics = training_step(*args)
        if calls - 2 in bad:  # the first call counts FLOPs
            metrics["loss"] = metrics["loss"] * float("nan")
        return metrics

    monkeypatch.setattr(train, "training_step", spoiled)
    out = pretrain(make_config(shards, tmp_path / "run", "samples=160", "evaluation.shards=null"))
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    (row,) = MetricsLog(out / "skipped_steps.jsonl").rows()
    assert row["step"] == 5 and row["loss"] == "nan" and len(row["keys"]) == 16
    assert all(re.fullmatch(rf"{shards}/shard-\d{{6}}\.tar:\d{{4}}", key) for key in row["keys"])
    assert read_manifest(out)["outputs"]["skipped_steps"] == 1 and "step 5 is skipped" in capsys.readouterr().err
    calls, bad = 0, set(range(4, 100))
    with pytest.raises(InputError, match=r"step 8: the loss is nan .* for 4 steps in a row.*a lower learning_rate"):
        pretrain(make_config(shards, tmp_path / "nan", "samples=320", "evaluation.shards=null"))


def test_gradients_are_clipped_to_the_norm(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path)
    torch.manual_seed(0)
    model = CLIPS(config.model)
    training_step(model, model.logit_scale, first_batch(config), config)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert clip_gradients(model, None) == pytest.approx(whole.norm().item(), rel=1e-4)
    assert clip_gradients(model, 0.5) == pytest.approx(whole.norm().item(), rel=1e-4)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(clipped, whole * 0.5 / whole.norm(), rtol=1e-4, atol=1e-8)


def test_the_best_weights_and_what_the_decoder_writes_are_kept(shards: Path, tmp_path: Path) -> None:
    out = pretrain(
        make_config(shards, tmp_path / "run", "samples=640", "evaluation.every=160", "evaluation.captions=3")
    )
    rows = [row for row in MetricsLog(out / "metrics.jsonl").rows() if "zero_shot" in row]
    scores = [sum(row["zero_shot"][way]["R@1"] for way in ("image_to_text", "text_to_image")) / 2 for row in rows]
    best = json.loads((out / "best" / "best.json").read_text())
    assert (
        best
        == {"step": rows[scores.index(max(scores))]["step"], "mean R@1": max(scores)}
        == read_manifest(out)["outputs"]["best"]
    )
    assert (out / "best" / "open_clip" / "open_clip_model.safetensors").is_file()
    assert all(len(row["captions"]) == 3 for row in rows) and rows[0]["captions"] != rows[-1]["captions"]
    trained = [row for row in MetricsLog(out / "metrics.jsonl").rows() if "loss" in row]
    for row in trained:
        assert 0 < row["real_tokens"] < 1 and 0 <= row["data_wait"] <= 1 and row["memory"] > 1e8
        assert row["images_per_second"] > 0 and row["gradient_norm"] > 0


def test_tensorboard_has_the_same_numbers_as_the_metrics_file(shards: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = pretrain(make_config(shards, tmp_path / "run", "trackers=[tensorboard]", "evaluation.every=160"))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = MetricsLog(out / "metrics.jsonl").rows()
    for name in ("loss", "caption", "gradient_norm", "logit_scale", "images_per_second", "data_wait"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    found = [event.value for event in events.Scalars("zero_shot/image_to_text/R@1")]
    assert found == pytest.approx([row["zero_shot"]["image_to_text"]["R@1"] for row in rows if "zero_shot" in row])


def test_a_tracker_that_is_not_installed_is_an_error_with_the_pip_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"):
        pretrain(make_config(shards, tmp_path, "trackers=[wandb]"))


def test_sigterm_saves_and_has_its_own_exit_status(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path / "run", "samples=1000000", "save_every=1000000")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(config)))
    process = subprocess.Popen(
        [sys.executable, "-m", "eval_suites.cli", "pretrain", str(recipe)], cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = stop(process, tmp_path / "run", signal.SIGTERM)
    assert process.returncode == 75 and "stopped: saved at step" in errors
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_compiled_training_resumes_within_a_tolerance(shards: Path, tmp_path: Path) -> None:
    """Compiled and eager losses agree to 1e-4, and so do those of a run that goes on from a checkpoint."""
    eager = pretrain(make_config(shards, tmp_path / "eager", "samples=160"))
    whole = pretrain(make_config(shards, tmp_path / "whole", "samples=160", "compile=true"))
    shutil.copytree(whole, tmp_path / "again")
    (tmp_path / "again" / "manifest.json").unlink()
    again = pretrain(make_config(shards, tmp_path / "again", "samples=160", "compile=true"))
    for run in (eager, again):
        assert [loss for _, loss in losses(run)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-4)
