"""Both stages: what trains and what stays, the loss, exact resume, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from llava_runs import RUN_AND_DIE, World, make_world, rows, weights
from llava_samples import save_conversations, save_tower
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_bridge
from clips_core.config import load_config, recipe_path, to_dict
from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest, sha256_file
from llava_bridge.batching import Collator
from llava_bridge.config import AlignConfig, ConversationConfig, LoraConfig, TuneConfig
from llava_bridge.conversations import IGNORE, Encoder, read_conversations
from llava_bridge.held_out import HeldOutConfig, held_out_loss
from llava_bridge.loss import supervised_loss
from llava_bridge.methods import (
    ALIGN_CONTRACT,
    add_lora,
    check_contract,
    merge_lora,
    set_trainable,
    trainable_table,
    tune_contract,
)
from llava_bridge.mllm import build_mllm, load_mllm, projector_parameters
from llava_bridge.precision import resolve_precision
from llava_bridge.towers import load_tower
from llava_bridge.train import COMPLETE, align, tune

ROOT = Path(__file__).parents[1]
PROJECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    align(world.align_config("align"))
    tune(world.tune_config("tune"))
    return world


def batch_of(world: World, encoder: Encoder, indices: Sequence[int]) -> dict[str, Tensor]:
    conversations = read_conversations(world.folder / "data" / "tune.json", world.folder / "data" / "images")
    return Collator(encoder.processor)([encoder.chat(conversations[i]) for i in indices])


def load(run: Path) -> tuple[Any, Encoder]:
    model, processor = load_mllm(run)
    return model.eval(), Encoder(processor, model.config.image_seq_length, 2048)


# --------------------------------------------------------------------------------------------------- what a stage changes


def test_align_trains_the_projector_and_nothing_else(world: World) -> None:
    config = world.align_config("align")
    start, _ = build_mllm(load_tower(config.tower), Path(config.llm), seed=config.seed)
    before, after = start.state_dict(), weights(world.folder / "align")
    assert after.keys() == before.keys() - {"lm_head.weight"}  # tied: stored once
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (not name.startswith(PROJECTOR)), name


def test_tune_trains_the_language_models_layers_and_the_projector(world: World) -> None:
    before, after = weights(world.folder / "align"), weights(world.folder / "tune")
    assert after.keys() == before.keys()
    for name, value in after.items():
        adapted = "language_model.layers" in name and name.endswith("_proj.weight")
        assert torch.equal(value, before[name]) == (not (adapted or name.startswith(PROJECTOR))), name


def test_a_linear_projector_stays_linear(world: World) -> None:
    out = align(world.align_config("linear", projector="linear", samples=8))
    after = weights(out)
    assert torch.equal(after[PROJECTOR + "linear_2.weight"], torch.eye(64))
    assert not after[PROJECTOR + "linear_2.bias"].any()
    tuned = weights(tune(world.tune_config("linear_tuned", align=out, samples=8)))
    assert torch.equal(tuned[PROJECTOR + "linear_2.weight"], torch.eye(64))
    assert not torch.equal(tuned[PROJECTOR + "linear_1.weight"], after[PROJECTOR + "linear_1.weight"])


def test_both_stages_learn(world: World) -> None:
    """The same 12 pictures over and over: the loss of both stages must fall."""

    def fallen(run: Path) -> float:
        losses = [row["loss"] for row in rows(run)]
        return sum(losses[-3:]) / sum(losses[:3])

    aligned = align(world.align_config("align_long", samples=120, learning_rate=1e-2))
    assert fallen(aligned) < 0.9
    assert fallen(tune(world.tune_config("tune_long", align=aligned, samples=120))) < 0.85


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_held_out_loss_is_the_mean_over_all_tokens(
    world: World, tmp_path: Path, stage: Literal["align", "tune"]
) -> None:
    """Whatever the batches: equal to transformers' own loss of each conversation, weighted by its tokens."""
    data = ConversationConfig(world.folder / "data" / f"{stage}.json", world.folder / "data" / "images")
    config = HeldOutConfig(
        model=world.folder / stage,
        data=data,
        out=tmp_path / "loss.json",
        stage=stage,
        batch_size=5,
        precision="float32",
    )
    found = held_out_loss(config)
    model, encoder = load(world.folder / stage)
    encode = encoder.plain if stage == "align" else encoder.chat
    total, labels = 0.0, 0
    for conversation in read_conversations(data.json, data.images):
        batch = Collator(encoder.processor)([encode(conversation)])
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * count
        labels += count
    assert found == pytest.approx(total / labels, rel=1e-5)
    assert read_json(tmp_path / "loss.json")["labels"] == labels


