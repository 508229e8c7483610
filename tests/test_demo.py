"""The whole path, small, through the real command: world → towers → LLaVAs → benchmarks → page."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

COMMAND = [str(Path(sys.executable).with_name("clips-llava")), "demo", "--smoke", "--out"]
TOWERS = ("clip_mix", "clips")
BENCHMARKS = ("pope", "mme", "gqa", "textvqa_val")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke demo, stopped by Ctrl-C in the middle of a stage and run again."""
    out = tmp_path_factory.mktemp("demo") / "smoke"
    with open(out.parent / "first.log", "w") as log:
        process = subprocess.Popen([*COMMAND, str(out)], stdout=log, stderr=subprocess.STDOUT)
    wait_for(out / "clips" / "tower" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not (out / "clips" / "tower" / "manifest.json").exists()
    world = (out / "world" / "manifest.json").stat().st_mtime_ns
    again = subprocess.run([*COMMAND, str(out)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (out / "world" / "manifest.json").stat().st_mtime_ns == world  # what had finished was not done again
    (out.parent / "second.log").write_text(again.stdout)
    return out


def wait_for(path: Path, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the demo ended before it was interrupted"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))


def test_report_has_what_it_promises(run: Path, report: dict[str, Any]) -> None:
    assert set(report["towers"]) == set(TOWERS)
    for tower in report["towers"].values():
        assert {"tower", "mllm", "zero_shot", "benchmarks"} <= tower.keys()
        assert set(tower["benchmarks"]) >= set(BENCHMARKS)
        assert Path(tower["tower"]["path"]).is_dir() and Path(tower["mllm"]["path"]).is_dir()
    compared = {row["benchmark"] for row in report["comparisons"]}
    assert set(BENCHMARKS) <= compared
    for row in report["comparisons"]:
        assert {row["a"], row["b"]} == set(TOWERS)
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert 0 <= row["p_value"] <= 1 and row["n_samples"] > 0
    assert all(seconds > 0 for seconds in report["seconds"].values()) and len(report["seconds"]) >= 9
    assert report["environment"]["packages"]["lmms-eval"] == "0.7.3"


def test_scores_are_those_of_the_answers(run: Path, report: dict[str, Any]) -> None:
    """lmms-eval's figures, recomputed from the raw answers by the benchmarks' plain definitions."""
    for tower in TOWERS:
        for pictures in ("real", "blank", "shuffled"):
            folder = run / tower / "eval" / pictures
            results = json.loads((folder / "results.json").read_text())
            rows = [json.loads(line) for line in (folder / "pope.jsonl").read_text().splitlines()]
            right = [row["answer"].strip().lower() == row["target"].strip().lower() for row in rows]
            assert math.isclose(results["pope"]["pope_accuracy"], sum(right) / len(right))
            assert len(rows) == 12 and all(row["answer"] for row in rows)


def test_page_is_self_contained(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "these checkpoints" in page.lower()
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert loaded and all(target.startswith(("data:", "#")) for target in loaded)


def test_llava_loads_without_us(run: Path) -> None:
    program = f"""
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(run / "clips" / "tune" / "model")!r})
processor = AutoProcessor.from_pretrained({str(run / "clips" / "tune" / "model")!r})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "Is there a star?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (48, 48), (200, 30, 30)), text=text, return_tensors="pt").to(dtype=model.dtype)
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert out.shape[1] > inputs["input_ids"].shape[1]
assert not any(name.split(".")[0] in ("clips_core", "llava_bridge", "eval_suites") for name in sys.modules)
print(type(model).__name__, (inputs["input_ids"] == model.config.image_token_id).sum().item())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=run, env={**os.environ, "PYTHONPATH": ""}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-2:] == ["LlavaForConditionalGeneration", "16"]


def test_each_stage_says_where_it_stands(run: Path) -> None:
    log = (run.parent / "second.log").read_text()
    assert re.findall(r"\[(\d)/9\]", log) == list("123456789")
    assert "GFLOP a picture" in log and "retrieval among 60 held-out pictures" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "demo_pretrain", "data.train=nowhere"], "nowhere: no such folder"),
        (["pretrain", "demo_pretrian"], "did you mean 'demo_pretrain'"),
        (["pretrain", "demo_pretrain", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["align", "demo_align", "out=x", "tower=clips:nowhere", "data.json=a", "data.images=b"], "nowhere"),
        (["eval", "run", "model=nowhere", "data=nowhere", "out=x"], "nowhere"),
        (["compare", "nowhere", "elsewhere", "--data", "x", "--out", "y"], "nowhere"),
        (["tower", "clip:nowhere"], "did you mean 'clips:"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run([COMMAND[0], *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert "Traceback" not in result.stderr
