"""The ways to train stage 2: in full, LoRA, QLoRA, with the tower; what is saved, and that each goes on exactly."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from llava_runs import RUN_AND_DIE, World, make_world, rows, weights
from llava_samples import save_conversations, save_llm, save_tower
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import llava_bridge
from clips_core.config import load_config, to_dict
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from llava_bridge.adapters import load_adapter
from llava_bridge.batching import Collator
from llava_bridge.config import AlignConfig, LoraConfig, TuneConfig
from llava_bridge.conversations import Encoder, read_conversations
from llava_bridge.methods import (
    add_lora,
    bitsandbytes,
    count_parameters,
    dequantize,
    merge_lora,
    quantize,
    tower_parameters,
)
from llava_bridge.mllm import build_mllm, check_swap, load_mllm
from llava_bridge.parallel import check_launch, layer_classes
from llava_bridge.towers import load_tower
from llava_bridge.train import StageTrainer, align, tune

ROOT = Path(__file__).parents[1]
TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-3, "save_every": 4, "device_batch_size": 2},
    "qlora": {"method": "qlora"},
    "unfrozen": {"method": "lora", "tower_learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Some batches are without pictures, and some parts of mixed ones."""
    world = make_world(tmp_path_factory.mktemp("methods"), mixed=True)
    align(world.align_config("align", samples=4))
    for name, changes in METHODS.items():
        tune(world.tune_config(name, **changes))
    return world


def batch_of(world: World, count: int = 3) -> dict[str, Tensor]:
    """Padded conversations with pictures."""
    processor = AutoProcessor.from_pretrained(world.folder / "align" / "model", backend="pil")
    encoder = Encoder(processor, 36, 2048)
    conversations = read_conversations(world.folder / "data" / "tune.json", world.folder / "data" / "images")
    batch = Collator(processor)([encoder.chat(c) for c in conversations if c.images][:count])
    batch.pop("labels")
    return batch


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits[batch["attention_mask"].bool()]


# ------------------------------------------------------------------------------------------------------------ what trains


def changed(world: World, run: str) -> set[str]:
    before, after = weights(world.folder / "align"), weights(world.folder / run)
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_full_trains_language_model_and_projector(world: World) -> None:
    names = weights(world.folder / "align").keys()
    assert changed(world, "full") == {name for name in names if not name.startswith(TOWER)}


def test_qlora_leaves_what_is_not_in_4_bits(world: World) -> None:
    expected = {
        name for name in weights(world.folder / "align")
        if name.startswith(PROJECTOR) or ("language_model.layers" in name and name.endswith("_proj.weight"))
    }  # fmt: skip
    assert changed(world, "qlora") == expected


def test_the_tower_trains_up_to_the_layer_that_is_read(world: World) -> None:
    found = {name for name in changed(world, "unfrozen") if name.startswith(TOWER)}
    assert found == tower_parameters(load_mllm(world.folder / "align")[0])
    assert any(".0." in name for name in found) and not any(".layer.1." in name for name in found)  # layer -2 of two


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip", "dinov2"])
def test_parameters_of_the_tower_that_matter(kind: str, tmp_path: Path, world: World) -> None:
    """Against what happens when one is changed: the features change, or stay to the bit."""
    tower = load_tower(f"hf:{save_tower(tmp_path / kind, kind)}")
    model, _ = build_mllm(tower, world.folder / "llm")
    torch.manual_seed(0)
    pictures = torch.randn(1, 3, 48, 48)

    @torch.no_grad()
    def features() -> Tensor:
        return model.model.get_image_features(pixel_values=pictures).pooler_output[0]

    matter, before = tower_parameters(model), features()
    names = [name for name, _ in model.named_parameters() if name.startswith(TOWER)]
    assert set() < matter < set(names)
    for name in names:
        value = model.get_parameter(name).data
        kept = value.clone()
        value += torch.randn_like(value)
        # A key's bias moves all scores of a query alike, which no softmax sees: it matters, by rounding alone.
        if not name.endswith(("key.bias", "k_proj.bias")):
            assert torch.equal(features(), before) == (name not in matter), name
        value.copy_(kept)


def test_the_table_counts_weights_not_their_4_bits(world: World) -> None:
    model, _ = load_mllm(world.folder / "align")
    plain = count_parameters(model)
    quantize(model, torch.float32)
    assert count_parameters(model)["language model"]["parameters"] == plain["language model"]["parameters"]


