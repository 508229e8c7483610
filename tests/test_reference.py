"""The anchor: the shipped study, its ranges, the released model as it is asked, the table; once, in the slow tests, all of it."""

import json
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps
from transformers import AutoProcessor, LlavaForConditionalGeneration

import eval_suites
import llava_bridge
from clips_core.config import load_config, load_settings, recipe_path, to_dict
from clips_core.errors import InputError, Stopped
from clips_core.folders import read_json, write_json, write_manifest
from eval_suites import anchor, reference
from eval_suites.anchor import read_anchor, sentences
from eval_suites.benchmarks import EvalConfig, load_suite
from eval_suites.published import load_published
from eval_suites.reference import (
    PublishedValue,
    ReferenceConfig,
    Released,
    Seen,
    accepted,
    ask_as_published,
    commands,
    study_reference,
)
from eval_suites.report import compare
from eval_suites.steps import Command
from llava_bridge.config import AlignConfig, TuneConfig
from tests.benchmark_files import make_files
from tests.llava_samples import save_conversations, save_llm, save_tower
from tests.test_benchmarks import make_model
from tests.test_report import make_benchmarks, make_entry

PACKAGE = Path(str(eval_suites.__file__)).parent
BRIDGE = Path(llava_bridge.__file__).parent
SYSTEM = "A chat between a curious user and an artificial intelligence assistant."


def shipped(*settings: str) -> ReferenceConfig:
    return load_settings(ReferenceConfig, PACKAGE, ["reference_llava15", *settings])


# ---------------------------------------------------------------------------------------------------- the shipped study


