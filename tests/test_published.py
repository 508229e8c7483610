"""Published numbers: as the papers print them, beside rows that are about the same, and beside no others."""

import ast
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llava_bridge
from clips_core.config import load_config, recipe_path, to_dict
from clips_core.folders import write_json
from eval_suites.benchmarks import load_suite
from eval_suites.published import NOT_RECIPE, Beside, beside, identity, load_published, published_table
from eval_suites.records import Entry, Run
from eval_suites.terminal import table as terminal_table
from llava_bridge.config import AlignConfig, TuneConfig

# The papers' tables, copied by hand once more.
CLIPS = """
tower       | MME-C | MME-P  | MMMU | MM-Vet | GQA  | ChartQA | POPE | NoCaps | TextVQA
OpenAI-CLIP | 295.4 | 1433.5 | 37.8 | 34.7   | 57.5 | 13.2    | 83.8 | 92.1   | 56.8
CLIPS       | 326.4 | 1416.6 | 38.2 | 35.8   | 60.3 | 14.2    | 86.7 | 102.5  | 57.6
"""
OPENVISION = """
tower        | px  | TextVQA | ChartQA | OCR | MME-P | MME-C | SEED | SQA  | GQA  | POPE
OpenAI-CLIP  | 224 | 56.1    | 13.2    | 177 | 1443  | 306   | 66.0 | 73.4 | 60.8 | 85.0
OpenVision   | 224 | 57.7    | 13.9    | 315 | 1487  | 317   | 69.5 | 73.6 | 62.9 | 86.4
OpenVision 2 | 224 | 59.0    | 13.7    | 327 | 1460  | 312   | 69.3 | 76.5 | 62.6 | 87.1
OpenAI-CLIP  | 336 | 59.1    | 13.8    | 201 | 1475  | 288   | 67.5 | 73.1 | 61.1 | 85.7
OpenVision   | 336 | 61.2    | 15.7    | 339 | 1525  | 315   | 70.5 | 75.1 | 63.7 | 87.2
SigLIP       | 384 | 62.6    | 14.5    | 338 | 1481  | 347   | 69.4 | 76.7 | 63.3 | 87.0
OpenVision 2 | 448 | 65.6    | 18.1    | 416 | 1499  | 331   | 70.6 | 75.6 | 63.1 | 88.7
"""
TOWER = "hf:openai/clip-vit-large-patch14-336"
LLMS = {"llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct", "vicuna7b": "lmsys/vicuna-7b-v1.5"}


def test_numbers_are_the_papers() -> None:
    for source, text in (("CLIPS", CLIPS), ("OpenVision", OPENVISION)):
        head, *rows = [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]
        wanted = set()
        for row in rows:
            cells = dict(zip(head, row, strict=True))
            tower, px = cells.pop("tower"), cells.pop("px", None)
            wanted |= {(tower, px and int(px), column, float(value)) for column, value in cells.items()}
        sizes = re.compile(" (L/14|H/14|So400m)$")
        found = {
            (sizes.sub("", number.tower), number.resolution, number.column, number.value)
            for number in load_published()
            if number.source.startswith(source)
        }
        assert found == wanted


# --------------------------------------------------------------------------------------------------- what a row is about


def stage(kind: type, name: str, **changes: Any) -> dict[str, Any]:
    """A stage's manifest, trained by a shipped recipe on one node."""
    places = ["out=runs/x", "data.json=data.json", "data.images=images", f"tower={TOWER}"]
    places += ["align=runs/x/align"] if kind is TuneConfig else []
    config = to_dict(load_config(kind, recipe_path(Path(llava_bridge.__file__).parent, name), places))
    for key in ("out", "workers", "save_every", "device_batch_size", "parallel", "gradient_checkpointing"):
        config.pop(key)  # as `llava_bridge.train.settings` leaves them out
    return {
        "config": {**config, **changes},
        "inputs": {},
        "outputs": {"samples": 558128 if kind is AlignConfig else 665298},
    }