def test_metrics_count_tokens_and_padding(world: World) -> None:
    """Of the whole run: what the samples hold. Every sample is seen twice in 24."""
    processor = AutoProcessor.from_pretrained(world.folder / "align" / "model", backend="pil")
    conversations = read_conversations(world.folder / "data" / "tune.json", world.folder / "data" / "images")
    samples = [Encoder(processor, 36, 2048).chat(c) for c in conversations]
    for run in METHODS:
        logged = rows(world.folder / run)
        assert sum(row["tokens"] for row in logged) == 2 * sum(len(s) for s in samples)
        assert sum(row["supervised_tokens"] for row in logged) == 2 * sum(
            int((s.labels != -100).sum()) for s in samples
        )
        assert all(0 <= row["padding"] < 0.6 for row in logged) and any(row["padding"] for row in logged)


# ----------------------------------------------------------------------------------------------------------------- resume

KILLED = [
    ("full", "before checkpoint 4's optimizer"),
    ("full", "while checkpoint 4 is written"),
    ("qlora", "after step 3"),
    ("qlora", "before the manifest"),
    ("unfrozen", "while checkpoint 4 is written"),
]


@pytest.fixture(scope="module")
def killed(world: World) -> dict[tuple[str, str], TuneConfig]:
    configs, cases = {}, []
    for name, moment in KILLED:
        out = f"{name} killed {moment}"
        configs[name, moment] = world.tune_config(out, **{**METHODS[name], "save_every": 2})
        recipe = world.folder / f"{out}.yaml"
        recipe.write_text(json.dumps(to_dict(configs[name, moment])))
        cases.append(("tune", moment, str(recipe)))
    subprocess.run([sys.executable, "-c", RUN_AND_DIE, json.dumps(cases)], check=True, cwd=ROOT)
    return configs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moment"), KILLED)
def test_killed_and_run_again_is_as_if_nothing_had_happened(
    world: World, killed: dict[tuple[str, str], TuneConfig], name: str, moment: str
) -> None:
    config = killed[name, moment]
    left = {path.name: (path / "complete.json").is_file() for path in (config.out / "checkpoints").iterdir()}
    if "4" in moment:
        assert left == {"checkpoint-2": True, "checkpoint-4": False}
    tune(config)
    assert_same(config.out, world.folder / name)


def assert_same(run: Path, other: Path) -> None:
    """To the last bit: the losses, and the weights that came of them."""
    a, b = ([(r["step"], r["loss"], r["lr"], r["tokens"]) for r in rows(folder)] for folder in (run, other))
    assert a == b
    for key, value in weights(other).items():
        assert torch.equal(weights(run)[key], value), key


