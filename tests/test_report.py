"""The comparison of towers on small synthetic folders, against plain re-computation, and the page it makes."""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from scipy import stats

from clips_core.config import to_dict
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, read_json, write_json, write_manifest
from eval_suites import samples
from eval_suites.benchmarks import load_suite, model_fingerprint
from eval_suites.bundle import write_bundle
from eval_suites.charts import HEIGHT, MOST_POINTS, WIDTH, Line, averaged, line_chart, short, ticks
from eval_suites.cli import main
from eval_suites.comparison import Comparison, between, p_text, points, with_verdicts
from eval_suites.page import duration, quantity
from eval_suites.records import Entry, entries_of
from eval_suites.report import compare
from eval_suites.statistics import holm, mean_score, mme_difference, paired_difference

HOSTILE = '</dd><script>alert("1")</script><img src=x onerror=alert(1)>'
COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("star", "heart", "flag", "bell")


# ------------------------------------------------------------------------------------------ synthetic folders


@dataclass
class Question:
    task: str
    doc_id: int
    cluster: str
    category: str
    question: str
    target: str


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (64, 64), tuple(rng.integers(150, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, size = rng.integers(2, 44, 3)
        draw.ellipse((x, y, x + 8 + size // 4, y + 8 + size // 4), fill=tuple(rng.integers(0, 200, 3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)


def make_benchmarks(folder: Path, scale: int = 1) -> list[Question]:
    """POPE (2 questions a picture), MME (pairs), GQA (pictures apart, joined by id) and TextVQA as parquet files."""
    root, rng = folder / "lmms-lab-encoder", np.random.default_rng(7)
    questions: list[Question] = []

    def image(seed: int) -> dict[str, Any]:
        return {"bytes": picture(seed), "path": f"{seed}.png"}

    def thing() -> str:
        return f"{rng.choice(COLOURS)} {rng.choice(SHAPES)}"

    pope, mme, gqa, gqa_images, textvqa = [], [], [], [], []
    for i in range(24 * scale):
        category = ("random", "popular", "adversarial")[i % 3]
        for target in ("yes", "no"):
            questions.append(
                Question("pope", len(pope), f"p{i}", category, f"Is there a {thing()} in the image?", target)
            )
            pope.append({"question": questions[-1].question, "answer": target, "image": image(i)})
    for i in range(20 * scale):
        for target in ("Yes", "No"):
            asked = f"Is there a {thing()} in this image? Please answer yes or no."
            questions.append(Question("mme", len(mme), f"existence / m{i}", "existence", asked, target))
            mme.append({"question": asked, "answer": target, "image": image(1000 + i)})
    for i in range(15 * scale):
        gqa_images.insert(0, {"id": f"g{i}", "image": image(2000 + i)})  # the pictures lie in another order
        for target in (str(rng.choice(COLOURS)), "yes"):
            asked = f"What color is the {rng.choice(SHAPES)}?" if target != "yes" else f"Are there any {thing()}s?"
            questions.append(Question("gqa", len(gqa), f"g{i}", "", asked, target))
            gqa.append({"imageId": f"g{i}", "question": asked, "answer": target})
    for i in range(12 * scale):
        questions.append(Question("textvqa_val", i, f"t{i}", "", "what is written on the sign?", f"word{i}"))
        textvqa.append(
            {"question": "what is written on the sign?", "answers": [f"word{i}"] * 10, "image": image(3000 + i)}
        )
    (root / "GQA").mkdir(parents=True)
    (root / "GQA/README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n"
            for name in ("testdev_balanced_instructions", "testdev_balanced_images")
        )
        + "---\n"
    )
    write_parquet(root / "POPE/data/test-00000-of-00002.parquet", pope[:20])
    write_parquet(root / "POPE/data/test-00001-of-00002.parquet", pope[20:])
    write_parquet(root / "MME/data/test-00000-of-00001.parquet", mme)
    write_parquet(root / "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet", gqa)
    write_parquet(root / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet", gqa_images)
    write_parquet(root / "textvqa/data/validation-00000-of-00001.parquet", textvqa)
    return questions


def make_model(folder: Path, name: str) -> None:
    """The files of a model folder that its fingerprint needs."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"model_type": "llava"})
    for file in ("generation_config.json", "tokenizer_config.json"):
        write_json(folder / file, {})
    (folder / "model.safetensors").write_bytes(name.encode())


def write_evaluation(folder: Path, pictures: str, questions: list[Question], right: np.ndarray, model: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for item, score in zip(questions, right.astype(float), strict=True):
        wrong = {"yes": "no", "no": "yes"}.get(item.target.lower(), HOSTILE)
        rows.setdefault(item.task, []).append(
            {
                "task": item.task, "doc_id": item.doc_id, "cluster": item.cluster, "category": item.category,
                "question": item.question, "target": item.target, "answer": item.target if score else wrong,
                "score": score,
            }
        )  # fmt: skip
    for task, own in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own))
    mean = {task: float(np.mean([row["score"] for row in own])) for task, own in rows.items()}
    names = {"pope": "pope_f1_score", "mme": "mme_perception_score"}
    results = {task: {names.get(task, "exact_match"): value, "n": len(rows[task])} for task, value in mean.items()}
    write_json(folder / "results.json", results)
    config = {"pictures": pictures, "dtype": "float32", "suite": to_dict(load_suite("demo"))}
    inputs = {"model": model_fingerprint(model), "data": "3" * 64}
    write_manifest(folder, "eval", config, inputs, {"seconds": {"pope": 20.0, "mme": 11.5}})


def make_entry(
    folder: Path, method: str, questions: list[Question], skill: float, seed: int, n: int = 200, hits: float = 0.15
) -> Entry:
    """Runs of one tower whose LLaVA answers rightly with probability `skill`, and half the time without the picture."""
    rng = np.random.default_rng(seed)
    entry = Entry(
        method, *(folder / method / name for name in ("pretrain", "align", "tune", "real", "blank", "shuffled"))
    )
    log = MetricsLog(entry.tower / "metrics.jsonl")
    for step in range(1, 301):
        fade = math.exp(-step / 120)
        losses = {"contrastive_web": 2.6 + 2.2 * fade, "contrastive_sub": 1.9 + 2.9 * fade, "caption": 1.2 + 4 * fade}
        losses = losses if method == "clips" else {"contrastive": 2.9 + 1.9 * fade}
        noise = {name: value + rng.normal(0, 0.08) for name, value in losses.items()}
        log.log(step=step, samples=128 * step, seconds=1.1 * step, loss=sum(noise.values()), lr=1e-3, **noise)
        if step % 60 == 0:
            recalls = {f"R@{k}": min(1.0, hits * k**0.6 * (1 - fade)) for k in (1, 5, 10)}
            zero_shot = {"image_to_text": recalls, "text_to_image": {k: 0.9 * v for k, v in recalls.items()}, "n": n}
            log.log(step=step, samples=128 * step, seconds=1.1 * step, zero_shot=zero_shot)
    ranks = {
        way: np.where(rng.random(n) < hits, 0, rng.integers(1, n, n)).tolist()
        for way in ("image_to_text", "text_to_image")
    }
    recalls_of = {way: {f"R@{k}": float(np.mean(np.array(own) < k)) for k in (1, 5, 10)} for way, own in ranks.items()}
    write_json(
        entry.tower / "zero_shot.json",
        {**recalls_of, "n": n, "chance": {f"R@{k}": k / n for k in (1, 5, 10)}, "ranks": ranks},
    )
    costs = {"parameters": 5_300_000, "flops_per_sample": 2.1e9 if method == "clips" else 1.3e9}
    outputs = {"method": method, "samples": 38_400, "seconds": 330.0, **costs}
    (entry.tower / "export" / "hf").mkdir(parents=True)
    (entry.tower / "export" / "hf" / "model.safetensors").write_bytes(f"tower {method}".encode())
    manifest = write_manifest(entry.tower, "pretrain", {"method": method, "seed": 0}, {"data": "1" * 64}, outputs)
    inputs = {"tower": manifest["weights"]["export/hf/model.safetensors"]}
    for stage, path in (("align", entry.align), ("tune", entry.tune)):
        log = MetricsLog(path / "metrics.jsonl")
        for step in range(1, 61):
            log.log(step=step, loss=2 + 2 * math.exp(-step / 15) + rng.normal(0, 0.05), lr=1e-3, seconds=1.6 * step)
        make_model(path / "model", f"{method} {stage}")
        manifest = write_manifest(path, stage, {"steps": 60, "note": HOSTILE}, inputs, {})
        inputs = {**inputs, "align": manifest["weights"]["model/model.safetensors"]}
    easier = {item.cluster: rng.normal(0, 0.15) for item in questions}  # questions about one picture go together
    chance = np.array([skill + easier[item.cluster] for item in questions])
    write_evaluation(entry.real, "real", questions, rng.random(len(questions)) < chance, entry.tune / "model")
    write_evaluation(entry.blank, "blank", questions, rng.random(len(questions)) < 0.45, entry.tune / "model")
    write_evaluation(entry.shuffled, "shuffled", questions, rng.random(len(questions)) < 0.45, entry.tune / "model")
    return entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    return make_benchmarks(folder / "benchmarks")


@pytest.fixture(scope="module")
def entries(folder: Path, questions: list[Question]) -> list[Entry]:
    return [
        make_entry(folder, "clips", questions, skill=0.85, seed=1, hits=0.2),
        make_entry(folder, "clip_mix", questions, skill=0.55, seed=2, hits=0.04),
    ]


@pytest.fixture(scope="module")
def report(folder: Path, entries: list[Entry]) -> dict[str, Any]:
    compare(entries, folder / "out", folder / "benchmarks", {"world": 12.5}, with_aims=True)
    return dict(read_json(folder / "out" / "report.json"))


@pytest.fixture(scope="module")
def html(folder: Path, report: dict[str, Any]) -> str:
    return (folder / "out" / "report.html").read_text()


@pytest.fixture
def copies(tmp_path: Path, folder: Path, entries: list[Entry]) -> list[Entry]:
    """The entries in folders of their own, to be damaged."""
    for entry in entries:
        shutil.copytree(folder / entry.name, tmp_path / entry.name)
    return [
        Entry(entry.name, *(tmp_path / entry.name / path.name for path in dataclasses.astuple(entry)[1:-1]))
        for entry in entries
    ]


def scores(folder: Path, task: str) -> dict[int, dict[str, Any]]:
    return {row["doc_id"]: row for row in map(json.loads, (folder / f"{task}.jsonl").read_text().splitlines())}


def edit(path: Path, line: int, **values: Any) -> None:
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    rows[line] |= values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------- report.json


def test_report_json_has_the_promised_shape(report: dict[str, Any]):
    assert list(report) == [
        *("towers", "comparisons", "controls", "categories", "seconds", "environment", "findings", "settings"),
        *("published", "anchor", "anchored"),
    ]  # fmt: skip
    assert list(report["towers"]) == ["clips", "clip_mix"]
    parts = ["tower", "mllm", "zero_shot", "benchmarks", "evaluation", "judges"]
    assert all(list(tower) == parts for tower in report["towers"].values())
    fields = [
        "benchmark",
        "metric",
        "a",
        "b",
        "difference",
        "interval",
        "p_value",
        "adjusted_p",
        "better",
        "n_samples",
        "n_clusters",
        "n_seeds",
        "inference",
        "detectable",
    ]
    assert all(list(row) == fields for row in report["comparisons"] + report["controls"])
    assert report["seconds"]["world"] == 12.5
    assert report["seconds"]["pretrain clips"] == 330.0
    assert report["seconds"]["tune clip_mix"] == pytest.approx(96.0)  # from its log: its manifest says nothing
    assert report["seconds"]["eval clips, blank"] == 31.5
    assert report["environment"]["python"]
    assert all(isinstance(sentence, str) for sentence in report["findings"])


def test_a_stage_on_the_clock_is_not_counted_twice(copies: list[Entry], folder: Path, tmp_path: Path):
    clock = {"world": 12.5, "pretrain clips": 340.0, "eval clips": 120.0}
    seconds = compare(copies, tmp_path, folder / "benchmarks", clock).seconds
    assert {stage: seconds[stage] for stage in clock} == clock
    assert not any(stage.startswith("eval clips,") for stage in seconds) and "eval clip_mix, blank" in seconds


def test_figures_equal_plain_recomputation(report: dict[str, Any], entries: list[Entry]):
    for entry in entries:
        own = report["towers"][entry.name]
        benchmarks = own["benchmarks"]
        rows = {task: scores(entry.real, task) for task in ("pope", "mme", "gqa", "textvqa_val")}
        assert list(benchmarks) == ["all questions", "yes/no questions", *rows]
        everything = [row for of_task in rows.values() for row in of_task.values()]
        yes_no = [row for row in everything if row["target"] in ("yes", "no", "Yes", "No")]
        assert {row["task"] for row in yes_no} == {"pope", "mme", "gqa"}
        for name, of_group in {**{t: list(r.values()) for t, r in rows.items()}, "all questions": everything,
                               "yes/no questions": yes_no}.items():  # fmt: skip
            assert benchmarks[name]["accuracy"] == pytest.approx(np.mean([row["score"] for row in of_group]))
            assert benchmarks[name]["n_samples"] == len(of_group)
            assert benchmarks[name]["n_clusters"] == len({(row["task"], row["cluster"]) for row in of_group})
            low, high = benchmarks[name]["interval"]
            assert 0 <= low < benchmarks[name]["accuracy"] <= high <= 1
        blank = np.mean([row["score"] for row in scores(entry.blank, "pope").values()])
        assert benchmarks["pope"]["blank"]["accuracy"] == pytest.approx(blank)
        assert benchmarks["pope"]["metrics"] == read_json(entry.real / "results.json")["pope"]
        assert own["tower"]["path"] == str(entry.tower)
        assert own["tower"]["parameters"] == 5_300_000
        assert own["mllm"]["path"] == str(entry.tune / "model")
        zero_shot = read_json(entry.tower / "zero_shot.json")
        assert own["zero_shot"]["text_to_image"] == zero_shot["text_to_image"]
        assert "ranks" not in own["zero_shot"]


def test_comparisons_are_paired_over_samples(report: dict[str, Any], entries: list[Entry]):
    rows = {(row["benchmark"], row["metric"]): row for row in report["comparisons"]}
    a, b = (scores(entry.real, "mme") for entry in entries)
    by_pair: dict[str, list[float]] = {}
    for doc_id, row in a.items():
        by_pair.setdefault(row["cluster"], []).append(row["score"] - b[doc_id]["score"])
    means = [np.mean(values) for values in by_pair.values()]
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    mme = rows["mme", "accuracy"]
    assert (mme["a"], mme["b"], mme["n_samples"]) == ("clips", "clip_mix", len(a))
    assert mme["difference"] == pytest.approx(np.mean(means))
    assert mme["interval"] == pytest.approx([expected.low, expected.high])

    ranks = [read_json(entry.tower / "zero_shot.json")["ranks"]["text_to_image"] for entry in entries]
    hits = [np.array(own) < 5 for own in ranks]
    only_a, only_b = int((hits[0] & ~hits[1]).sum()), int((~hits[0] & hits[1]).sum())
    found = rows["retrieval, caption → picture", "R@5"]
    assert found["difference"] == pytest.approx((only_a - only_b) / 200)
    assert found["p_value"] == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)


def test_five_captions_of_a_picture_are_no_five_independent_queries(copies: list[Entry], folder: Path, tmp_path: Path):
    rng, n = np.random.default_rng(3), 40
    owner = np.repeat(np.arange(n), 5)
    ranks = [(rng.integers(0, 3, n)[owner] + rng.integers(0, 2, 5 * n)).tolist() for _ in copies]
    for entry, own in zip(copies, ranks, strict=True):
        zero_shot = read_json(entry.tower / "zero_shot.json")
        zero_shot |= {
            "n": n,
            "captions": 5 * n,
            "text_to_image": {f"R@{k}": float(np.mean(np.array(own) < k)) for k in (1, 5, 10)},
        }
        zero_shot["ranks"] = {"image_to_text": zero_shot["ranks"]["image_to_text"][:n], "text_to_image": own}
        write_json(entry.tower / "zero_shot.json", zero_shot)
    found = compare(copies, tmp_path / "unknown", folder / "benchmarks")
    ways = {row.benchmark for row in found.comparisons if row.metric == "R@1"}
    assert ways == {"retrieval, picture → caption"}  # nobody knows which captions belong together
    only_pictures = found.towers["clips"]["zero_shot"]["intervals"]["text_to_image"]["R@1"]
    for entry in copies:
        zero_shot = read_json(entry.tower / "zero_shot.json")
        write_json(entry.tower / "zero_shot.json", zero_shot | {"owner": owner.tolist()})
    found = compare(copies, tmp_path / "known", folder / "benchmarks")
    hits = [(np.array(own) < 1).astype(float) for own in ranks]
    row = next(r for r in found.comparisons if (r.benchmark, r.metric) == ("retrieval, caption → picture", "R@1"))
    assert row.n_samples == 200 and row.interval == paired_difference(*hits, owner.tolist()).interval
    interval = found.towers["clips"]["zero_shot"]["intervals"]["text_to_image"]["R@1"]
    assert interval == mean_score(hits[0], owner.tolist()).interval
    as_if_apart = stats.binomtest(int(hits[0].sum()), 200).proportion_ci(method="wilson")
    assert np.ptp(as_if_apart) < np.ptp(interval) < np.ptp(only_pictures)


def test_controls_compare_a_model_with_itself(report: dict[str, Any], entries: list[Entry]):
    rows = {(row["benchmark"], row["b"]): row for row in report["controls"]}
    assert {b for _, b in rows} == {
        f"{name}, {shown}" for name in ("clips", "clip_mix") for shown in ("blank", "shuffled")
    }
    for entry in entries:
        for shown in ("blank", "shuffled"):
            row = rows["yes/no questions", f"{entry.name}, {shown}"]
            differences = [
                own["score"] - scores(getattr(entry, shown), task)[doc_id]["score"]
                for task in ("pope", "mme", "gqa")
                for doc_id, own in scores(entry.real, task).items()
                if own["target"].lower() in ("yes", "no")
            ]
            assert row["a"] == entry.name
            assert row["difference"] == pytest.approx(np.mean(differences))
            assert row["n_samples"] == len(differences)


def test_controls_stand_under_the_pictures_that_were_shown(
    copies: list[Entry],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    asked = [dataclasses.replace(entry, blank=None) for entry in copies]
    found = compare(asked, tmp_path / "out", folder / "benchmarks")
    _, _, printed = capsys.readouterr().out.partition("Accuracy with the right pictures")
    assert "− shuffled" in printed and "− blank" not in printed
    [pope] = [row for row in found.controls if (row.benchmark, row.b) == ("pope", "clips, shuffled")]
    [line] = [line for line in printed.splitlines() if line.split()[:2] == ["pope", "clips"]]
    assert f"{points(pope.difference)} {between(pope.interval)}" in line


def test_sentences_speak_of_these_checkpoints(report: dict[str, Any]):
    findings = report["findings"]
    assert re.fullmatch(
        r"Of these two checkpoints, clips answers better, by \d+\.\d % of a standard deviation \[\d+\.\d, \d+\.\d\]\.",
        findings[0],
    )
    assert not any("method" in sentence for sentence in findings)
    for sentence in findings:
        assert "checkpoint" in sentence or sentence.startswith("In pretraining, "), sentence  # that is a plain fact
    assert sum(sentence.startswith("Aim met: ") for sentence in findings) == 2
    assert any("uses the picture" in sentence for sentence in findings)


def test_the_headline_does_not_depend_on_the_order(
    folder: Path, report: dict[str, Any], entries: list[Entry], tmp_path: Path
):
    turned = compare(entries[::-1], tmp_path, folder / "benchmarks")
    assert turned.findings[0] == report["findings"][0]
    assert turned.comparisons[0].difference == pytest.approx(-report["comparisons"][0]["difference"])


def test_models_that_answer_alike_are_not_told_apart(copies: list[Entry], folder: Path, tmp_path: Path):
    first = copies[0]
    same = dataclasses.replace(first, name="twin")
    found = compare([first, same], tmp_path / "out", folder / "benchmarks")
    assert found.findings[0].startswith("These two checkpoints cannot be told apart")
    assert found.comparisons[0].p_value == 1.0
    assert found.comparisons[0].interval[0] < 0 < found.comparisons[0].interval[1]
    assert "clips answers better" not in (tmp_path / "out" / "report.html").read_text()


def test_aims_are_the_demos_alone(entries: list[Entry], folder: Path, tmp_path: Path):
    found = compare(entries, tmp_path, folder / "benchmarks")
    assert found.aims == [] and not any("Aim" in sentence for sentence in found.findings)


def test_aims_missed_are_said_to_be(copies: list[Entry], folder: Path, tmp_path: Path):
    zero_shot = read_json(copies[0].tower / "zero_shot.json")
    zero_shot["text_to_image"]["R@1"] = 0.095
    write_json(copies[0].tower / "zero_shot.json", zero_shot)
    for task in ("pope", "mme", "gqa", "textvqa_val"):
        shutil.copy(copies[0].real / f"{task}.jsonl", copies[0].blank)
    found = compare(copies, tmp_path / "out", folder / "benchmarks", with_aims=True)
    assert [aim.met for aim in found.aims] == [False, False]
    unsure = "cannot be told whether this checkpoint of the LLaVA with clips uses the picture"
    assert any(unsure in finding for finding in found.findings)
    assert "Aim missed" in (tmp_path / "out" / "report.html").read_text()


def test_a_winner_needs_holm_and_the_interval():
    def row(benchmark: str, interval: tuple[float, float], p_value: float) -> Comparison:
        return Comparison(benchmark, "accuracy", "a", "b", sum(interval) / 2, interval, p_value, p_value, None, 100, 50)

    rows = [
        row("suite", (0.01, 0.09), 0.04),  # the primary comparison: its own p
        row("pope", (0.01, 0.09), 0.04),  # 0.04 * 2
        row("mme", (-0.2, -0.1), 0.001),
        row("gqa", (-0.01, 0.2), 0.001),  # the interval holds zero
        row("textvqa_val", (-0.1, 0.2), 0.3),
    ]
    found = with_verdicts(rows)
    assert [row.better for row in found] == ["a", None, "b", None, None]
    assert found[0].adjusted_p == 0.04 and found[1].adjusted_p == pytest.approx(0.08)
    several = with_verdicts([row("suite", (0.01, 0.09), p) for p in (0.04, 0.01, 0.03)] + rows[1:])  # of three towers
    assert [row.adjusted_p for row in several[:3]] == pytest.approx([0.06, 0.03, 0.06])
    assert [row.better for row in several] == [None, "a", None, None, "b", None, None]


# ------------------------------------------------------------------------------------- MME's points, categories


def mme_points_of(rows: list[dict[str, Any]]) -> float:
    """MME's score in the words of its paper: accuracy + accuracy+ in percent, summed over the categories."""
    total = 0.0
    for category in {row["category"] for row in rows}:
        own = [row for row in rows if row["category"] == category]
        pairs = {row["cluster"]: [each["score"] for each in own if each["cluster"] == row["cluster"]] for row in own}
        total += 100 * sum(row["score"] for row in own) / len(own)
        total += 100 * sum(min(pair) for pair in pairs.values()) / len(pairs)
    return total


def test_mme_points_stand_beside_its_accuracy(report: dict[str, Any], entries: list[Entry]):
    own = [list(scores(entry.real, "mme").values()) for entry in entries]
    expected = [mme_points_of(rows) for rows in own]
    for entry, value in zip(entries, expected, strict=True):
        (points,) = report["towers"][entry.name]["benchmarks"]["mme"]["points"].items()
        assert points[0] == "MME perception"  # the sample world asks nothing of MME's cognition
        assert points[1]["value"] == pytest.approx(value) and points[1]["most"] == 200
        assert points[1]["interval"][0] < value < points[1]["interval"][1]
    (row,) = [row for row in report["comparisons"] if row["metric"] == "MME perception"]
    assert row["difference"] == pytest.approx(expected[0] - expected[1])
    found = mme_difference(
        *([row["score"] for row in rows] for rows in own),
        [row["cluster"] for row in own[0]],
        [row["category"] for row in own[0]],
    )
    assert (row["benchmark"], row["n_samples"], row["p_value"]) == ("mme", 40, found.p_value)
    assert row["interval"] == pytest.approx(found.interval)
    assert all(
        not figures["points"] for name, figures in report["towers"]["clips"]["benchmarks"].items() if name != "mme"
    )


def test_mme_points_are_one_of_holms_family(report: dict[str, Any]):
    rows = [Comparison(**row) for row in report["comparisons"]]
    secondary = [row for row in rows if row.benchmark != "suite"]
    assert "MME perception" in {row.metric for row in secondary}
    adjusted = holm([row.p_value for row in secondary])
    told = [
        p <= 0.05 and not row.interval[0] <= 0 <= row.interval[1] for row, p in zip(secondary, adjusted, strict=True)
    ]
    assert [row.better is not None for row in secondary] == told
    assert [row.adjusted_p for row in secondary] == pytest.approx(adjusted)


def test_half_a_pair_has_no_points(copies: list[Entry], folder: Path, tmp_path: Path):
    """An import of the first questions may end inside a pair."""
    for entry in copies:
        for shown in (entry.real, entry.blank, entry.shuffled):
            path = shown / "mme.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = compare(copies, tmp_path / "out", folder / "benchmarks")
    assert found.towers["clips"]["benchmarks"]["mme"]["points"] == {}
    assert not any(row.metric == "MME perception" for row in found.comparisons)


def test_wins_and_losses_by_category(report: dict[str, Any], entries: list[Entry], html: str):
    a, b = (scores(entry.real, "pope") for entry in entries)
    assert [(row["benchmark"], row["category"]) for row in report["categories"]] == [
        ("pope", "random"), ("pope", "popular"), ("pope", "adversarial"),
    ]  # fmt: skip
    text = words_of(html)
    text = text[text.index("Wins and losses by category") :]
    for row in report["categories"]:
        keys = [key for key, own in a.items() if own["category"] == row["category"]]
        wins = sum(a[key]["score"] > b[key]["score"] for key in keys)
        losses = sum(a[key]["score"] < b[key]["score"] for key in keys)
        assert (row["n_samples"], row["wins"], row["losses"]) == (len(keys), wins, losses)
        figures = [f"{row['category']} {len(keys)}", str(losses), str(wins)]
        figures.append(" · ".join(f"{100 * value:.1f}" for value in row["accuracy"][::-1]))
        figures.append(f"{points(row['difference'])} {between(row['interval'])} p {p_text(row['adjusted_p'])}")
        assert " ".join(figures) in text
        assert f'aria-label="clips alone {wins}, clip_mix alone {losses} of {len(keys)}; difference' in html


# ----------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Collects what a page would load, and checks that its tags close."""

    VOID = ("meta", "img", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.alt: list[str | None] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        own = dict(attributes)
        self.loaded += [
            str(own[name]) for name in ("src", "href", "srcset", "xlink:href", "data", "action") if name in own
        ]
        assert not any(name.startswith("on") for name in own), own
        if tag == "img":
            self.alt.append(own.get("alt"))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def words_of(html: str) -> str:
    """The page's text, cells apart."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_the_page_needs_nothing_else_and_escapes_all_text(html: str):
    page = Page()
    page.feed(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.loaded and all(address.startswith("data:image/png;base64,") for address in page.loaded)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html
    assert HOSTILE not in html and "<script" not in html
    assert HOSTILE in page.text  # an answer, shown as it is
    assert all(page.alt)
    assert "prefers-color-scheme: dark" in style


def test_the_page_shows_what_was_found(html: str, report: dict[str, Any]):
    page = Page()
    page.feed(html)
    text = " ".join(page.text.split())
    for sentence in report["findings"]:
        assert " ".join(sentence.split()) in text
    for tower in report["towers"].values():
        for figures in tower["benchmarks"].values():
            assert f"{100 * figures['accuracy']:.1f}" in text
            assert f"{100 * figures['blank']['accuracy']:.1f}" in text
    for title in ("Contrastive, web captions", "Contrastive, sub-captions", "Caption loss", "R@1 in %", "Stage 1 loss",
                  "Stage 2 loss"):  # fmt: skip
        assert title in text
    assert page.tags.count("polyline") == 2 * 7 - 2  # clip_mix has no sub-captions and no caption loss
    assert "2.1 GFLOP" in text and "5.3 M" in text and "5 min 30 s" in text
    assert "drawing" not in text and "12 s" in text  # the world's seconds
    assert "pope_f1_score" in text


def test_what_is_unknown_is_said_to_be(copies: list[Entry], folder: Path, tmp_path: Path):
    (copies[0].tower / "zero_shot.json").unlink()
    manifest = read_json(copies[1].tower / "manifest.json")
    write_json(copies[1].tower / "manifest.json", manifest | {"outputs": {}})
    found = compare(copies, tmp_path / "out", folder / "benchmarks")
    assert found.towers["clips"]["zero_shot"] is None
    assert found.towers["clip_mix"]["tower"]["flops_per_sample"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "unknown" in page and "not measured" in page
    assert not any(row.benchmark.startswith("retrieval") for row in found.comparisons)


def test_three_towers_are_compared_in_pairs(
    copies: list[Entry], folder: Path, tmp_path: Path, questions: list[Question]
):
    third = make_entry(tmp_path / "third", "clip", questions, skill=0.6, seed=3)
    found = compare([*copies, third], tmp_path / "out", folder / "benchmarks")
    pairs = [(row.a, row.b) for row in found.comparisons if row.benchmark == "all questions"]
    assert pairs == [("clips", "clip_mix"), ("clips", "clip"), ("clip_mix", "clip")]
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert page.open == []


def test_names_in_brackets_are_printed_as_they_are(
    copies: list[Entry], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = [dataclasses.replace(copies[0], name="[red]a[/red]"), dataclasses.replace(copies[1], name="<b>")]
    compare(named, tmp_path / "out", folder / "benchmarks")
    assert "[red]a[/red]" in capsys.readouterr().out
    assert "<b>&lt;b&gt;" not in (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;" in (tmp_path / "out" / "report.html").read_text()


# -------------------------------------------------------------------------------------------------- samples


def test_samples_show_the_right_picture_for_each_pattern(folder: Path, entries: list[Entry], questions: list[Question]):
    from eval_suites.records import read_run

    runs = [read_run(entry) for entry in entries]
    patterns = samples.choose([run.records["real"] for run in runs], runs[0].suite, folder / "benchmarks")
    assert sum(pattern.count for pattern in patterns) == len(questions)
    assert [pattern.right for pattern in patterns] == [(True, False), (False, True), (True, True), (False, False)]
    seeds = {"p": 0, "m": 1000, "g": 2000, "t": 3000}
    for pattern in patterns:
        assert 1 <= len(pattern.samples) <= samples.PER_PATTERN
        for sample in pattern.samples:
            assert tuple(record.right for record in sample.records) == pattern.right
            assert len({(record.task, record.doc_id) for record in sample.records}) == 1
            name = sample.records[0].cluster.rpartition(" ")[2]  # p3, m3, g3, t3
            shown = Image.open(io.BytesIO(base64.b64decode(str(sample.picture).partition(",")[2])))
            expected = Image.open(io.BytesIO(picture(seeds[name[0]] + int(name[1:]))))
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))


def test_samples_are_spread_over_tasks_and_lists():
    keys = [("gqa", i) for i in range(90)] + [("mme", 5), ("pope", 1), ("pope", 2), ("pope", 3)]
    assert samples.evenly_by_task(keys) == [("gqa", 22), ("gqa", 67), ("mme", 5), ("pope", 2)]
    assert samples.evenly_by_task(keys[:2]) == keys[:2]
    assert samples.evenly_by_task([]) == []


def test_large_pictures_are_made_smaller(tmp_path: Path):
    uri = samples._data_uri(Image.new("RGB", (1200, 600), "red"))
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (256, 128)


def test_rows_are_found_across_files_and_row_groups(tmp_path: Path):
    for part, start in enumerate((0, 25)):
        rows = [{"question": f"q{i}", "other": i} for i in range(start, start + 25)]
        write_parquet(tmp_path / f"test-{part}.parquet", rows, row_group=4)
    files = sorted(tmp_path.glob("*.parquet"))
    found = samples.read_rows(files, ["question"], [0, 3, 4, 24, 25, 49])
    assert found == {i: {"question": f"q{i}"} for i in (0, 3, 4, 24, 25, 49)}
    with pytest.raises(InputError, match="has 50 rows, but row 50"):
        samples.read_rows(files, ["question"], [2, 50])
    with pytest.raises(InputError, match=r"test-0\.parquet: cannot read the columns image"):
        samples.read_rows(files, ["image"], [2])


# ------------------------------------------------------------------------------------------------ bad input


def refused(entries: list[Entry], folder: Path, out: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        compare(entries, out / "out", folder / "benchmarks")
    assert not (out / "out").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"question": "Is this another question?"},
            "differ in the question of pope 3: 'Is there a .*' and 'Is this another",
        ),
        ({"target": "maybe"}, "differ in the target of pope 3"),
        ({"cluster": "p77"}, "differ in the cluster of pope 3"),
        ({"doc_id": 999}, "do not hold the same questions: pope 3 is in one of them only"),
        ({"doc_id": 2}, r"pope\.jsonl, line 4: a second answer to question 2"),
        ({"score": 1.5}, r"pope\.jsonl, line 4, score: Input should be less than or equal to 1"),
        ({"score": "right"}, r"pope\.jsonl, line 4, score: .*run the evaluation again"),
        ({"score": None}, "do not hold the same questions: pope 3 is in one of them only"),  # counts for no figure
    ],
)
def test_other_questions_are_refused(
    copies: list[Entry], folder: Path, tmp_path: Path, values: dict[str, Any], message: str
):
    edit(copies[1].shuffled / "pope.jsonl", 3, **values)
    refused(copies, folder, tmp_path, message)


def test_a_row_that_is_no_json_is_named(copies: list[Entry], folder: Path, tmp_path: Path):
    path = copies[0].real / "gqa.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    refused(copies, folder, tmp_path, r"gqa\.jsonl, line 31: not a JSON object")


def test_a_question_too_few_is_named(copies: list[Entry], folder: Path, tmp_path: Path):
    path = copies[1].real / "gqa.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    refused(copies, folder, tmp_path, "do not hold the same questions: gqa 28 is in one of them only")


def test_unfinished_and_mistaken_folders_are_refused(copies: list[Entry], folder: Path, tmp_path: Path):
    refused(
        [dataclasses.replace(copies[0], align=tmp_path / "nowhere"), copies[1]],
        folder,
        tmp_path,
        "nowhere: no such folder",
    )
    refused([dataclasses.replace(copies[0], align=copies[0].tune), copies[1]], folder, tmp_path, "'align' is needed")
    swapped = dataclasses.replace(copies[0], blank=copies[0].real)
    refused([swapped, copies[1]], folder, tmp_path, "evaluated with real pictures; blank ones are needed")
    (copies[0].tune / "manifest.json").unlink()
    refused(copies, folder, tmp_path, "has not finished")


def test_answers_of_another_model_are_refused(copies: list[Entry], folder: Path, tmp_path: Path):
    mixed = dataclasses.replace(copies[0], blank=copies[1].blank)
    refused([mixed, copies[1]], folder, tmp_path, "clip_mix/blank: answered by another model than that of .*clips/tune")


def test_evaluations_under_other_settings_are_refused(copies: list[Entry], folder: Path, tmp_path: Path):
    manifest = read_json(copies[1].real / "manifest.json")
    manifest["config"]["dtype"] = "bfloat16"  # how it was computed: may be waived
    write_json(copies[1].real / "manifest.json", manifest)
    refused(
        copies,
        folder,
        tmp_path,
        r"not only the towers differ \(evaluation\.dtype: clips 'float32', clip_mix 'bfloat16'\)",
    )
    found = compare(copies, tmp_path / "waived", folder / "benchmarks", waived=["evaluation.dtype"])
    assert any("evaluation.dtype" in sentence for sentence in found.findings)
    manifest["config"]["limit"] = 5  # what was asked: may not
    write_json(copies[1].real / "manifest.json", manifest)
    refused(copies, folder, tmp_path, r"were evaluated differently \(limit: null → 5\)")


def test_towers_need_names_of_their_own(copies: list[Entry], folder: Path, tmp_path: Path):
    refused([copies[0], copies[0]], folder, tmp_path, "different names")
    refused(copies[:1], folder, tmp_path, "two or more towers")


def test_other_benchmark_files_are_refused(copies: list[Entry], folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        compare(copies, tmp_path / "out", tmp_path / "nothing")
    other = tmp_path / "benchmarks"
    shutil.copytree(folder / "benchmarks", other)
    path = other / "lmms-lab-encoder/MME/data/test-00000-of-00001.parquet"
    write_parquet(path, pq.read_table(path).to_pylist()[::-1])
    with pytest.raises(InputError, match="give the folder of the benchmarks that were evaluated"):
        compare(copies, tmp_path / "out", other)


def test_a_damaged_picture_is_named(copies: list[Entry], folder: Path, tmp_path: Path):
    other = tmp_path / "benchmarks"
    shutil.copytree(folder / "benchmarks", other)
    path = other / "lmms-lab-encoder/textvqa/data/validation-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["image"]["bytes"] = row["image"]["bytes"][:90]
    write_parquet(path, rows)
    with pytest.raises(InputError, match=r"textvqa/data, row \d+: not a readable picture"):
        compare(copies, tmp_path / "out", other)


# --------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize("low, high", [(0, 0.37), (0, 38_400), (1.93, 4.8), (2.0, 2.0), (0, 0), (0, 1e-7), (-3.2, 9.1)])
def test_ticks_are_few_and_round_and_enclose_the_low_end(low: float, high: float):
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert found[0] <= low + 1e-12
    steps = np.diff(found)
    assert np.allclose(steps, steps[0]) if len(steps) else True
    assert all(step == 0 or re.match(r"[125]\.?0*e", f"{step:e}") for step in steps)


def test_a_chart_stays_in_its_box_and_names_its_lines():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in zip(range(1, 1001), rng.normal(5, 2, 1000), strict=True)]
    svg = str(
        line_chart("loss <1>", [Line("a & b", 0, points), Line("c", 1, points[:1]), Line("d", 2, [])], "steps", 1.0)
    )
    assert "loss &lt;1&gt;" in svg and "a &amp; b" in svg
    drawn = [
        tuple(map(float, pair.split(","))) for path in re.findall(r'points="([^"]+)"', svg) for pair in path.split()
    ]
    assert len(drawn) == MOST_POINTS + 1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn)
    assert svg.count('class="reference"') == 1


def test_long_curves_become_means():
    points = [(float(i), float(i % 7)) for i in range(1, 1000)]
    found = averaged(points)
    assert len(found) <= MOST_POINTS
    assert found[0] == (5.5, np.mean([y for _, y in points[:10]]))
    assert averaged(points[:50]) == points[:50]


def test_words_for_numbers():
    assert [duration(value) for value in (None, 3.2, 190, 7_260)] == ["unknown", "3 s", "3 min 10 s", "2 h 1 min"]
    assert [quantity(value, "FLOP") for value in (None, 2.1e9, 8.06e13)] == ["unknown", "2.1 GFLOP", "80.6 TFLOP"]
    assert quantity(412) == "412"
    assert [short(value) for value in (0.5, 1200, 0)] == ["0.5", "1.2k", "0"]


def test_runs_that_do_not_go_on_from_each_other_are_refused(copies: list[Entry], folder: Path, tmp_path: Path):
    a, b = copies
    refused([a, dataclasses.replace(b, align=a.align)], folder, tmp_path, "trained with another tower")
    with_others_tower = dataclasses.replace(b, tower=a.tower, align=a.align)
    refused([a, with_others_tower], folder, tmp_path, "goes on from another stage 1")


def test_an_entry_is_found_by_its_folder(tmp_path: Path):
    for name in ("align", "tune", "eval/real", "eval/blank"):
        (tmp_path / "clips" / name).mkdir(parents=True)
    (entry,) = entries_of(tmp_path / "clips")
    assert (
        entry.name == "clips" and entry.blank == tmp_path / "clips/eval/blank" and entry.tune == tmp_path / "clips/tune"
    )
    assert entry.tower is None and entry.shuffled is None  # not pretrained here; not shown other questions' pictures


def test_trainings_of_several_seeds_are_found_by_their_folder(tmp_path: Path):
    for name in ("tower", "seed0/align", "seed10/align", "seed2/align"):
        (tmp_path / "clips" / name).mkdir(parents=True)
    entries = entries_of(tmp_path / "clips")
    assert [(entry.name, entry.seed) for entry in entries] == [("clips", 0), ("clips", 2), ("clips", 10)]
    assert {entry.tower for entry in entries} == {tmp_path / "clips/tower"}
    assert entries[1].align == tmp_path / "clips/seed2/align" and entries[1].real == tmp_path / "clips/seed2/eval/real"


# --------------------------------------------------------------------------------------------- several trainings


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, questions: list[Question]) -> list[Entry]:
    """Three trainings of each of two towers, which share the tower."""
    root = tmp_path_factory.mktemp("trainings")
    entries = []
    for seed in range(3):
        for name, skill in (("clips", 0.95), ("clip_mix", 0.35)):
            made = make_entry(root / f"seed{seed}", name, questions, skill, seed=10 * seed + len(name))
            tower = next((entry.tower for entry in entries if entry.name == name), made.tower)
            entries.append(dataclasses.replace(made, seed=seed, tower=tower))
    return entries


def test_several_trainings_speak_of_the_towers(trainings: list[Entry], folder: Path, tmp_path: Path):
    found = compare(trainings, tmp_path, folder / "benchmarks")
    primary = found.comparisons[0]
    assert (primary.benchmark, primary.inference, primary.n_seeds) == ("suite", "recipe", 3)
    assert found.findings[0].startswith(
        "Of these two towers, with 3 trainings of each, clips makes the better LLaVA, by "
    )
    assert any("trained with 3 seeds" in sentence for sentence in found.findings)
    everything = {
        name: [row["score"] for entry in trainings if entry.name == name for task in ("pope", "mme", "gqa", "textvqa_val")
               for row in scores(entry.real, task).values()]
        for name in ("clips", "clip_mix")
    }  # fmt: skip
    for name, own in everything.items():
        assert found.towers[name]["benchmarks"]["all questions"]["accuracy"] == pytest.approx(np.mean(own))
        assert found.towers[name]["mllm"]["seeds"] == [0, 1, 2]
    row = next(row for row in found.comparisons if row.benchmark == "all questions")
    assert row.difference == pytest.approx(np.mean(everything["clips"]) - np.mean(everything["clip_mix"]))
    assert row.n_samples == primary.n_samples == len(everything["clips"]) / 3
    own = {
        name: [list(scores(entry.real, "mme").values()) for entry in trainings if entry.name == name]
        for name in everything
    }
    expected = {name: np.mean([mme_points_of(rows) for rows in each]) for name, each in own.items()}
    for name, value in expected.items():
        assert found.towers[name]["benchmarks"]["mme"]["points"]["MME perception"]["value"] == pytest.approx(value)
    row = next(row for row in found.comparisons if row.metric == "MME perception")
    assert row.difference == pytest.approx(expected["clips"] - expected["clip_mix"]) and row.inference == "recipe"
    popular = next(row for row in found.categories if row.category == "popular")
    by_seed = [
        next(scores(entry.real, "pope") for entry in trainings if (entry.name, entry.seed) == (name, seed))
        for seed in range(3) for name in ("clips", "clip_mix")
    ]  # fmt: skip
    wins = sum(
        row["score"] > second[key]["score"]
        for first, second in zip(by_seed[::2], by_seed[1::2], strict=True)
        for key, row in first.items() if row["category"] == "popular"
    )  # fmt: skip
    assert popular.wins == pytest.approx(wins / 3) and (popular.n_samples, popular.n_seeds) == (16, 3)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert (
        "1 min 36 s · 1 min 36 s · 1 min 36 s" in page.text and "5 min 30 s · " not in page.text
    )  # the tower was trained once
    assert page.open == [] and "seed 2" in page.text and "these checkpoints" not in page.text


def test_what_is_said_of_towers_that_were_pretrained_anew(trainings: list[Entry], folder: Path, tmp_path: Path):
    """One tower anew for each seed, the other once: neither `ways of pretraining` nor `each was pretrained once` is true."""
    mixed = []
    for entry in trainings:
        if entry.name == "clips":
            own = tmp_path / f"tower{entry.seed}"
            shutil.copytree(entry.tower, own)
            entry = dataclasses.replace(entry, tower=own)
        mixed.append(entry)
    found = compare(mixed, tmp_path / "out", folder / "benchmarks")
    assert [found.towers[name]["tower"]["pretrainings"] for name in ("clips", "clip_mix")] == [3, 1]
    assert found.findings[0].startswith("Of these two towers, with 3 trainings of each, clips makes")
    last = next(sentence for sentence in found.findings if "trained with 3 seeds" in sentence)
    assert "are among them for clips, of which each seed had its own, and not for clip_mix, pretrained once." in last
    page = Page()
    page.feed((tmp_path / "out/report.html").read_text())
    assert "Each was pretrained once (clip_mix) or 3 times (clips), then put" in page.text
    assert "pretrained once, and" not in page.text


def test_three_towers(entries: list[Entry], folder: Path, questions: list[Question], tmp_path: Path):
    """Three primary comparisons: Holm's over them, a headline of all, and each pair's."""
    third = make_entry(tmp_path / "made", "twin", questions, 0.9, seed=11)
    found = compare([*entries, third], tmp_path / "out", folder / "benchmarks")
    primary = [row for row in found.comparisons if row.benchmark == "suite"]
    assert [(row.a, row.b) for row in primary] == [("clips", "clip_mix"), ("clips", "twin"), ("clip_mix", "twin")]
    assert [row.adjusted_p for row in primary] == pytest.approx(holm([row.p_value for row in primary]))
    assert [row.better for row in primary] == ["clips", None, "twin"]
    assert found.findings[0] == (
        "Of these 3 checkpoints, over the suite: clips is better than clip_mix; twin is better than clip_mix; "
        "clips and twin cannot be told apart."
    )
    assert sum("Holm's p of 3 pairs of towers" in sentence for sentence in found.findings) == 3
    page = Page()
    page.feed((tmp_path / "out/report.html").read_text())
    assert page.open == [] and "clip_mix − twin" in page.text


def test_a_picture_in_two_benchmarks_is_one_cluster_of_the_pooled_figure(
    copies: list[Entry], folder: Path, tmp_path: Path
):
    before = compare(copies, tmp_path / "before", folder / "benchmarks").comparisons[1]
    for entry in copies:
        for shown in (entry.real, entry.blank, entry.shuffled):
            for line in range(12):
                edit(shown / "textvqa_val.jsonl", line, cluster=f"p{line}")  # POPE's pictures
    row = compare(copies, tmp_path / "after", folder / "benchmarks").comparisons[1]
    assert (row.benchmark, row.n_samples) == ("all questions", before.n_samples)
    shared = len(
        {f"p{line}" for line in range(12)} & {own["cluster"] for own in scores(copies[0].real, "pope").values()}
    )
    assert shared > 0 and row.n_clusters == before.n_clusters - shared


def test_trainings_of_other_seeds_are_no_pairs(copies: list[Entry], folder: Path, tmp_path: Path):
    for stage in ("align", "tune"):
        path = getattr(copies[1], stage) / "manifest.json"
        manifest = read_json(path)
        write_json(path, manifest | {"config": manifest["config"] | {"seed": 7}})
    with pytest.raises(InputError, match=r"align\.seed: clips None, clip_mix 7; tune\.seed"):
        compare(copies, tmp_path, folder / "benchmarks")
    found = compare(copies, tmp_path, folder / "benchmarks", waived=["align.seed", "tune.seed"])
    assert any("tune.seed" in sentence and "was waived" in sentence for sentence in found.findings)


def test_a_stage_2_that_kept_its_adapter_alone(copies: list[Entry], folder: Path, tmp_path: Path):
    for entry in copies:
        vision = {
            "model_type": "llava",
            "vision_config": {"image_size": 224, "patch_size": 16},
            "image_seq_length": 196,
        }
        write_json(entry.align / "model/config.json", vision)
        shutil.rmtree(entry.tune / "model")
        (entry.tune / "adapter").mkdir()
        (entry.tune / "adapter/adapter_model.safetensors").write_bytes(entry.name.encode())
        write_json(entry.tune / "manifest.json", read_json(entry.tune / "manifest.json") | {"weights": {}})
        for shown in (entry.real, entry.blank, entry.shuffled):
            manifest = read_json(shown / "manifest.json")
            model = model_fingerprint(entry.tune)
            write_json(shown / "manifest.json", manifest | {"inputs": manifest["inputs"] | {"model": model}})
    found = compare(copies, tmp_path, folder / "benchmarks")
    settings = {setting.key: setting.values["clips"] for setting in found.settings}
    assert (settings["tower.image_size"], settings["tower.image_tokens"]) == (224, 196)
    assert found.towers["clips"]["mllm"]["path"] == str(copies[0].tune / "adapter")
    (copies[0].tune / "adapter/adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(InputError, match="answered by another model"):
        compare(copies, tmp_path, folder / "benchmarks")


def test_trainings_are_paired_by_seed(trainings: list[Entry], folder: Path, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"clips has the seeds \[0, 1, 2\] and clip_mix \[0, 1\]; train what is missing"
    ):
        compare(trainings[:-1], tmp_path, folder / "benchmarks")


def test_a_model_that_was_not_trained_here_is_compared_by_its_answers(
    entries: list[Entry], folder: Path, tmp_path: Path
):
    elsewhere = [Entry(entry.name, None, None, None, entry.real) for entry in entries]
    found = compare(elsewhere, tmp_path, folder / "benchmarks")
    with_all = compare(entries, tmp_path / "all", folder / "benchmarks")
    answered = [row for row in with_all.comparisons if not row.benchmark.startswith("retrieval")]
    assert found.comparisons == with_verdicts(answered)  # Holm's family has no retrieval
    assert found.controls == [] and found.towers["clips"]["tower"]["path"] is None
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == [] and "Does the answer come from the picture?" not in page.text


# -------------------------------------------------------------------------------------- how they were asked, judged


def test_how_they_were_asked_is_on_the_page(copies: list[Entry], folder: Path, tmp_path: Path):
    checked = {"pope": {"n": 32, "changed": 3, "share": 3 / 32}, "gqa": {"n": 30, "changed": 0, "share": 0.0}}
    for entry in copies:
        for shown in (entry.real, entry.blank, entry.shuffled):
            change(shown, "config", dtype="bfloat16", attention="eager", batch_size=48)
    change(copies[0].real, "outputs", batch_check=checked, model="a/model")
    found = compare(copies, tmp_path / "out", folder / "benchmarks")
    own = read_json(tmp_path / "out/report.json")["towers"]["clips"]["evaluation"]
    assert own["batch_check"] == checked
    assert {key: own[key] for key in ("dtype", "attention", "batch_size", "model", "device")} == {
        "dtype": "bfloat16", "attention": "eager", "batch_size": 48, "model": "a/model", "device": "unknown",
    }  # fmt: skip
    assert any("clips gives another answer to 3 of 62 questions (4.8 %)" in sentence for sentence in found.findings)
    text = words_of((tmp_path / "out/report.html").read_text())
    text = text[text.index("How they were asked") : text.index("How they learned")]
    for words in (
        "Attention kernel eager eager",
        "POPE 3 of 32 (9.4 %) not measured",
        "GQA 0 of 30 (0.0 %) not measured",
    ):
        assert words in text
    assert "judge" not in text


def judged(copies: list[Entry]) -> list[Entry]:
    """The towers with a judged benchmark of six questions besides; shown the right pictures only."""
    capabilities = ["rec", "ocr", "rec,ocr", "rec", "ocr", "rec,ocr"]
    for number, entry in enumerate(copies):
        given = [round(0.1 * (i + 3 * number), 1) for i in range(6)]
        rows = [
            {"task": "mmvet", "doc_id": i, "cluster": f"v{i}", "category": name, "question": "What?", "target": "cat",
             "answer": HOSTILE, "score": score}
            for i, (name, score) in enumerate(zip(capabilities, given, strict=True))
        ]  # fmt: skip
        (entry.real / "mmvet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(entry.real / "results.json", read_json(entry.real / "results.json") | {"mmvet": {"n": 6}})
        suite = read_json(entry.real / "manifest.json")["config"]["suite"]
        suite["tasks"]["mmvet"] = to_dict(load_suite("demo").tasks["textvqa_val"]) | {"judge": True}
        change(entry.real, "config", suite=suite)
        by_name = {
            name: [s for s, of in zip(given, capabilities, strict=True) if name in of] for name in ("ocr", "rec")
        }
        judge = {
            "model": "the-judge", "answered_by": ["the-judge-7b"], "endpoint": "localhost:8000", "temperature": 0.7,
            "prompt_sha256": "cd" * 32, "prompt": f"Compare {HOSTILE}", "repeats": 3,
            "date": f"2026-11-0{1 + number}T08:00:00+00:00",
            "judge_error": 0.0123, "mean": float(np.mean(given)), "interval": [0.0, 1.0],
            "categories": {name: {"score": float(np.mean(own)), "n": len(own)} for name, own in by_name.items()},
        }  # fmt: skip
        change(entry.real, "outputs", judge={"mmvet": judge})
    return [Entry(entry.name, None, None, None, entry.real) for entry in copies]


def test_the_judge_is_named_and_capabilities_are_told_apart(copies: list[Entry], tmp_path: Path):
    found = compare(judged(copies), tmp_path / "out")
    own = read_json(tmp_path / "out/report.json")["towers"]["clip_mix"]["judges"]["mmvet"]
    assert (own["answered_by"], own["repeats"], own["judge_error"]) == (["the-judge-7b"], [3], pytest.approx(0.0123))
    assert own["capabilities"]["ocr"] == {"score": pytest.approx(np.mean([0.4, 0.5, 0.7, 0.8])), "n": 4}
    rows = {row.category: row for row in found.categories if row.benchmark == "mmvet"}
    assert {name: row.n_samples for name, row in rows.items()} == {
        "rec": 4,
        "ocr": 4,
    }  # a question counts for each it asks for
    assert rows["ocr"].accuracy[1] == pytest.approx(own["capabilities"]["ocr"]["score"])
    html = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(html)
    text = words_of(html)
    assert HOSTILE not in html and HOSTILE in page.text
    assert (
        page.open == [] and "the-judge (which answers as the-judge-7b) at temperature 0.7 with prompt cdcdcdcd." in text
    )
    for words in ("2026-11-01 2026-11-02", "1.2 1.2", "ocr 4 questions 30.0 60.0", "Verdicts on each answer 3 3"):
        assert words in text
    assert any(sentence.startswith("mmvet was judged by the-judge") for sentence in found.findings)


# ------------------------------------------------------------------------------------------------ what is alike


def change(folder: Path, section: str, **values: Any) -> None:
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {section: manifest[section] | values})


def test_what_differs_besides_the_towers_is_refused_or_waived(copies: list[Entry], folder: Path, tmp_path: Path):
    assert copies[0].tune is not None and copies[1].align is not None
    change(copies[0].tune, "config", learning_rate=1e-3, samples=20)
    change(copies[1].tune, "config", learning_rate=2e-4, samples=20)
    change(copies[1].align, "environment", device="another machine")
    refused(copies, folder, tmp_path, r"not only the towers differ \(.*tune\.learning_rate: clips 0\.001, clip_mix 0\.0002.*"
            r"environment\.align\.device.*--waive ")  # fmt: skip
    with pytest.raises(InputError, match=r"not only the towers differ \(environment\.align\.device"):
        compare(copies, tmp_path / "out", folder / "benchmarks", waived=["tune.learning_rate"])
    found = compare(copies, tmp_path / "out", folder / "benchmarks", waived=["tune.learning_rate", "environment"])
    kinds = {setting.key: (setting.kind, setting.waived) for setting in found.settings}
    assert kinds["tune.learning_rate"] == ("otherwise", True) and kinds["tune.samples"] == ("identical", False)
    assert kinds["tower.hash"] == ("nature", False) and kinds["pretraining.method"] == ("nature", False)
    assert "tune.out" not in kinds and "tune.seed" not in kinds
    assert any(sentence.startswith("Not only the towers differ: tune.learning_rate") for sentence in found.findings)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tune.learning_rate" in page and "waived" in page


def test_trainings_of_one_tower_are_alike_too(trainings: list[Entry], folder: Path, tmp_path: Path):
    changed = shutil.copytree(trainings[0].tune, tmp_path / "tune")  # type: ignore[arg-type]
    change(changed, "config", samples=20)
    with pytest.raises(InputError, match=r"tune\.samples: clips \[20, None, None\], clip_mix None"):
        compare(
            [dataclasses.replace(trainings[0], tune=changed), *trainings[1:]], tmp_path / "out", folder / "benchmarks"
        )


# ------------------------------------------------------------------------------------------------ to take away


def test_a_bundle_recomputes_every_figure(trainings: list[Entry], tmp_path: Path):
    """Unpacked elsewhere, without weights and benchmark files, the command in its README finds the same."""
    compare(trainings, tmp_path / "out")
    write_bundle(tmp_path / "mine.tar.gz", trainings, tmp_path / "out")
    write_bundle(tmp_path / "again" / "mine.tar.gz", trainings, tmp_path / "out")
    assert (tmp_path / "mine.tar.gz").read_bytes() == (tmp_path / "again" / "mine.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "mine.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert not list((tmp_path / "mine").rglob("*.safetensors"))
    subprocess.run(["sha256sum", "--quiet", "-c", "sha256.txt"], cwd=tmp_path / "mine", check=True)
    command = next(
        line for line in (tmp_path / "mine/README.txt").read_text().splitlines() if "clips-llava compare" in line
    )
    with contextlib.chdir(tmp_path / "mine"):
        assert main(command.split()[1:]) == 0
    own, again = (read_json(folder / "report.json") for folder in (tmp_path / "out", tmp_path / "mine" / "recomputed"))
    for part in ("comparisons", "controls", "findings", "settings"):
        assert own[part] == again[part]
    assert own["towers"]["clips"]["benchmarks"] == again["towers"]["clips"]["benchmarks"]
    assert (tmp_path / "out/report.csv").read_text() == (tmp_path / "mine/recomputed/report.csv").read_text()


def test_tables_to_take_away(report: dict[str, Any], folder: Path):
    rows = list(csv.DictReader((folder / "out/report.csv").read_text().splitlines()))
    assert len(rows) == 2 * (6 + 1) + len(report["comparisons"]) + len(report["controls"])  # 1: MME's points
    keys = ("benchmark", "metric", "a", "b")
    own = next(row for row in rows if tuple(row[key] for key in keys) == ("mme", "accuracy", "clips", ""))
    assert float(own["value"]) == report["towers"]["clips"]["benchmarks"]["mme"]["accuracy"]
    compared = next(row for row in rows if (row["benchmark"], row["b"]) == ("mme", "clip_mix"))
    assert float(compared["p_value"]) == next(
        row["p_value"] for row in report["comparisons"] if row["benchmark"] == "mme"
    )
    latex = (folder / "out/report.tex").read_text()
    assert r"textvqa\_val" in latex and latex.count(r" \\") == 3 and r"clip\_mix" in latex
    assert "$^*$" in latex  # clip_mix is told apart from clips
    points = report["towers"]["clips"]["benchmarks"]["mme"]["points"]["MME perception"]["value"]
    assert "& MME perception &" in latex and f"& {points:.1f} {{" in latex
    rows = list(csv.DictReader((folder / "out/categories.csv").read_text().splitlines()))
    assert [(row["category"], float(row["wins"]), float(row["adjusted_p"])) for row in rows] == [
        (row["category"], row["wins"], row["adjusted_p"]) for row in report["categories"]
    ]


def test_towers_pretrained_anew_for_each_seed(trainings: list[Entry], folder: Path, tmp_path: Path):
    """Retrieval is then over pretrainings too, and the sentences speak of ways of pretraining."""
    own = []
    for entry in trainings:
        assert entry.tower is not None
        tower = tmp_path / f"{entry.name}{entry.seed}"
        shutil.copytree(entry.tower, tower)
        zero_shot = read_json(tower / "zero_shot.json")
        zero_shot["ranks"]["image_to_text"][: 4 * entry.seed] = [0] * 4 * entry.seed
        zero_shot["image_to_text"]["R@1"] = float(np.mean(np.array(zero_shot["ranks"]["image_to_text"]) == 0))
        write_json(tower / "zero_shot.json", zero_shot)
        own.append(dataclasses.replace(entry, tower=tower))
    found = compare(own, tmp_path / "out", folder / "benchmarks")
    once = compare(trainings, tmp_path / "once", folder / "benchmarks")
    assert (found.towers["clips"]["tower"]["pretrainings"], once.towers["clips"]["tower"]["pretrainings"]) == (3, 1)
    hits = {
        name: np.array([
            np.array(read_json(entry.tower / "zero_shot.json")["ranks"]["image_to_text"]) == 0
            for entry in own if entry.name == name and entry.tower
        ])
        for name in ("clips", "clip_mix")
    }  # fmt: skip
    mean = mean_score(hits["clips"], range(hits["clips"].shape[1]))
    assert found.towers["clips"]["zero_shot"]["image_to_text"]["R@1"] == pytest.approx(mean.value)
    assert found.towers["clips"]["zero_shot"]["intervals"]["image_to_text"]["R@1"] == pytest.approx(mean.interval)
    row = next(
        row for row in found.comparisons if row.benchmark.startswith("retrieval, picture") and row.metric == "R@1"
    )
    expected = paired_difference(hits["clips"], hits["clip_mix"], range(hits["clips"].shape[1]))
    assert (row.inference, row.n_seeds, row.difference) == ("recipe", 3, pytest.approx(expected.difference))
    assert "ways of pretraining" in found.findings[0] and "towers" in once.findings[0]
    assert any("other pretrainings are among them" in sentence for sentence in found.findings)
    assert any("pretrained once" in sentence for sentence in once.findings)
    write_bundle(tmp_path / "bundle.tar.gz", own, tmp_path / "out")
    with tarfile.open(tmp_path / "bundle.tar.gz") as archive:
        towers = {name for name in archive.getnames() if name.endswith("tower/zero_shot.json")}
    assert towers == {f"bundle/towers/{entry.name}/seed{entry.seed}/tower/zero_shot.json" for entry in own}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "pretrained 3 times" in page and "pretrained once" not in page