def make_run(folder: Path, llm: str = "llama3_8b", suite: str = "openvision", seed: int = 0) -> Run:
    """A training by the published recipe, whose model answered all published questions."""
    model = {
        "vision_config": {"num_hidden_layers": 24, "hidden_size": 1024, "patch_size": 14, "image_size": 336},
        "text_config": {"num_hidden_layers": 32, "hidden_size": 4096},
    }
    write_json(folder / "tune" / "model" / "config.json", model)
    asked = load_suite(suite)
    metrics = {name: {metric: 0.6 for metric in task.metrics} for name, task in asked.tasks.items()}
    for name, own in metrics.items():
        own["n"] = asked.tasks[name].tables[0].rows or 0
    return Run(
        Entry("openai", None, folder / "align", folder / "tune", folder / "eval/real", seed=seed),
        {
            "align": stage(AlignConfig, f"llava15_{llm}_align"),
            "tune": stage(TuneConfig, f"llava15_{llm}_tune"),
            "real": {"config": {"suite": to_dict(asked), "limit": None}, "inputs": {}, "outputs": {}},
        },
        None, {"real": {}}, {"real": metrics}, {},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def test_a_row_that_matches(run: Run) -> None:
    run.metrics["real"]["pope"] |= {"pope_accuracy": 0.857, "pope_f1_score": 0.1}
    run.metrics["real"]["mme"]["mme_perception_score"] = 1480.25
    run.metrics["real"]["ocrbench"]["ocrbench_accuracy"] = 0.2
    settings, reason = identity(run)
    assert reason is None
    assert settings == {"tower": "OpenAI-CLIP L/14", "resolution": 336, "llm": "LLaMA-3-8B", "recipe": "LLaVA-1.5"}
    found = {row.column: row for row in beside({"ours": [run]}).shown}
    assert set(found) == {"TextVQA", "ChartQA", "OCR", "MME-P", "MME-C", "SEED", "SQA", "GQA", "POPE"}
    for column, value in {"POPE": 85.7, "MME-P": 1480.25, "OCR": 200, "GQA": 60.0}.items():
        assert found[column].value == pytest.approx(value), "the column's own metric and units"
    assert {(n.value, n.resolution) for n in found["GQA"].published} == {(57.5, None), (61.1, 336)}
    assert {n.value for n in found["GQA"].disagreeing} == {57.5, 60.8, 61.1}
    assert [n.value for n in found["SEED"].published] == [67.5] and found["SEED"].disagreeing == []
    unsaid = {n.source.split()[0]: n.unsaid for n in found["POPE"].published}
    assert "resolution" in unsaid["CLIPS"] and "resolution" not in unsaid["OpenVision"]
    assert {"metric", "prompt", "harness", "whether LLaMA-3 is the Instruct model"} <= set(unsaid["OpenVision"])


def test_the_figure_is_the_mean_of_the_trainings(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in range(2)]
    runs[1].metrics["real"]["gqa"]["exact_match"] = 0.62
    assert next(row.value for row in beside({"ours": runs}).shown if row.column == "GQA") == pytest.approx(61.0)


def test_vicuna_stands_beside_llava_15(tmp_path: Path) -> None:
    found = {row.column: row for row in beside({"ours": [make_run(tmp_path, "vicuna7b")]}).shown}
    assert {column: [n.value for n in row.published] for column, row in found.items()} == {
        "GQA": [62.0], "SQA": [66.8], "TextVQA": [58.2], "MME-P": [1510.7],
    }  # fmt: skip


def change(part: str, *keys: str, value: Any) -> Callable[[Run], None]:
    def apply(run: Run) -> None:
        place: Any = run.manifests[part]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return apply


def shape(part: str, key: str, value: int) -> Callable[[Run], None]:
    def apply(run: Run) -> None:
        assert run.entry.tune is not None
        path = run.entry.tune / "model" / "config.json"
        model: dict[str, Any] = deepcopy(MODEL)
        model[part][key] = value
        write_json(path, model)

    return apply


MODEL = {
    "vision_config": {"num_hidden_layers": 24, "hidden_size": 1024, "patch_size": 14, "image_size": 336},
    "text_config": {"num_hidden_layers": 32, "hidden_size": 4096},
}


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (change("align", "config", "tower", value="clips:runs/x"), "its tower (clips:runs/x) is in no publication"),
        (shape("vision_config", "num_hidden_layers", 2), "its num_hidden_layers is 2, not 24"),
        (shape("vision_config", "image_size", 448), "no publication here has OpenAI-CLIP L/14 at 448 px"),
        (change("align", "config", "llm", value="smollm2"), "its language model (smollm2) is in no publication"),
        (shape("text_config", "hidden_size", 64), "its hidden_size is 64, not 4096"),
        (change("align", "config", "image_mode", value="pad"), 'align.image_mode: "square" → "pad"'),
        (change("tune", "config", "learning_rate", value=2e-4), "tune.learning_rate"),
        (change("tune", "config", "method", value="lora"), "tune.method"),
        (change("tune", "config", "tower_learning_rate", value=2e-6), "tune.tower_learning_rate"),
        (change("align", "config", "data", "caption_end", value=None), "align.data.caption_end"),
        (change("tune", "outputs", "samples", value=5000), "tune saw 5000 samples, not 665298"),
    ],
)  # fmt: skip
def test_a_row_about_something_else(run: Run, apply: Callable[[Run], None], reason: str) -> None:
    apply(run)
    found = beside({"ours": [run], "too": [run]})
    if "448" in reason:  # one paper does not say its resolution: its numbers stay, and say so
        assert {n.source.split()[0] for row in found.shown for n in row.published} == {"CLIPS"}
        assert all("resolution" in n.unsaid for row in found.shown for n in row.published)
        return
    assert found.shown == []
    assert len(found.said) == 1 and reason in found.said[0] and "beside ours and too" in found.said[0]