@pytest.mark.parametrize("name", ["full", "qlora"])
def test_interrupted_and_run_again(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third step, after a checkpoint."""
    config = world.tune_config(f"{name} interrupted", **{**METHODS[name], "save_every": 2})
    loss = StageTrainer.compute_loss

    def interrupt(self: StageTrainer, *arguments: Any, **options: Any) -> Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return loss(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "compute_loss", interrupt)
        tune(config)
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3]
    tune(config)
    assert_same(config.out, world.folder / name)


# ------------------------------------------------------------------------------------------------------------------ qlora


def test_4_bits_are_near_the_weights_and_merging_keeps_what_was_trained(world: World) -> None:
    batch = batch_of(world)
    plain, _ = load_mllm(world.folder / "align")
    base, _ = load_mllm(world.folder / "align")
    quantize(base, torch.float32)
    layers = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 14 and {m.weight.dtype for m in layers} == {torch.uint8}
    for name, module in plain.model.language_model.named_modules():
        if isinstance(
            module, torch.nn.Linear
        ):  # NF4: within 3/20 of the block's largest, its levels being so far apart
            small = base.model.language_model.get_submodule(name).weight
            found = bitsandbytes().functional.dequantize_4bit(small.data, small.quant_state)
            assert 0 < (found - module.weight).abs().max() < 0.2 * module.weight.abs().max(), name

    model, adapters = add_lora(base, LoraConfig(4, 8, 0.0), seed=0)
    with torch.no_grad():
        for name in adapters:
            model.get_parameter(name).copy_(0.1 * torch.randn(model.get_parameter(name).shape))
    model.train()  # as trained: in eval mode a CPU may take another kernel, which rounds on its way
    with torch.no_grad():
        trained = model(**batch).logits[batch["attention_mask"].bool()]
    merged = merge_lora(model, torch.float32)
    assert not any("4bit" in type(m).__name__ for m in merged.modules())
    torch.testing.assert_close(logits(merged, batch), trained, rtol=1e-4, atol=1e-4)


def test_dequantizing_leaves_other_models_alone(world: World) -> None:
    model, _ = load_mllm(world.folder / "align")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dequantize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_qlora_without_bitsandbytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="needs bitsandbytes: run  pip install bitsandbytes"):
        tune(world.tune_config("absent", method="qlora"))


# --------------------------------------------------------------------------------------------------------------- adapters


BOTH = ["lora", pytest.param("qlora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", BOTH)
def test_adapters_kept_apart(world: World, method: str) -> None:
    """Stock peft on stage 1's model computes what the merged result does, and ours merges to the very same weights."""
    merged = tune(world.tune_config(f"{method} merged", method=method, samples=8))
    apart = tune(world.tune_config(f"{method} apart", method=method, samples=8, save="adapter"))
    assert not (apart / "model").exists()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (apart / "adapter").iterdir()}
    model, processor = load_mllm(apart)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied: stored once
            assert torch.equal(value, weights(merged)[name]), name
    assert processor.image_token_id == model.config.image_token_id

    base = AutoModelForImageTextToText.from_pretrained(world.folder / "align" / "model", dtype="auto")
    if method == "qlora":
        quantize(base, torch.float32)
        dequantize(base)
    batch = batch_of(world)
    plain = logits(base, batch)
    stock = logits(peft.PeftModel.from_pretrained(base, apart / "adapter"), batch)
    expected = logits(load_mllm(merged)[0], batch)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_another_model_are_refused(world: World, tmp_path: Path) -> None:
    apart = tune(world.tune_config("lora apart", samples=8, save="adapter"))  # which is there already
    moved = tmp_path / "apart"
    shutil.copytree(apart, moved)
    file = moved / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .* records .*; run the stage again"):
        load_adapter(moved)
    shutil.copytree(apart, moved, dirs_exist_ok=True)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["inputs"]["align"] = "another"
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was trained on another model"):
        load_adapter(moved)


# -------------------------------------------------------------------------------------------------------------- the tower


def test_a_tuned_tower_cannot_revert(world: World, tmp_path: Path) -> None:
    run = world.folder / "unfrozen"
    assert read_manifest(run)["outputs"]["tower"] == "tuned"
    assert read_manifest(world.folder / "full")["outputs"]["tower"] == "kept"
    tower = load_tower(f"hf:{world.folder / 'tower'}")
    check_swap(tower, world.folder / "full")
    with pytest.raises(InputError, match=r"is not the tower in .*: stage 2 tuned that one"):
        check_swap(tower, run)
    # The result holds the tuned one, also for plain transformers; with the original put back it does not load.
    tuned = AutoModelForImageTextToText.from_pretrained(run / "model").state_dict()
    back = {name: value for name, value in weights(world.folder / "align").items() if name.startswith(TOWER)}
    assert any(not torch.equal(tuned[name], value) for name, value in back.items())
    reverted = tmp_path / "reverted"
    shutil.copytree(run, reverted)
    save_file(weights(run) | back, reverted / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.safetensors: .* records .*; run the stage again"):
        load_mllm(reverted)


# ------------------------------------------------------------------------------------------------- memory, packing, images


def test_gradient_checkpointing_changes_nothing(world: World) -> None:
    """Dropout included: the random state is put back for the second forward pass."""
    plain = tune(world.tune_config("lora merged", samples=8))  # which is there already
    again = tune(world.tune_config("checkpointed", samples=8, gradient_checkpointing=True))
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(again)]
    for name, value in weights(plain).items():
        assert torch.equal(weights(again)[name], value), name


def test_packing_changes_the_padding_and_not_the_losses(world: World) -> None:
    changes: dict[str, Any] = {"samples": 8, "lora": LoraConfig(4, 8, 0.0)}
    padded = tune(world.tune_config("padded", **changes))
    packed = tune(world.tune_config("packed", **changes, packing=True))
    a, b = rows(padded), rows(packed)
    assert [row["loss"] for row in b] == pytest.approx([row["loss"] for row in a], rel=1e-4)
    for key in ("tokens", "supervised_tokens"):
        assert [row[key] for row in a] == [row[key] for row in b]
    assert sum(row["padding"] for row in b) < 0.5 * sum(row["padding"] for row in a)