def test_manifests_tell_where_a_model_comes_from(world: World) -> None:
    aligned, tuned = (read_manifest(world.folder / stage, stage) for stage in ("align", "tune"))
    tower = sha256_file(world.folder / "tower" / "model.safetensors")
    llm = sha256_file(world.folder / "llm" / "model.safetensors")
    assert aligned["inputs"] == {
        "tower": tower, "llm": llm, "data": sha256_file(world.folder / "data" / "align.json")
    }  # fmt: skip
    assert tuned["inputs"] == {
        "tower": tower, "llm": llm, "data": sha256_file(world.folder / "data" / "tune.json"),
        "align": aligned["weights"]["model/model.safetensors"],
    }  # fmt: skip
    for manifest, run in ((aligned, "align"), (tuned, "tune")):
        assert list(manifest["weights"]) == ["model/model.safetensors"]
        assert [row["step"] for row in rows(world.folder / run)] == list(range(1, 7))
        assert manifest["outputs"]["steps"] == 6 and manifest["outputs"]["samples"] == 24


def test_the_result_is_a_stock_model_that_generates(world: World) -> None:
    model = AutoModelForImageTextToText.from_pretrained(world.folder / "tune" / "model")
    processor = AutoProcessor.from_pretrained(world.folder / "tune" / "model")
    assert model.config.text_config.use_cache and model.generation_config.use_cache
    picture = str(world.folder / "data" / "images" / "0.png")
    parts = [{"type": "image", "url": picture}, {"type": "text", "text": "Is there a red bird?"}]
    chat = [{"role": "user", "content": parts}]
    batch = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > batch["input_ids"].shape[1]


def test_learning_rates(world: World) -> None:
    """Warm-up in the first step, then a cosine to zero (the rate of a row is the one of its step)."""
    rates = [row["lr"] for row in rows(align(world.align_config("rates", samples=40, warmup_ratio=0.2)))]
    half = 0.5 * (1 + torch.cos(torch.arange(9) / 8 * torch.pi))
    assert rates[:2] == pytest.approx([0, 0.5e-3])
    assert rates[2:] == pytest.approx((1e-3 * half[:8]).tolist(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------------ LoRA


def test_adapters_sit_in_the_language_model_only(world: World) -> None:
    base, _ = load_mllm(world.folder / "align")
    linear = {
        name for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.")
    }  # fmt: skip
    assert len(linear) == 14
    projector = {f"base_model.model.{name}" for name in projector_parameters(base)}
    model, adapters = add_lora(base, LoraConfig(4, 8, 0.0), seed=0)
    found = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapters}
    assert found == linear
    assert len(projector) == 4
    set_trainable(model, adapters | projector)
    table = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in trainable_table(model).splitlines()}
    assert table["vision tower"][1] == table["language model"][1] == "0"
    assert table["projector"][0] == table["projector"][1] == f"{2 * (64 * 64 + 64):,}"
    assert table["adapters"][0] == table["adapters"][1] == f"{sum(model.get_parameter(n).numel() for n in adapters):,}"