def test_the_shipped_study_prints_its_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "anchor"
    study_reference(shipped(f"out={out}", "dry_run=true"))
    note, *lines = capsys.readouterr().out.splitlines()
    assert note.startswith("#") and "llava-hf/llava-1.5-7b-hf" in note and "padded" in note and "vicuna_v1" in note
    assert not out.exists() and len(lines) == 4
    words = [shlex.split(line) for line in lines]
    assert all(each[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"] for each in words)
    released, retrained = (load_settings(EvalConfig, PACKAGE, words[i][words[i].index("run") + 1 :]) for i in (0, 3))
    align = load_settings(AlignConfig, BRIDGE, words[1][words[1].index("align") + 1 :])
    tune = load_settings(TuneConfig, BRIDGE, words[2][words[2].index("tune") + 1 :])
    assert (align.tower, align.llm, align.learning_rate) == (
        "hf:openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5", 1e-3,
    )  # fmt: skip
    assert (tune.align, tune.method, tune.learning_rate, tune.image_mode) == (align.out, "full", 2e-5, "pad")
    assert Path(released.model) == out / "released/model" and Path(retrained.model) == tune.out
    same = ("data", "suite", "pictures", "limit", "batch_size", "precision", "exact", "seed")
    assert all(getattr(released, key) == getattr(retrained, key) for key in same), "both are asked alike"
    assert released.suite == "llava15" and released.limit is None


def test_its_recipes_are_the_shipped_ones() -> None:
    """Nothing is laid over them but places."""
    study = shipped()
    for stage, settings in (("align", study.align), ("tune", study.tune)):
        assert settings.keys() == {"recipe", "data"} and settings["recipe"] == f"llava15_vicuna7b_{stage}"
        assert settings["data"].keys() == {"json", "images"}


def test_the_literal_path_is_the_same_file() -> None:
    path = PACKAGE.parent / "studies" / "reference_llava15.yaml"
    assert path.resolve() == recipe_path(PACKAGE, "reference_llava15").resolve()


def test_published_values() -> None:
    """As LLaVA's own table has them, and the same as those that stand beside other rows."""
    study, suite = shipped(), load_suite("llava15")
    values = {name: value.published for name, value in study.columns.items()}
    own = {"GQA": 62.0, "SQA": 66.8, "TextVQA": 58.2, "POPE F1": 85.9, "MME-P": 1510.7}
    assert own.items() <= values.items() and set(values) == set(suite.columns)
    assert all("MODEL_ZOO" in study.columns[name].source for name in own)
    beside = {n.column: n.value for n in load_published() if n.source.startswith("LLaVA-1.5")}
    assert beside == {name: value for name, value in own.items() if name != "POPE F1"}
    columns = load_suite("openvision").columns
    for name in beside:
        assert columns[name].task == suite.columns[name].task and columns[name].metric == suite.columns[name].metric


def test_errors_are_those_of_so_many_questions() -> None:
    """A share p of n questions: sqrt(p (1 - p) / n)."""
    study, suite = shipped(), load_suite("llava15")
    for name in ("GQA", "SQA", "TextVQA", "TextVQA without OCR", "MMMU"):
        value, n = study.columns[name], suite.tasks[suite.columns[name].task].tables[0].rows
        assert n is not None
        assert value.error == pytest.approx((value.published * (100 - value.published) / n) ** 0.5, abs=0.01)


def test_ranges() -> None:
    value = PublishedValue(60.0, "a", 0.5, released=[Seen(59.0, "b")], retrained=[Seen(61.0, "c"), Seen(58.5, "d")])
    assert accepted(value) == {"released": (58.5, 60.5), "retrained": (57.5, 62.0)}
    assert accepted(PublishedValue(60.0, "a", 0.5)) == {"released": (59.5, 60.5), "retrained": (59.0, 61.0)}
    for value in shipped().columns.values():
        ranges = accepted(value)
        assert (
            ranges["retrained"][0]
            < ranges["released"][0]
            < value.published
            < ranges["released"][1]
            < ranges["retrained"][1]
        )


def test_the_guide_shows_these_ranges() -> None:
    lines = (PACKAGE.parent / "docs" / "comparing_towers.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines if line.count("|") == 5]
    for value in shipped().columns.values():
        ranges = [anchor.span(accepted(value)[model]) for model in ("released", "retrained")]
        assert [f"{value.published:.1f}", *ranges] in rows


# ----------------------------------------------------------------------------------------------- the released model


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("released") / "model")


def test_asked_as_published(released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "as_published"
    ask_as_published(Released(released, "pad", "vicuna_v1"), folder)
    before, after = (AutoProcessor.from_pretrained(path) for path in (released, folder))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    mean = tuple(int(255 * value) for value in before.image_processor.image_mean)
    padded = ImageOps.pad(wide, (60, 60), color=mean)  # by PIL: a border above and below
    wanted = before.image_processor(padded, return_tensors="np")["pixel_values"]
    found = after.image_processor(wide, return_tensors="np")["pixel_values"]
    assert np.abs(wanted - found).max() < 2 / 255 / min(before.image_processor.image_std)
    assert np.abs(wanted - before.image_processor(wide, return_tensors="np")["pixel_values"]).max() > 0.5
    content = [{"type": "image"}, {"type": "text", "text": "Is there a star?"}]
    prompt = after.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith(SYSTEM) and prompt.endswith("USER: <image>\nIs there a star? ASSISTANT:")
    one, other = (LlavaForConditionalGeneration.from_pretrained(path).state_dict() for path in (released, folder))
    assert one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)
    ask_as_published(Released(released, "pad", "vicuna_v1"), folder)  # again, after a kill


def test_a_released_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json there"):
        ask_as_published(Released(tmp_path / "nowhere", "pad"), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- the table


def small(folder: Path, rows: int = 12) -> dict[str, Any]:
    """A study of GQA and POPE, of which `rows` questions are the whole."""
    suite: dict[str, Any] = {"name": "small", "tasks": {}, "columns": {}}
    for name, task in load_suite("llava15").tasks.items():
        if name in ("gqa", "pope"):
            own = to_dict(load_suite("llava15"))["tasks"][name]
            own["tables"][0]["rows"] = rows
            if name == "gqa":
                own["tables"][1]["rows"] = None
            own["generation"] = {**task.generation, "max_new_tokens": 2}
            suite["tasks"][name] = own
    suite["columns"] = {
        "GQA": {"task": "gqa", "metric": "exact_match", "scale": 100},
        "POPE": {"task": "pope", "metric": "pope_accuracy", "scale": 100},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    data = {"json": str(folder / "data/align.json"), "images": str(folder / "data/images")}
    short = {"batch_size": 4, "samples": 8, "precision": "float32", "data": data}
    return {
        "out": str(folder / "out"),
        "released": {"model": str(folder / "released")},
        "tower": f"hf:{folder / 'tower'}",
        "align": {"llm": str(folder / "llm"), **short},
        "tune": {**short, "method": "lora", "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
                 "data": {**data, "json": str(folder / "data/tune.json")}},
        "evaluate": {"data": str(folder / "benchmarks"), "suite": str(folder / "suite.yaml"), "precision": "float32"},
        "columns": {
            "GQA": {"published": 50, "source": "a paper", "error": 5, "released": [{"value": 56, "source": "another"}]},
            "POPE": {"published": 80, "source": "a paper", "error": 1, "why": "Said so."},
        },
    }  # fmt: skip


def load_small(folder: Path, study: dict[str, Any]) -> ReferenceConfig:
    path = folder / "reference.yaml"
    path.write_text(yaml.safe_dump(study))
    return load_config(ReferenceConfig, path)


def finish(config: ReferenceConfig, which: int, gqa: float, pope: float, n: int = 12) -> None:
    """A step's manifest, as the step would leave it."""
    finished = commands(config)[which].finished
    stage = {0: "eval", 1: "align", 2: "tune", 3: "eval"}[which]
    asked = {
        "suite": to_dict(load_suite(str(config.evaluate["suite"]))),
        "lmms_eval": "0.7.3",
        "dtype": "float32",
        "attention": "sdpa",
    }
    figures = {"gqa": {"exact_match": gqa, "n": n}, "pope": {"pope_accuracy": pope, "n": n}}
    finished.parent.mkdir(parents=True)
    write_manifest(finished.parent, stage, asked if stage == "eval" else {}, {}, {"results": figures})


def finished_study(folder: Path, retrained_n: int = 12) -> ReferenceConfig:
    config = load_small(folder, small(folder))
    finish(config, 0, 0.60, 0.70)
    finish(config, 1, 0, 0)
    finish(config, 2, 0, 0)
    finish(config, 3, 0.41, 0.775, retrained_n)
    return config


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished_study(tmp_path)
    assert study_reference(config) == config.out, "every step is finished: nothing is run"
    found = {row["column"]: row for row in read_json(config.out / "reference.json")["rows"]}
    gqa, pope = found["GQA"], found["POPE"]
    assert (gqa["published"], gqa["accepted"]) == (50, {"released": [45, 61], "retrained": [40, 66]})
    assert (gqa["released"]["value"], gqa["released"]["inside"]) == (60.0, True)
    assert (gqa["retrained"]["value"], gqa["retrained"]["inside"]) == (pytest.approx(41.0), True)
    assert (pope["released"]["inside"], pope["retrained"]["inside"]) == (
        False,
        False,
    )  # 70 not in 79-81, 77.5 not in 78-82
    text = (config.out / "reference.md").read_text()
    assert "| GQA | 50 | 45.0–61.0 | 60.0, inside | 40.0–66.0 | 41.0, inside |" in text
    assert "| POPE | 80 | 79.0–81.0 | 70.0, outside | 78.0–82.0 | 77.5, outside |" in text
    assert "the released model elsewhere: 56 (another)" in text and "Said so." in text
    told = " ".join(capsys.readouterr().out.split())  # however wide the terminal is
    assert "1 of 2 figures in the accepted ranges; outside: POPE (70.0)" in told
    with pytest.raises(InputError, match=r"other settings \(tower"):
        study_reference(replace(config, tower="hf:another"))


def test_other_questions_have_no_verdict(tmp_path: Path) -> None:
    config = finished_study(tmp_path, retrained_n=4)
    study_reference(config)
    found = read_anchor(config.out)
    assert [row.retrained and row.retrained.inside for row in found.rows] == [None, None]
    assert [row.released and row.released.inside for row in found.rows] == [True, False]
    assert "4 questions of 12" in (config.out / "reference.md").read_text()
    assert any("not on the published questions: GQA, POPE" in sentence for sentence in sentences(found))


def test_what_is_not_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released model alone, then a step that is stopped: the table is there, and says so."""
    config = load_small(tmp_path, small(tmp_path))
    finish(config, 0, 0.60, 0.70)
    begun: list[Command] = []

    def stop(step: Command) -> None:
        begun.append(step)
        raise Stopped("by the scheduler")

    monkeypatch.setattr(reference, "run_step", stop)
    with pytest.raises(Stopped):
        study_reference(config)
    assert begun == [commands(config)[1]]
    found = read_anchor(config.out)
    assert all(row.retrained is None and row.released is not None for row in found.rows)
    assert any("has not been measured yet" in sentence for sentence in sentences(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"DocVQA": {"published": 1, "source": "a", "error": 1}}}, r"columns\.DocVQA: the suite small has no"),
        ({"align": {"learning_rat": 1}}, r"align: .*did you mean 'learning_rate'"),
        ({"evaluate": {"model": "x"}}, r"evaluate\.model: the study sets it"),
        ({"evaluate": {"pictures": ["blank"]}}, r"evaluate\.pictures: .* add real"),
    ],
)  # fmt: skip
def test_one_clear_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    study = small(tmp_path)
    for key, value in change.items():
        study[key] = {**study[key], **value}
    with pytest.raises(InputError, match=message):
        study_reference(load_small(tmp_path, study))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- in a comparison


class Text(HTMLParser):
    """The words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.found += data.split()

    def __str__(self) -> str:
        return " ".join(self.found)


def test_a_comparison_shows_whether_it_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = make_benchmarks(tmp_path / "benchmarks")
    entries = [make_entry(tmp_path / "runs", name, questions, 0.7, seed) for seed, name in enumerate(("a", "b"))]
    compare(entries, tmp_path / "without")
    told = " ".join(capsys.readouterr().out.split())
    page = str(Text((tmp_path / "without/report.html").read_text()))
    for text in (told, page):
        assert "No anchor was run: nothing ties these figures to a published one" in text
        assert "No published number stands beside a and b: its tower" in text
    report = read_json(tmp_path / "without/report.json")
    assert report["anchor"] is None and report["published"]["shown"] == []

    study_reference(finished_study(tmp_path / "study"))
    compare(entries, tmp_path / "with", reference=tmp_path / "study/out")
    told = " ".join(capsys.readouterr().out.split())
    page = str(Text((tmp_path / "with/report.html").read_text()))
    assert "60.0 inside" in page and "70.0 outside" in page and "45.0–61.0" in page and "Said so." in page
    for text in (told, page):
        assert "No anchor" not in text and "outside: POPE (70.0)" in text and "Not anchored: mme, textvqa_val." in text
        assert (
            "The anchor was evaluated otherwise: lmms_eval 0.7.3, here unknown; attention sdpa, here unknown." in text
        )
    rows = read_json(tmp_path / "with/report.json")["anchor"]["rows"]
    assert [row["released"]["inside"] for row in rows] == [True, False]


def test_a_folder_without_an_anchor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"has no {anchor.RECORD}"):
        read_anchor(tmp_path)
    write_json(tmp_path / anchor.RECORD, {"model": "x"})
    with pytest.raises(InputError, match="run the study again"):
        read_anchor(tmp_path)


# ------------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_whole_study(tmp_path: Path, released: Path) -> None:
    """A tiny released model, and a tiny one trained from a tower and a language model, by the commands that a reader would type."""
    (tmp_path / "released").symlink_to(released)
    save_tower(tmp_path / "tower", "clip")
    save_llm(tmp_path / "llm")
    save_conversations(tmp_path / "data")
    make_files(tmp_path / "benchmarks", ["gqa", "pope"], n=12)
    study = small(tmp_path)
    study["released"] |= {"image_mode": "pad", "template": "chatml"}
    config = load_small(tmp_path, study)
    study_reference(config)
    found = read_json(config.out / "reference.json")
    for folder, model in (("released", "released"), ("retrained/seed0", "retrained")):
        results = read_json(config.out / folder / "eval/real/results.json")
        own = [
            json.loads(line)["score"]
            for line in (config.out / folder / "eval/real/pope.jsonl").read_text().splitlines()
        ]
        by_column = {row["column"]: row[model] for row in found["rows"]}
        assert (
            by_column["POPE"]["value"] == pytest.approx(100 * np.mean(own)) and by_column["POPE"]["n"] == len(own) == 12
        )
        assert by_column["GQA"]["value"] == pytest.approx(100 * results["gqa"]["exact_match"])
        assert by_column["POPE"]["inside"] is not None
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("manifest.json")}
    study_reference(config)  # all is there
    assert before == {path: path.stat().st_mtime_ns for path in config.out.rglob("manifest.json")} and len(before) == 4