def test_stage_2_may_pad_pictures_that_stage_1_squashed(world: World) -> None:
    out = tune(world.tune_config("pad", samples=4, image_mode="pad"))
    processor = load_mllm(out)[1]
    assert processor.image_processor.do_pad and not getattr(
        load_mllm(world.folder / "align")[1].image_processor, "do_pad", False
    )
    with pytest.raises(InputError, match=r"image_mode=pad is not stage 1's: name the tower too \(tower=SPEC\)"):
        tune(world.tune_config("refused", image_mode="pad", tower=None))


@pytest.mark.slow
def test_anyres_in_both_stages(world: World) -> None:
    """The row ends of its tiles train with the projector; half of the conversations have no picture."""
    aligned = align(world.align_config("anyres", image_mode="anyres", samples=8))
    assert newline(aligned).dtype == torch.float32
    for name in ("full", "qlora"):
        tuned = tune(world.tune_config(f"anyres {name}", align=aligned, samples=8, **METHODS[name]))
        assert not torch.equal(newline(tuned), newline(aligned))
        assert all(row["loss"] > 0 for row in rows(tuned))
    with pytest.raises(InputError, match=r"save=adapter cannot hold all that trains .*anyres"):
        tune(world.tune_config("refused", align=aligned, save="adapter"))
    with pytest.raises(InputError, match="was trained with anyres, another model"):
        tune(world.tune_config("refused", align=aligned, image_mode="pad"))


def newline(run: Path) -> Tensor:
    return next(value for name, value in weights(run).items() if name.endswith("image_newline"))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_in_bfloat16(world: World, name: str) -> None:
    """What trains is kept in fp32 all the same: else steps of these sizes would be rounded away."""
    tuned = tune(world.tune_config(f"{name} bf16", **METHODS[name], precision="bfloat16"))
    assert {value.dtype for value in weights(tuned).values()} == {torch.bfloat16}
    assert [r["loss"] for r in rows(tuned)] == pytest.approx([r["loss"] for r in rows(world.folder / name)], rel=0.05)


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=full", "save=adapter"], "save=adapter is for the methods lora and qlora"),
        (["save=adapter", "tower_learning_rate=1e-5"], "save=adapter cannot hold a tuned tower"),
        (["method=qlora", "parallel=zero3"], "parallel=zero3 cannot deal out weights in 4 bits"),
        (["method=dora"], "key 'method'"),
        (["image_mode=anyres"], "key 'image_mode'"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TuneConfig, None, ["out=o", "data.json=d", "data.images=i", "align=a", *overrides])


def test_launches_that_would_train_otherwise_than_they_say(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            check_launch(world.tune_config("refused", **changes), dtype)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    refused("parallel=zero2: start with torchrun", parallel="zero2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused("parallel=zero3 computes in fp32 on a CPU: set precision=float32", torch.bfloat16, parallel="zero3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"parallel=zero3 needs deepspeed: run  DS_BUILD_OPS=0 pip install deepspeed", parallel="zero3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("batch_size 12 over 2 processes is 6 samples each, which is not a multiple of device_batch_size 4",
            batch_size=12, device_batch_size=4)  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("on a CPU Accelerate does not shard, without a word: unset it and take parallel=zero3")


@pytest.mark.parametrize(("kind", "layer"), [("vit", "ViTLayer"), ("clip", "CLIPEncoderLayer")])
def test_layers_that_fsdp_wraps(kind: str, layer: str, tmp_path: Path, world: World) -> None:
    model, _ = build_mllm(load_tower(f"hf:{save_tower(tmp_path / kind, kind)}"), world.folder / "llm")
    assert [cls.__name__ for cls in layer_classes(model)] == ["LlamaDecoderLayer", layer]


# ---------------------------------------------------------------------------------------------------------------- recipes

FOLDER = Path(llava_bridge.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem.startswith(("llava15_", "smollm2_")))
KEYS = ["out=o", "data.json=d", "data.images=i"]


def recipe(name: str, *overrides: str) -> AlignConfig | TuneConfig:
    kind: Any = AlignConfig if name.endswith("_align") else TuneConfig
    own = ["tower=hf:t"] if kind is AlignConfig else ["align=a"]
    return load_config(kind, FOLDER / f"{name}.yaml", [*KEYS, *own, *overrides])


def test_all_recipes_are_there() -> None:
    stages = ("align", "tune", "tune_lora", "tune_qlora")
    models = ("llava15_vicuna7b", "llava15_llama3_8b", "smollm2")
    assert sorted(f"{model}_{stage}" for model in models for stage in stages) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name: str) -> None:
    config = recipe(name)
    assert (config.warmup_ratio, config.weight_decay, config.samples, config.data.max_length) == (0.03, 0.0, None, 2048)
    if isinstance(config, AlignConfig):
        assert (config.batch_size, config.learning_rate, config.select_layer) == (256, 1e-3, -2)
        assert (config.projector, config.image_mode, config.parallel) == ("mlp2x_gelu", "square", "ddp")
    else:
        assert (config.batch_size, config.projector_learning_rate, config.image_mode) == (128, 2e-5, "pad")
        assert config.learning_rate == (2e-5 if config.method == "full" else 2e-4)
        assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
        assert (config.group, config.tower_learning_rate, config.save) == ("modality_length", None, "merged")
        assert config.method == {"tune": "full", "lora": "lora", "qlora": "qlora"}[name.rpartition("_")[2]]
    for gpus in (1, 8):
        share = config.batch_size // gpus
        assert share % min(config.device_batch_size or share, share) == 0
    if name.startswith("llava15"):
        assert not config.packing and config.precision == "bfloat16" and config.gradient_checkpointing
    if name.endswith("align") and name.startswith("llava15"):
        assert isinstance(config, AlignConfig) and config.data.caption_end == "\n"
        assert config.template == ("vicuna_v1" if "vicuna" in name else "llama3")
    assert (config.parallel == "zero3") == (name.startswith("llava15") and name.endswith("_tune"))