def test_a_stage_that_trains_something_else_is_stopped(world: World) -> None:
    base, _ = load_mllm(world.folder / "align")
    set_trainable(base, projector_parameters(base))
    check_contract(base, ALIGN_CONTRACT)
    base.model.vision_tower.layernorm.bias.requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"1 parameters .*vision_tower\.layernorm\.bias \(vision tower frozen, but it tr"
    ):
        check_contract(base, ALIGN_CONTRACT)
    set_trainable(base, projector_parameters(base) - {PROJECTOR + "linear_1.bias"})
    with pytest.raises(RuntimeError, match=r"linear_1\.bias \(projector trained, but it does not"):
        check_contract(base, ALIGN_CONTRACT)
    check_contract(base, ALIGN_CONTRACT, idle={PROJECTOR + "linear_1.bias"})
    with pytest.raises(RuntimeError, match="language model trained, but it does not"):
        check_contract(base, tune_contract(world.tune_config("x", method="full")))
    with pytest.raises(RuntimeError, match="not to be trained"):
        set_trainable(base, {"model.multi_modal_projector.linear_3.bias"})


def test_merged_equals_unmerged(world: World) -> None:
    base, encoder = load(world.folder / "align")
    model, adapters = add_lora(base, LoraConfig(4, 8, 0.0), seed=0)
    with torch.no_grad():
        for name in adapters:
            parameter = model.get_parameter(name)
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    batch = batch_of(world, encoder, [0, 1])
    batch.pop("labels")
    with torch.no_grad():
        plain = load(world.folder / "align")[0](**batch).logits
        unmerged = model.eval()(**batch).logits
        merged = merge_lora(model, torch.float32)(**batch).logits
    assert (unmerged - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- the loss


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_the_loss_at_labels_equals_the_plain_loss(world: World) -> None:
    """transformers' own loss over all positions, forward and backward, all parameters trained."""
    model, encoder = load(world.folder / "align")
    batch = batch_of(world, encoder, range(5))
    count = int((batch["labels"][:, 1:] != -100).sum())

    plain = model(**batch).loss
    plain.backward()
    expected = gradients(model)
    loss = supervised_loss(model, model.get_output_embeddings(), batch) / count
    loss.backward()
    found = gradients(model)

    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()) + 1e-9)
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]  # the hook is gone


