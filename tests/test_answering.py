"""Batches change no answer in float32, and follow from the questions alone; parts and kills change nothing; any model is asked."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from benchmark_files import make_files, records_of, rows_of
from llava_samples import save_conversations, save_llm, save_tower
from PIL import Image
from test_benchmarks import ANSWERS, OBJECTS, make_model
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest
from eval_suites.answering import AnswerLog, Part, batches, check_batches, evenly, this_part
from eval_suites.benchmarks import EvalConfig, find_model, model_fingerprint, run_suite
from llava_bridge.adapters import load_adapter
from llava_bridge.llm import smollm2
from llava_bridge.mllm import build_mllm, save_mllm
from llava_bridge.towers import load_tower

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("pope", "gqa")


def write_suite(folder: Path, tasks: tuple[str, ...] = TASKS, tokens: int = 4) -> str:
    generation = {"max_new_tokens": tokens, "min_new_tokens": 1}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "two", "tasks": {name: {"generation": generation} for name in tasks}}))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, a suite."""
    folder = tmp_path_factory.mktemp("answering")
    make_model(folder / "model")
    make_files(folder / "data", list(TASKS), n=14)
    write_suite(folder)
    return folder


def config(folder: Path, out: Path, **values: Any) -> EvalConfig:
    settings = {"batch_size": 4, "precision": "float32", "suite": str(folder / "suite.yaml"), "partial": True, **values}
    return EvalConfig(folder / "model", folder / "data", out, **settings)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The suite answered by one process."""
    return run_suite(config(folder, folder / "whole")) / "real"


def results_of(run: Path) -> dict[str, bytes]:
    """What must be the same, byte for byte, however the questions were shared."""
    return {name: (run / name).read_bytes() for name in ("results.json", *(f"{task}.jsonl" for task in TASKS))}


# ------------------------------------------------------------------------------------------------------- batches and logits


def test_batches_follow_from_the_lengths_alone() -> None:
    rng = random.Random(0)
    lengths = {doc_id: rng.randrange(3, 9) for doc_id in range(31)}
    order = list(lengths)
    expected = batches(lengths, 4)
    for _ in range(5):
        rng.shuffle(order)
        assert batches({doc_id: lengths[doc_id] for doc_id in order}, 4) == expected
    flat = [doc_id for batch in expected for doc_id in batch]
    assert sorted(flat) == list(range(31)) and [len(batch) for batch in expected] == [4] * 7 + [3]
    keys = [(-lengths[doc_id], doc_id) for doc_id in flat]
    assert keys == sorted(keys)
    parts = [expected[i::3] for i in range(3)]
    assert sorted(batch for part in parts for batch in part) == sorted(expected)


def test_a_sample_is_spread_over_the_questions() -> None:
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly([4, 2], 9) == [4, 2] and evenly([4, 2], 0) == []
    assert check_batches({0: "a", 1: "b", 2: "c"}, {0: "a", 2: "d"}) == {"n": 2, "changed": 1, "share": 0.5}


def conversations(count: int, words: tuple[str, ...] = (*ANSWERS, *OBJECTS)) -> list[Any]:
    """One picture and a question of 1 to 40 words each."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        text = " ".join(rng.choice(words, int(rng.integers(1, 40)) if i else 40))
        made.append([{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": text}]}])
    return made


def check_logits(model: Any, tokens: int, questions: list[Any]) -> None:
    """Logits of every step and tokens, alone against batches of 3 and 8; the first step also against a plain forward pass."""
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": tokens}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}
    alone = []
    for question in questions:
        inputs = model.encode([question])
        alone.append(model.generate(inputs, **greedy))
        plain = model.model(**inputs).logits[0, -1]
        assert (alone[-1].logits[0][0] - plain).abs().max() < 1e-4
    lengths = [len(found.sequences[0]) - len(found.logits) for found in alone]
    assert len(set(lengths)) > 4
    for size in (3, 8):
        for start in range(0, len(questions), size):
            inputs = model.encode(questions[start : start + size])
            found = model.generate(inputs, **greedy)
            assert (inputs["attention_mask"][:, -1] == 1).all() and (inputs["attention_mask"] == 0).any()
            for row, single in enumerate(alone[start : start + size]):
                steps = len(single.logits)
                assert torch.equal(found.sequences[row, -len(found.logits) :][:steps], single.sequences[0, -steps:])
                for step in range(steps):
                    assert (found.logits[step][row] - single.logits[step][0]).abs().max() < 1e-4


def test_logits_do_not_depend_on_the_batch(folder: Path) -> None:
    from eval_suites.chat_model import ChatLlava

    with torch.inference_mode():
        check_logits(ChatLlava(folder / "model", torch.float32, "sdpa"), 5, conversations(8))


@pytest.mark.slow
def test_logits_of_smollm2_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    from eval_suites.chat_model import ChatLlava

    save_mllm(*build_mllm(load_tower(f"hf:{save_tower(tmp_path / 'tower')}"), smollm2()), tmp_path / "model")
    with torch.inference_mode():
        check_logits(ChatLlava(tmp_path / "model", torch.float32, "sdpa"), 6, conversations(8))


# ---------------------------------------------------------------------------------------------------- what the record says


def test_records_say_how_they_were_made(whole: Path) -> None:
    for task in TASKS:
        for row in records_of(whole, task):
            assert (row["batch_size"], row["dtype"], row["attention"]) == (4, "float32", "sdpa")
    manifest = read_manifest(whole)
    assert manifest["outputs"]["batch_check"] == {}, "in float32 there is nothing to check"
    logged = [json.loads(line) for line in (whole / "answers-pope.jsonl").read_text().splitlines()]
    assert manifest["outputs"]["seconds"]["pope"] == pytest.approx(sum(row["seconds"] for row in logged), abs=0.01)


def test_the_share_that_a_batch_changes_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a run of the same model with batches of one."""
    bf16 = config(folder, tmp_path / "batched", precision="bfloat16", batch_check=1000)
    batched, alone = run_suite(bf16) / "real", run_suite(replace(bf16, out=tmp_path / "exact", exact=True)) / "real"
    assert read_manifest(alone)["config"]["batch_size"] == 1 and read_manifest(alone)["outputs"]["batch_check"] == {}
    for task in TASKS:
        a, b = ([row["answer"] for row in records_of(run, task)] for run in (batched, alone))
        changed = sum(x != y for x, y in zip(a, b, strict=True))
        assert read_manifest(batched)["outputs"]["batch_check"][task] == {
            "n": 14,
            "changed": changed,
            "share": changed / 14,
        }
    sampled = run_suite(replace(bf16, out=tmp_path / "sampled", batch_check=5)) / "real"
    assert {own["n"] for own in read_manifest(sampled)["outputs"]["batch_check"].values()} == {5}
    with pytest.raises(InputError, match=r"another result .*batch_size: 4 → 1"):
        run_suite(replace(bf16, exact=True))
    with pytest.raises(InputError, match=r"another result .*dtype: \"bfloat16\" → \"float32\""):
        run_suite(replace(bf16, precision="float32"))
    monkeypatch.setattr("eval_suites.benchmarks.ATTENTION", "eager")
    with pytest.raises(InputError, match=r"another result .*attention: \"sdpa\" → \"eager\""):
        run_suite(bf16)


# ------------------------------------------------------------------------------------------------------- parts and kills


def test_parts_together_are_the_whole(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shared"
    for part in ("2/3", "0/3"):
        run_suite(config(folder, out, part=part))
        assert not (out / "real/manifest.json").exists()
        assert "of other parts are missing; the part that ends last scores" in capsys.readouterr().err
    answered = [AnswerLog(out / "real", "answers-pope", Part(i, 3)).path for i in range(3)]
    assert [path.exists() for path in answered] == [True, False, True]
    run_suite(config(folder, out, part="1/3"))
    assert results_of(out / "real") == results_of(whole)
    own = [{json.loads(line)["doc_id"] for line in path.read_text().splitlines()} for path in answered]
    assert sum(map(len, own)) == 14 and set().union(*own) == set(range(14)), "no question is answered twice"
    assert not (out / ".cache").exists() and not (out / "real/.scoring.lock").exists()
    before = (out / "real/manifest.json").read_bytes()
    run_suite(config(folder, out, part="0/3"))
    assert (out / "real/manifest.json").read_bytes() == before


@pytest.mark.slow
def test_parts_in_bfloat16_make_the_same_batches(folder: Path, tmp_path: Path) -> None:
    single = run_suite(config(folder, tmp_path / "one", precision="bfloat16")) / "real"
    for part in ("0/2", "1/2"):
        run_suite(config(folder, tmp_path / "two", precision="bfloat16", part=part))
    assert results_of(tmp_path / "two/real") == results_of(single)
    checks = [read_manifest(run)["outputs"]["batch_check"] for run in (single, tmp_path / "two/real")]
    assert checks[0] == checks[1] and checks[0]["pope"]["n"] == 14


def test_what_any_part_answered_is_not_asked_again(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Two parts begin, one is lost in the middle of a line, and one process finishes for all."""
    out = tmp_path / "out"
    run_suite(config(folder, out, part="0/2"))
    log = out / "real/answers-pope.0-of-2.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:9])
    run_suite(config(folder, out))
    assert results_of(out / "real") == results_of(whole)
    assert log.read_text().startswith("".join(lines[:5]))
    rest = [json.loads(line)["doc_id"] for line in (out / "real/answers-pope.jsonl").read_text().splitlines()]
    assert not {json.loads(line)["doc_id"] for line in lines[:5]} & set(rest)


def test_a_kill_within_a_character(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, "answers-pope")
    log.add({0: "a café\u2028there", 1: "é"}, 1.0)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + '{"doc_id": 2, "answer": "é'.encode()[:-1])
    other = AnswerLog(tmp_path, "answers-pope", Part(0, 2))
    assert other.answers == {0: "a café\u2028there", 1: "é"}, "another process leaves what it does not own"
    assert AnswerLog(tmp_path, "answers-pope").answers == other.answers and log.path.read_bytes() == whole


def test_parts_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_part(None) == Part(0, 1) and this_part("2/5") == Part(2, 5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_part(None) == Part(1, 4) and this_part("0/2") == Part(0, 2)
    assert Part(1, 4).suffix == ".1-of-4" and Part().suffix == ""
    for text in ("4/4", "1", "a/b"):
        with pytest.raises(InputError, match="part"):
            this_part(text)


def command(folder: Path, out: Path) -> list[str]:
    settings = [f"model={folder / 'model'}", f"data={folder / 'data'}", f"suite={folder / 'suite.yaml'}", f"out={out}"]
    return ["-m", "eval_suites.cli", "eval", "run", *settings, "batch_size=4", "precision=float32", "partial=true"]


@pytest.mark.slow
def test_torchrun_shares_the_questions(folder: Path, whole: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*start, *command(folder, tmp_path / "out")], check=True, capture_output=True, timeout=300)
    assert results_of(tmp_path / "out/real") == results_of(whole)
    names = {path.name for path in (tmp_path / "out/real").glob("answers-pope*")}
    assert names == {"answers-pope.0-of-2.jsonl", "answers-pope.1-of-2.jsonl"}


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_next_question(folder: Path, whole: Path, tmp_path: Path) -> None:
    log = tmp_path / "out/real/answers-pope.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command(folder, tmp_path / "out")], env=environment)
    deadline = time.monotonic() + 200
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = log.read_text()
    assert first and not (tmp_path / "out/real/manifest.json").exists()
    run_suite(config(folder, tmp_path / "out"))
    assert results_of(tmp_path / "out/real") == results_of(whole)
    assert log.read_text().startswith(first[: first.rfind("\n") + 1])


# ------------------------------------------------------------------------------------------------------------- any model


def test_a_model_of_lmms_evals_own(folder: Path, tmp_path: Path) -> None:
    """Its no-op model says yes to everything: what POPE makes of that is known."""
    asked = replace(config(folder, tmp_path / "out"), model="lmms:dummy", model_args="response=yes")
    run = run_suite(asked) / "real"
    targets = [row["target"] for row in records_of(run, "pope")]
    assert [row["answer"] for row in records_of(run, "pope")] == ["yes"] * 14
    assert [row["score"] for row in records_of(run, "pope")] == [float(target == "yes") for target in targets]
    figures = read_json(run / "results.json")["pope"]
    assert figures["pope_accuracy"] == pytest.approx(targets.count("yes") / 14) and figures["pope_recall"] == 1
    assert {(row["dtype"], row["attention"]) for row in records_of(run, "gqa")} == {("unknown", "unknown")}
    with pytest.raises(InputError, match=r"another result .*inputs\.model"):
        run_suite(replace(asked, model_args="response=no"))
    with pytest.raises(InputError, match=r"lmms:no_such_model: lmms-eval has no such model"):
        run_suite(replace(asked, out=tmp_path / "none", model="lmms:no_such_model"))
    with pytest.raises(InputError, match=r"set pictures=\[real\]"):
        run_suite(replace(asked, out=tmp_path / "blank", pictures=["blank"]))
    with pytest.raises(InputError, match="model_args 'response=yes' are of an lmms:NAME"):
        run_suite(replace(asked, out=tmp_path / "own", model=folder / "model"))


def test_a_name_of_the_hub(folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, as there is no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--lab--tiny-llava"
    shutil.copytree(folder / "model", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = run_suite(replace(config(folder, tmp_path / "out"), model="lab/tiny-llava")) / "real"
    assert results_of(run) == results_of(whole)
    with pytest.raises(InputError, match="lab/other: neither a folder here nor to be had from the hub"):
        run_suite(replace(config(folder, tmp_path / "none"), model="lab/other"))


def test_a_run_folder_is_its_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "tune/model")
    (tmp_path / "tune/manifest.json").write_text(json.dumps({"stage": "tune", "weights": {}}))
    assert (
        model_fingerprint(tmp_path / "tune")
        == model_fingerprint(tmp_path / "tune/model")
        == model_fingerprint(folder / "model")
    )


@pytest.mark.slow
def test_a_llava_next(tmp_path: Path) -> None:
    """Pictures of several tiles, so of several lengths, in one batch; answers equal plain transformers'."""
    model, processor = build_mllm(
        load_tower(f"hf:{save_tower(tmp_path / 'tower', 'clip')}"), save_llm(tmp_path / "llm"), image_mode="anyres"
    )
    save_mllm(model, processor, tmp_path / "model")
    make_files(tmp_path / "data", ["pope"], n=6)
    write_suite(tmp_path, ("pope",), tokens=6)
    run = run_suite(config(tmp_path, tmp_path / "out")) / "real"
    plain = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    reader = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    [file] = (tmp_path / "data").rglob("*.parquet")
    rows = rows_of(file.parent, file.name)
    for record, row in zip(records_of(run, "pope"), rows, strict=True):
        text = f"{row['question']}\nAnswer the question using a single word or phrase."
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = reader.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        inputs = reader(text=prompt, images=image, return_tensors="pt")
        ids = plain.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=1)
        said = reader.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["answer"] == said.lstrip().partition("\n\n")[0].strip()


def test_anybodys_lora_adapter(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Its answers are those of the LLaVA that PEFT's own arithmetic makes of both; another's adapter is refused."""
    import peft
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    stated = json.loads(path.read_text())
    assert stated["base_model_name_or_path"] == str(folder / "model")
    shutil.copytree(folder / "model", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")

    asked = replace(config(folder, tmp_path / "out"), model=tmp_path / "adapter")
    run = run_suite(asked) / "real"
    merged = run_suite(replace(asked, model=tmp_path / "merged", out=tmp_path / "merged-out")) / "real"
    assert results_of(run) == results_of(merged) != results_of(whole)
    hashes = {read_manifest(each)["inputs"]["model"] for each in (run, merged, whole)}
    assert len(hashes) == 3

    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    save_file(
        {f"other.{name}": value for name, value in weights.items()}, tmp_path / "adapter/adapter_model.safetensors"
    )
    with pytest.raises(InputError, match=r"another result .*inputs\.model"):
        run_suite(asked)
    with pytest.raises(InputError, match=r"adapter: not an adapter of its base model .*missing adapter keys"):
        run_suite(replace(asked, out=tmp_path / "other"))
    path.write_text(json.dumps({**stated, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="no base_model_name_or_path"):
        run_suite(replace(asked, out=tmp_path / "other"))


@pytest.mark.slow
def test_a_run_that_kept_its_adapter(tmp_path: Path) -> None:
    """It answers as the folder does into which the adapter is merged."""
    from llava_runs import World

    from llava_bridge.train import align, tune

    save_tower(tmp_path / "tower")
    save_llm(tmp_path / "llm")
    save_conversations(tmp_path / "data")
    world = World(tmp_path)
    align(world.align_config("align", samples=4))
    run = tune(world.tune_config("tune", samples=8, save="adapter"))
    save_mllm(*load_adapter(run), tmp_path / "merged")
    make_files(tmp_path / "files", ["pope"], n=6)
    suite = write_suite(tmp_path, ("pope",))
    apart, merged = (
        run_suite(
            EvalConfig(
                model, tmp_path / "files", tmp_path / name, suite, precision="float32", batch_size=4, partial=True
            )
        )
        for model, name in ((run, "apart"), (tmp_path / "merged", "together"))
    )
    assert (apart / "real/pope.jsonl").read_bytes() == (merged / "real/pope.jsonl").read_bytes()
    assert find_model(EvalConfig(run / "adapter", tmp_path, tmp_path)).folder == run.resolve(), (
        "told by its own folder too"
    )
    fingerprint = read_manifest(apart / "real")["inputs"]["model"]
    assert fingerprint == model_fingerprint(run) != read_manifest(merged / "real")["inputs"]["model"]
    weights = run / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="not the weights"):
        model_fingerprint(run)
