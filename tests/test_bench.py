"""The benchmarks in a size of seconds: what they compare computes the same, and what they measure is there and adds up."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clips_core.config import PretrainConfig
from clips_core.measure import in_turns, peak_bytes, spread
from clips_core.tokenizer import BOS, CLS, PAD
from llava_bridge.architectures import read_llm
from llava_bridge.conversations import IGNORE, Encoder
from scripts.bench import llava, loader, pretrain

SETTINGS = pretrain.Settings(
    size="debug", image_size=56, batch=4, precision="fp32", device="cpu", compile=False, warmup=1, repeats=2, steps=1,
    variants=("ours", "plain"),
)  # fmt: skip


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    whole = pretrain.make_config(SETTINGS)
    return dataclasses.replace(whole, model=dataclasses.replace(whole.model, vocab_size=2000))


@pytest.fixture(scope="module")
def batch(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return pretrain.make_batches(SETTINGS, config)[0]


def short_captions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"target": batch["target"][:, :32]}


def test_batches_are_what_pretraining_and_coca_read(batch: dict[str, torch.Tensor]) -> None:
    assert batch["image"].shape == (4, 3, 56, 56) and batch["image"].dtype == torch.uint8
    assert batch["texts"].shape == (4, 2, 80) and batch["caption"].shape == (4, 79)
    assert (batch["texts"][..., 0] == BOS).all() and (batch["texts"][..., -1] == CLS).all()
    assert batch["target"].shape[1] % 8 == 0 and not (batch["caption"] == CLS).all(dim=0).any()
    for caption, target in zip(batch["caption"], batch["target"], strict=True):  # the same caption, behind its bos
        shared = min(77, int((target != PAD).sum()) - 1)
        assert caption[1 : 1 + shared].tolist() == target[:shared].tolist()


def test_ours_and_plain_compute_the_same_and_a_difference_is_seen(
    config: PretrainConfig, batch: dict[str, torch.Tensor]
) -> None:
    ours, plain = pretrain.make_ours(config), pretrain.make_plain(config)
    rows = short_captions(batch)
    found = pretrain.difference(ours, plain, rows)
    assert found["loss"] <= 1e-5 and found["gradients"] <= 1e-5
    tokens = plain.model.get_parameter("decoder.learnable_tokens")
    with torch.no_grad():
        tokens[32:] *= -1  # behind every target: they cost the plain version time, and change nothing
    assert pretrain.difference(ours, plain, rows)["gradients"] <= 1e-5
    with torch.no_grad():
        tokens[0] *= -1
    assert pretrain.difference(ours, plain, rows)["gradients"] > 1e-3


def test_nothing_is_timed_where_the_computations_differ(
    config: PretrainConfig, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CAPTION_WEIGHT", 2.01)  # of the plain version alone
    with pytest.raises(RuntimeError, match="ours and plain differ on cpu"):
        pretrain.check(config, batch)


@pytest.mark.parametrize("name", ["ours", "plain", "coca"])
def test_every_variant_trains_and_its_parts_add_up(
    name: str, config: PretrainConfig, batch: dict[str, torch.Tensor]
) -> None:
    variant = pretrain.MAKE[name](config)
    backward = torch.Tensor.backward
    before = {key: value.clone() for key, value in variant.model.named_parameters()}
    losses = [pretrain.train_step(variant, batch) for _ in range(3)]
    contrastive = [value for key, value in losses[0].items() if key.startswith("contrastive")]
    assert losses[0]["loss"] == pytest.approx(sum(contrastive) / len(contrastive) + 2 * losses[0]["caption"], rel=1e-5)
    assert losses[0]["caption"] == pytest.approx(math.log(config.model.vocab_size), rel=0.2)
    assert losses[-1]["loss"] < losses[0]["loss"]
    trained = {key for key, value in variant.model.named_parameters() if not torch.equal(value, before[key])}
    assert {"visual.conv1.weight", "text.token_embedding.weight"} <= trained
    seconds = pretrain.seconds_of_parts(variant, [batch], steps=2)
    assert tuple(seconds) == (*pretrain.PARTS, "rest") and all(value > 0 for value in seconds.values())
    assert torch.Tensor.backward is backward and "forward" not in vars(variant.model.visual)


def test_the_dense_decoder_works_more_and_holds_more(config: PretrainConfig, batch: dict[str, torch.Tensor]) -> None:
    rows = short_captions(batch)
    ours, plain = pretrain.make_ours(config), pretrain.make_plain(config)
    assert pretrain.flops_per_sample(plain, rows) > 1.5 * pretrain.flops_per_sample(ours, rows)
    held = {}
    for name, variant in {"ours": ours, "plain": plain}.items():
        pretrain.train_step(variant, rows)  # makes the optimizer's state
        held[name] = pretrain.allocated_bytes(variant, rows)
    weights = sum(p.numel() * 4 for p in ours.model.parameters())
    assert held["ours"] > 4 * weights  # with gradients and two moments
    logits = 4 * config.model.learnable_tokens * config.model.vocab_size * 4
    assert held["plain"] - held["ours"] > logits


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = [
        "--size",
        "debug",
        "--image-size",
        "56",
        "--batch",
        "4",
        "--repeats",
        "2",
        "--steps",
        "1",
        "--against",
        "plain",
    ]
    assert pretrain.main([*arguments, "--device", "cpu", "--json", str(file), "--trace", str(tmp_path)]) == 0
    result = json.loads(file.read_text())
    with gzip.open(tmp_path / "ours.json.gz") as trace:
        assert set(pretrain.PARTS) <= {event.get("name") for event in json.load(trace)["traceEvents"]}
    shown = capsys.readouterr().out
    assert "debug at 56 px, batch 4, fp32" in shown and "image tower" in shown and "samples/s" in shown
    assert result["settings"] == {**dataclasses.asdict(SETTINGS), "variants": ["ours", "plain"]}
    assert all(value <= 1e-5 for value in result["differences"]["cpu"].values())
    ours, plain = (result["variants"][name] for name in ("ours", "plain"))
    assert ours["first_step"] == pytest.approx(plain["first_step"], rel=1e-5)
    for value in (ours, plain):
        rate = value["samples_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert value["flops_per_second"] == pytest.approx(rate["median"] * value["flops_per_sample"])
        assert value["mfu"] is None and value["process_peak"] > value["peak_memory"] > 0  # torch itself is in there too
    assert ours["ours_is_faster_by"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    fastest, slowest = ours["samples_per_second"]["high"], plain["samples_per_second"]["low"]
    assert 0 < plain["ours_is_faster_by"]["low"] <= plain["ours_is_faster_by"]["high"] <= fastest / slowest


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_loaders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["--pictures", "64", "--batch", "4", "--workers", "0", "--repeats", "1", "--json", str(file)]
    assert loader.main(arguments) == 0
    result = json.loads(file.read_text())
    assert result["same"] == 64 and "images a second and core" in capsys.readouterr().out
    assert result["shards"].keys() == {"pre-resized", "original"}
    for kind in result["shards"].values():
        names = {"ours", "ours, crop", "ours, crop and jitter", "webdataset", "PIL"}
        assert kind["images_per_second_and_core"].keys() == names
        assert all(value["median"] > 0 for value in kind["images_per_second_and_core"].values())
        assert 0.1 < kind["bytes"] / (kind["width"] * kind["height"]) < 0.6  # as a photograph's JPEG


def test_loaders_that_differ_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.write_shards(loader.make_samples(8, 112, 112), tmp_path)
    settings = loader.Settings(pictures=8, batch=4, workers=0, repeats=1)
    assert loader.check(tmp_path, settings) == 8
    ours = loader.ours

    def flipped(*arguments: Any) -> Any:
        return [batch._replace(tensors={"image": batch.tensors["image"].flip(-1)}) for batch in ours(*arguments)]

    monkeypatch.setattr(loader, "ours", flipped)
    with pytest.raises(RuntimeError, match="ours does not give the pictures that PIL gives"):
        loader.check(tmp_path, settings)


def test_too_few_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main(["--pictures", "8", "--batch", "8", "--workers", "0", "--repeats", "1"]) == 2
    assert "more --pictures" in capsys.readouterr().err


def test_measures() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert in_turns({"a": lambda: run("a"), "b": lambda: run("b")}, 2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)

    def allocate() -> torch.Tensor:
        first = torch.empty(2**20)  # 4 MiB
        second = torch.empty(2**19)
        del first
        return second + 0

    assert peak_bytes(allocate) == 6 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1 and stage 2
# ---------------------------------------------------------------------------------------------------------------------

SMALL_LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "vocab_size": 500,
}  # fmt: skip
LLAVA = llava.Settings(
    llm="tiny", tower="tiny", scale=16, samples=24, batch=12, at_once=4, precision="fp32", attention="eager",
    checkpointing=False, workers=0, device="cpu", repeats=1, stages=("align", "tune"), arms=("random", "packed"),
)  # fmt: skip


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llm")
    (folder / "config.json").write_text(json.dumps(SMALL_LLAMA))
    return str(folder)


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_llava_samples_are_as_long_as_they_were_drawn(stage: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(LLAVA, samples=300, batch=300)
    encoder = Encoder(llava.make_processor(settings), 36, llava.max_length(settings))
    encode = encoder.plain if stage == "align" else encoder.chat
    samples = [encode(c) for c in llava.make_conversations(stage, settings, [tmp_path / "0.jpg"])]
    tokens, pictures = llava.drawn_lengths(stage, settings)
    assert [len(sample) for sample in samples] == tokens.tolist()
    assert [bool(sample.images) for sample in samples] == pictures.tolist()
    labels = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    text = tokens.sum() - 36 * pictures.sum()
    learned = (
        1.0 if stage == "align" else (llava.learned_shares(stage, settings) * (tokens - 36 * pictures)).sum() / text
    )
    assert labels / text == pytest.approx(learned, rel=0.25)  # lengths are whole words, and few


@pytest.fixture(scope="module")
def llava_runners(small_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, llava.Runner]:
    folder = tmp_path_factory.mktemp("pictures")
    llava.make_pictures(folder)
    settings = dataclasses.replace(LLAVA, llm=small_llama)
    runners = {arm: llava.Runner(settings, arm, folder) for arm in ("random", "packed")}
    for runner in runners.values():
        runner.warm |= {"align", "tune"}  # nobody looks at the time
    return runners


def test_llava_arms_do_the_same_work(llava_runners: dict[str, llava.Runner]) -> None:
    for stage in LLAVA.stages:
        arms = {arm: runner.turn(stage) for arm, runner in llava_runners.items()}
        tokens = int(llava.drawn_lengths(stage, LLAVA)[0].sum())
        llava.check_same(stage, arms, tokens, 1e-4)
        assert arms["random"]["loss"] == pytest.approx(math.log(500), rel=0.05)  # of random weights
        assert all(result["seconds"] > 0 for result in arms.values())
        arms["packed"]["loss"] *= 1.001
        with pytest.raises(RuntimeError, match="packed has a mean loss"):
            llava.check_same(stage, arms, tokens, 1e-4)
        with pytest.raises(RuntimeError, match=r"random saw \d+ tokens"):
            llava.check_same(stage, arms, tokens + 1, 1e-4)


def test_trl_does_the_same_work_as_ours(llava_runners: dict[str, llava.Runner]) -> None:
    pytest.importorskip("trl")
    ours = llava_runners["random"]
    theirs = llava.train_trl(ours.settings, ours.conversations["tune"])
    llava.check_same("tune", {"random": ours.turn("tune"), "trl": theirs}, int(theirs["tokens"]), 1e-4)


@pytest.mark.slow  # two processes import everything
def test_a_whole_run_of_llava(small_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = [
        "--samples",
        "8",
        "--batch",
        "4",
        "--at-once",
        "2",
        "--repeats",
        "2",
        "--stages",
        "tune",
        "--device",
        "cpu",
    ]
    assert llava.main([*arguments, "--llm", small_llama, "--arms", "random", "packed", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    shown = capsys.readouterr().out
    assert "stage 2" in shown and "× random" in shown and "stage 1" not in shown
    random, packed = (result["stages"]["tune"][arm] for arm in ("random", "packed"))
    assert random["labels"] == packed["labels"] and random["loss"] == pytest.approx(packed["loss"], rel=1e-4)
    for value in (random, packed):
        rate = value["samples_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert value["tokens_per_second"] == pytest.approx(rate["median"] * value["tokens"] / 8)
        weights = 4 * read_llm(small_llama).parameters
        assert value["peak_memory"] > 4 * weights  # with gradients and two moments
        assert value["mfu"] is None
    assert result["targets"] == []  # they are about a GPU


def test_llava_targets_are_of_a_gpu_and_of_whole_lengths() -> None:
    faster = {"random": {"median": 1.6}, "length": {"median": 1.1}, "trl": {"median": 1.3}}
    arms: dict[str, Any] = {"packed": {"faster_than": faster, "mfu": 0.44}, "random": {}, "length": {}, "trl": {}}
    settings = dataclasses.replace(LLAVA, device="cuda", scale=1)
    found = {target["what"]: target["met"] for target in llava.compare(settings, {"tune": arms})}
    assert found == {
        "packed faster than random": True, "packed faster than length": False, "packed faster than trl": True,
        "MFU of packed": False,
    }  # fmt: skip
    del arms["trl"]
    assert len(llava.compare(settings, {"tune": arms})) == 3 and llava.compare(settings, {"align": arms}) == []
    assert llava.compare(dataclasses.replace(settings, scale=16), {"tune": arms}) == []


def test_bad_arguments_of_llava(capsys: pytest.CaptureFixture[str]) -> None:
    assert llava.main(["--samples", "10", "--batch", "4"]) == 2
    assert "--samples must be a multiple of --batch" in capsys.readouterr().err
    assert llava.main(["--llm", "qwen2.5-0.5b", "--device", "cpu"]) == 2
    assert "builds Llamas" in capsys.readouterr().err