def test_a_padded_batch_equals_its_samples_alone(world: World) -> None:
    model, encoder = load(world.folder / "align")
    head = model.get_output_embeddings()
    together = supervised_loss(model, head, batch_of(world, encoder, range(5)))
    alone = sum(supervised_loss(model, head, batch_of(world, encoder, [i])) for i in range(5))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_text_only_samples_may_share_a_batch_with_pictures(world: World) -> None:
    model, encoder = load(world.folder / "align")
    conversations = read_conversations(world.folder / "data" / "tune.json", world.folder / "data" / "images")
    text = dataclasses.replace(
        conversations[0],
        images=(),
        messages=({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}),
    )
    samples = [encoder.chat(c) for c in (conversations[1], text, conversations[2])]
    collator, head = Collator(encoder.processor), model.get_output_embeddings()
    together = supervised_loss(model, head, collator(samples))
    alone = sum(supervised_loss(model, head, collator([sample])) for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_accumulated_gradients_equal_a_whole_batch(world: World) -> None:
    """Samples of uneven length: a mean of the parts' means would differ."""
    whole = world.folder / "align"
    parts = align(world.align_config("accumulated", device_batch_size=1))
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- resume

KILLED = [
    ("align", "while checkpoint 4 is written"),
    ("tune", "after step 3"),
    ("tune", "before the manifest"),
]


@pytest.fixture(scope="module")
def killed(world: World) -> dict[tuple[str, str], AlignConfig | TuneConfig]:
    """Runs that were killed, each at its moment, and their configs."""
    configs: dict[tuple[str, str], AlignConfig | TuneConfig] = {}
    cases = []
    for stage, moment in KILLED:
        name = f"{stage} killed {moment}"
        config = world.align_config(name) if stage == "align" else world.tune_config(name)
        recipe = world.folder / f"{name}.yaml"
        recipe.write_text(json.dumps(to_dict(config)))
        configs[stage, moment] = config
        cases.append((stage, moment, str(recipe)))
    subprocess.run([sys.executable, "-c", RUN_AND_DIE, json.dumps(cases)], check=True, cwd=ROOT)
    return configs


@pytest.mark.parametrize(("stage", "moment"), KILLED)
def test_killed_and_run_again_is_as_if_nothing_had_happened(
    world: World, killed: dict[tuple[str, str], Any], stage: str, moment: str
) -> None:
    config = killed[stage, moment]
    left = {path.name: (path / COMPLETE).is_file() for path in (config.out / "checkpoints").iterdir()}
    if moment == "while checkpoint 4 is written":
        assert left == {"checkpoint-2": True, "checkpoint-4": False}
    assert any(left.values()) and not (config.out / "manifest.json").exists()

    (align if stage == "align" else tune)(config)

    reference = world.folder / stage
    assert [(r["step"], r["loss"], r["lr"]) for r in rows(config.out)] == [
        (r["step"], r["loss"], r["lr"]) for r in rows(reference)
    ]
    for name, value in weights(reference).items():
        assert torch.equal(weights(config.out)[name], value), name
    assert not (config.out / "checkpoints").exists()


def test_checkpoints_of_another_run_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llava_bridge.train.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            align(world.align_config("interrupted", samples=8))
    with pytest.raises(InputError, match=r"holds another run \(config\.learning_rate: 0\.001 → 0\.002\)"):
        align(world.align_config("interrupted", samples=8, learning_rate=2e-3))
    align(world.align_config("interrupted", samples=8, save_every=100, workers=1))  # what changes nothing may differ


def test_a_checkpoint_that_lost_a_file_does_not_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llava_bridge.train.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            align(world.align_config("damaged"))
    checkpoint = world.folder / "damaged" / "checkpoints" / "checkpoint-6"
    (checkpoint / "optimizer.pt").write_bytes(b"cut off")
    align(world.align_config("damaged"))
    for name, value in weights(world.folder / "align").items():
        assert torch.equal(weights(world.folder / "damaged")[name], value), name


def test_a_finished_folder_is_left_alone(world: World) -> None:
    manifest = world.folder / "align" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert align(world.align_config("align")) == world.folder / "align"
    assert manifest.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds another result \(config\.seed: 0 → 1\)"):
        align(world.align_config("align", seed=1))


# ------------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_and_float32_runs_take_turns_in_one_process(world: World) -> None:
    out = align(world.align_config("bf16", precision="bfloat16"))
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    assert rows(out)[-1]["loss"] == pytest.approx(rows(world.folder / "align")[-1]["loss"], rel=0.02)
    again = align(world.align_config("fp32_again"))
    for name, value in weights(world.folder / "align").items():
        assert torch.equal(weights(again)[name], value), name
    tuned = weights(tune(world.tune_config("bf16_tuned", align=out, precision="bfloat16", samples=8)))
    for name, value in weights(out).items():
        if name.startswith(TOWER):
            assert torch.equal(tuned[name], value), name


def test_precision_is_what_was_asked_for() -> None:
    assert resolve_precision("bfloat16") == torch.bfloat16
    assert resolve_precision("float32") == torch.float32
    assert resolve_precision("auto") in (torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------------------- bad input


def test_tuning_refuses_a_tower_that_stage_1_did_not_see(world: World, tmp_path: Path) -> None:
    wider = save_tower(tmp_path / "wider", hidden_size=128)
    with pytest.raises(InputError, match=r"hidden size 128, but .* trained for 64: run stage 1 again"):
        tune(world.tune_config("refused", tower=f"hf:{wider}"))
    other = save_tower(tmp_path / "other", initializer_range=0.5)
    found, trained = (sha256_file(f / "model.safetensors") for f in (other, world.folder / "tower"))
    with pytest.raises(InputError, match=f"{found}.*{trained}: run stage 1 again"):
        tune(world.tune_config("refused", tower=f"hf:{other}"))
    assert not (world.folder / "refused").exists()


def test_tuning_needs_a_finished_stage_1(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such folder"):
        tune(world.tune_config("refused", align=tmp_path / "absent"))
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        tune(world.tune_config("refused", align=tmp_path))
    with pytest.raises(InputError, match="made by stage 'tune', but a folder of stage 'align' is needed"):
        tune(world.tune_config("refused", align=world.folder / "tune"))


def test_a_broken_picture_stops_training_with_its_name(world: World, tmp_path: Path) -> None:
    data = save_conversations(tmp_path / "data", count=4)
    broken = data / "images" / "2.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    config = world.align_config("broken", data=ConversationConfig(data / "align.json", data / "images"), samples=4)
    with pytest.raises(
        InputError, match=r"align\.json, sample 3 \(id 'a2'\), picture .*2\.png: not a readable picture"
    ):
        align(config)


def test_a_loss_that_is_not_finite_stops_training(world: World) -> None:
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+; lower learning_rate"):
        align(world.align_config("diverged", learning_rate=1e30, max_grad_norm=0.0, warmup_ratio=0.0))


def test_a_batch_must_divide_among_the_processes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size 4 is not a multiple of 3 processes"):
        align(world.align_config("refused"))


RECIPES = sorted((Path(llava_bridge.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(recipe: Path, tmp_path: Path) -> None:
    common = ["out=o", "data.json=d", "data.images=i"]
    kind, own = (AlignConfig, "tower=clips:t") if "_align" in recipe.stem else (TuneConfig, "align=a")
    config: Any = load_config(kind, recipe_path(recipe.parents[1], recipe.stem), [*common, own])
    assert config.out == Path("o")
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(recipe.read_text() + "\nseeds: 1\n")
    for base in RECIPES:
        (tmp_path / base.name).write_text(base.read_text())
    with pytest.raises(InputError, match=r"misspelt\.yaml, line \d+: unknown key 'seeds' \(did you mean 'seed'\?\)"):
        load_config(kind, misspelt, [*common, own])


def test_the_defaults_are_llava_15s() -> None:
    data = ConversationConfig(Path("d"), Path("i"))
    first = AlignConfig(out=Path("o"), data=data, tower="hf:t")
    second = TuneConfig(out=Path("o"), data=data, align=Path("a"))
    assert (first.learning_rate, first.batch_size, first.projector, first.select_layer) == (1e-3, 256, "mlp2x_gelu", -2)
    assert (second.learning_rate, second.projector_learning_rate, second.batch_size) == (2e-4, 2e-5, 128)
    assert (second.lora.rank, second.lora.alpha, second.lora.dropout) == (128, 256, 0.05)
    for config in (first, second):
        assert (config.warmup_ratio, config.weight_decay, config.data.max_length, config.samples) == (
            0.03,
            0.0,
            2048,
            None,
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "batch_size must be at least 1"),
        ("device_batch_size=5", "batch_size 256 is not a multiple of device_batch_size 5"),
        ("device_batch_size=0", "device_batch_size must be at least 1"),
        ("parallel=fsdp", "key 'parallel'"),
        ("group=modality", "key 'group'"),
        ("samples=0", "samples must be at least 1"),
        ("warmup_ratio=1", r"warmup_ratio must be in \[0, 1\)"),
        ("projector=mlp3x", "key 'projector'"),
        ("data.max_length=1", "max_length must be at least 2"),
        ("precision=fp16", "key 'precision'"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(AlignConfig, None, ["out=o", "data.json=d", "data.images=i", "tower=hf:t", override])