def test_what_does_not_make_it_another_recipe(run: Run) -> None:
    for part in ("align", "tune"):
        run.manifests[part]["config"] |= {"seed": 7, "tower": TOWER, "workers": 9, "parallel": "zero2"}
        run.manifests[part]["config"]["data"] |= {"json": "elsewhere.json", "images": "there"}
    run.manifests["align"]["config"]["llm"] += "@main"
    assert identity(run)[1] is None


def test_settings_without_effect_are_those_of_training() -> None:
    """Read from the syntax tree: importing it takes torch and transformers."""
    tree = ast.parse((Path(str(llava_bridge.__file__)).parent / "train.py").read_text())
    found = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "WITHOUT_EFFECT"
    ]
    assert len(found) == 1 and set(found[0]) <= set(NOT_RECIPE)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("n", 300, "300 questions were asked, not the published 12,578"),
        ("generation", {"max_new_tokens": 4, "min_new_tokens": 1}, "asked with another generation"),
        ("prompt", {"post_prompt": "\nAnswer."}, "asked with another prompt"),
    ],
)
def test_other_questions(run: Run, key: str, value: Any, reason: str) -> None:
    if key == "n":
        run.metrics["real"]["gqa"]["n"] = value
    else:
        run.manifests["real"]["config"]["suite"]["tasks"]["gqa"][key] = value
    found = beside({"ours": [run]})
    assert "GQA" not in {row.column for row in found.shown} and "POPE" in {row.column for row in found.shown}
    assert f"No published number stands beside ours on GQA: {reason}." in found.said


def test_what_is_said(run: Run, tmp_path: Path) -> None:
    said = beside({"ours": [run]}).said
    assert (
        sum("GQA 57.5 (CLIPS, resolution unsaid), 60.8 (OpenVision and OpenVision 2, 224 px)" in each for each in said)
        == 1
    )
    assert any(each.startswith("The table of CLIPS leaves unsaid: resolution, ") for each in said)
    assert not any("MMMU" in each for each in said), "a column that nobody asked for is no row of ours"
    paper = make_run(tmp_path / "paper", suite="clips_paper")
    del paper.metrics["real"]["mmvet"]
    assert "No published number stands beside ours on MM-Vet: it has not been scored." in beside({"ours": [paper]}).said


def test_a_demo_shows_none(tmp_path: Path) -> None:
    """A suite that asks lmms-eval's tasks of a few hundred questions, in a LLaVA by the published recipe."""
    run = make_run(tmp_path, suite="demo")
    run.metrics["real"] |= {name: {**own, "n": 300} for name, own in run.metrics["real"].items()}
    assert beside({"ours": [run]}).shown == []


def test_a_model_that_was_not_trained_here(run: Run) -> None:
    other = replace(run, manifests={"real": run.manifests["real"]})
    assert "not trained here" in beside({"ours": [other]}).said[0]


def test_the_terminal_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert published_table(Beside()) is None
    made = published_table(beside({"ours": [run]}))
    assert made is not None and isinstance(made, type(terminal_table("", [], []))) and made.row_count == 9
