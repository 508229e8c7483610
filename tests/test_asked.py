"""What a comparison says of how questions were asked and judged, against the manifests it was read from."""

from pathlib import Path
from typing import Any

import pytest

from clips_core.config import to_dict
from eval_suites.asked import batch_sentence, batch_words, evaluation_of, judge_sentence, judges_of
from eval_suites.benchmarks import BenchmarkTask, Suite
from eval_suites.judge import told
from eval_suites.records import Entry, Record, Run

SUITE = to_dict(Suite("mine", {"pope": BenchmarkTask(), "gqa": BenchmarkTask()}))
CONFIG = {
    "dtype": "bfloat16",
    "attention": "sdpa",
    "batch_size": 32,
    "device": "cuda",
    "lmms_eval": "0.7.3",
    "suite": SUITE,
}
JUDGE = {
    "model": "judge", "answered_by": ["judge-1"], "endpoint": "localhost:8000", "temperature": 0.7, "prompt_sha256": "ab" * 32,
    "prompt": "Compare …", "repeats": 3, "date": "2026-11-03T10:00:00+00:00", "judge_error": 0.03, "mean": 0.4,
    "interval": [0.3, 0.5], "categories": {"ocr": {"score": 0.5, "n": 4}, "rec": {"score": 0.25, "n": 8}},
}  # fmt: skip


def run(
    outputs: dict[str, Any], seed: int = 0, metrics: dict[str, Any] | None = None, answers: str = "yes", **config: Any
) -> Run:
    manifest = {"config": {**CONFIG, **config}, "outputs": outputs}
    records = {("pope", 0): Record("pope", 0, "p", "", "?", "yes", answers, 1.0)}
    entry = Entry("a", None, None, None, Path("a"), seed=seed)
    return Run(entry, {"real": manifest}, None, {"real": records}, {"real": metrics or {}}, {})


def check(n: int, changed: int) -> dict[str, float]:
    return {"n": n, "changed": changed, "share": changed / n}


def test_the_settings_are_those_of_the_manifest() -> None:
    found = evaluation_of([run({"model": "runs/a/tune"})])
    assert {key: found[key] for key in CONFIG if key != "suite"} == {k: v for k, v in CONFIG.items() if k != "suite"}
    assert (found["answered_by"], found["model"]) == ("clips-llava", "runs/a/tune")
    assert (found["empty_answers"], found["batch_check"], found["reported"], found["partial"]) == ({}, {}, [], {})


def test_batch_checks_of_all_trainings_add_up() -> None:
    own = [
        run({"batch_check": {"pope": check(32, 1), "gqa": check(8, 0)}}),
        run({"batch_check": {"pope": check(32, 2), "gqa": check(8, 0)}}, seed=1),
    ]
    found = evaluation_of(own)
    assert found["batch_check"] == {"pope": check(64, 3), "gqa": check(16, 0)}
    assert batch_words(found, "pope") == "3 of 64 (4.7 %)" and batch_words(found, "gqa") == "0 of 16 (0.0 %)"
    assert batch_words(found, "mme") == "not measured"
    sentence = batch_sentence("clips", found)
    assert (
        sentence is not None and "in batches of 32, clips gives another answer to 3 of 80 questions (3.8 %)" in sentence
    )


@pytest.mark.parametrize(
    "config, words",
    [
        ({"batch_size": 1}, "none: asked one by one"),
        ({"dtype": "float32"}, "none: float32"),
        ({"dtype": "unknown"}, "not measured"),
    ],
)
def test_where_nothing_was_measured_it_says_why(config: dict[str, Any], words: str) -> None:
    found = evaluation_of([run({}, **config)])
    assert batch_words(found, "pope") == words and batch_sentence("a", found) is None


def test_an_import_says_where_it_comes_from_and_what_was_other_there() -> None:
    outputs = {
        "model": "qwen2_5_vl pretrained=Qwen",
        "imported": {"folder": "lmms/qwen", "date": "20261103_101112", "seconds": 3.0},
        "reported": {"pope": {"pope_accuracy": 0.871, "pope_f1_score": 0.86}, "gqa": {"exact_match": 0.5}},
    }
    metrics = {"pope": {"pope_accuracy": 0.871 + 1e-9, "pope_f1_score": 0.85}}
    found = evaluation_of(
        [run(outputs, 4, metrics, " ", dtype="unknown", attention="unknown", prompts={"gqa": "1" * 64})]
    )
    assert found["answered_by"] == "lmms-eval itself, imported (run of 20261103_101112)"
    assert (found["dtype"], found["attention"], found["other_prompts"]) == ("unknown", "unknown", ["gqa"])
    assert found["empty_answers"] == {"pope": 1}  # allow_empty
    assert found["reported"] == [
        {"seed": 4, "task": "pope", "metric": "pope_f1_score", "reported": 0.86, "scored": 0.85}
    ]


def test_a_model_of_lmms_evals_list_is_named() -> None:
    found = evaluation_of([run({"model": "lmms:qwen2_5_vl"}, dtype="unknown")])
    assert found["answered_by"] == "lmms-eval's own class qwen2_5_vl"


def test_trainings_that_were_asked_otherwise_are_told_one_by_one() -> None:
    found = evaluation_of([run({}), run({}, seed=1, device="cpu")])
    assert found["device"] == ["cuda", "cpu"] and found["dtype"] == "bfloat16"


def test_judges_of_several_trainings() -> None:
    second = {
        **JUDGE, "date": "2026-11-05T10:00:00+00:00", "judge_error": 0.04,
        "categories": {"ocr": {"score": 0.7, "n": 4}, "rec": {"score": 0.35, "n": 8}},
    }  # fmt: skip
    found = judges_of([run({"judge": {"mmvet": JUDGE}}), run({"judge": {"mmvet": second}}, seed=1)])["mmvet"]
    assert found["told"] == told(JUDGE)
    assert found["date"] == [JUDGE["date"], second["date"]] and found["repeats"] == [3, 3]
    assert found["judge_error"] == pytest.approx(0.05 / 2)  # of the mean of two: sqrt(0.03² + 0.04²) / 2
    assert found["capabilities"]["ocr"] == {"score": pytest.approx(0.6), "n": 4}
    assert found["capabilities"]["rec"] == {"score": pytest.approx(0.3), "n": 8}
    sentence = judge_sentence("mmvet", found)
    assert "judge (which answers as judge-1) at temperature 0.7 with prompt abababab" in sentence
    assert "every answer 3 times, on 2026-11-03 to 2026-11-05" in sentence


def test_judged_once_has_no_scatter() -> None:
    found = judges_of([run({"judge": {"mmvet": {**JUDGE, "repeats": 1, "judge_error": None}}})])["mmvet"]
    assert found["judge_error"] is None and "every answer once, on 2026-11-03:" in judge_sentence("mmvet", found)
    assert judges_of([run({})]) == {}