@pytest.mark.parametrize("name", RECIPES)
def test_headers_hold_the_commands_for_1_and_8_gpus(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    stage = "align" if name.endswith("_align") else "tune"
    assert f"torchrun --nproc-per-node 8 scripts/{stage}.py {name} KEYS" in text
    one = re.search(r"1 GPU:  (.*)", text)
    assert one is not None
    zero = recipe(name).parallel != "ddp"
    start = f"torchrun --nproc-per-node 1 scripts/{stage}.py" if zero else f"clips-llava {stage}"
    assert one[1] == f"{start} {name} KEYS"
    keys = re.search(r"KEYS:   (.*)", text)
    assert keys is not None
    kind: Any = AlignConfig if stage == "align" else TuneConfig
    load_config(kind, FOLDER / f"{name}.yaml", keys[1].split())


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> World:
    """For the recipes: a Llama whose tokenizer has what their templates ask for, Llama 3's marks included."""
    folder = tmp_path_factory.mktemp("twins")
    save_tower(folder / "tower")
    save_llm(folder / "llm", vocab_size=49_160)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "llm")
    save_conversations(folder / "data")
    return World(folder)


QUICK = ("llava15_llama3_8b_align", "llava15_llama3_8b_tune_qlora", "smollm2_align", "smollm2_tune")


@pytest.mark.parametrize("name", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_debug_twin_trains(name: str, twins: World) -> None:
    """Two steps of each recipe, all of it but the models' and the batch's size, and the processes that ZeRO needs."""
    family = name.removesuffix("_align").partition("_tune")[0]
    small = ["batch_size=4", "device_batch_size=2", "samples=8", "precision=float32", "workers=0", "parallel=ddp"]
    paths = [f"out={twins.folder / name}", f"data.images={twins.folder / 'data' / 'images'}"]
    tower = f"tower=hf:{twins.folder / 'tower'}"
    aligned = twins.folder / f"{family}_align"
    if name.endswith("_align") or not (aligned / "manifest.json").exists():
        data = [f"data.json={twins.folder / 'data' / 'align.json'}", f"out={aligned}", paths[1]]
        align(recipe(f"{family}_align", *small, *data, tower, f"llm={twins.folder / 'llm'}"))  # type: ignore[arg-type]
    if not name.endswith("_align"):
        data = [f"data.json={twins.folder / 'data' / 'tune.json'}", f"align={aligned}"]
        tune(recipe(name, *small, *paths, *data, tower))  # type: ignore[arg-type]
    manifest = read_manifest(twins.folder / name)
    assert manifest["outputs"]["steps"] == 2
    if name == "llava15_llama3_8b_align":
        tokenizer = load_mllm(twins.folder / name)[1].tokenizer
        model = AutoModelForImageTextToText.from_pretrained(twins.folder / name / "model")
        stops = model.generation_config.eos_token_id
        assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in stops and tokenizer.pad_token_id not in stops
    assert len(load_file(twins.folder / name / "model" / "model.safetensors")) > 40
