"""The caption study: its grid, its resumption, its figures against the run folders', its statistics against scipy's."""

import dataclasses
import html
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from clips_core.config import load_settings, to_dict
from clips_core.data import PretrainDataset, batches
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, claimed, read_json, read_manifest, write_json
from clips_core.shards import write_shards
from clips_core.tokenizer import ClipsTokenizer
from clips_core.train import pretrain
from eval_suites import study, study_page
from eval_suites.charts import IntervalLine, interval_chart
from eval_suites.cli import main
from eval_suites.results import read_scores, scores_by_picture
from eval_suites.statistics import recall_interval
from eval_suites.study import CaptionStudyConfig, Point, points, pretrain_config, study_captions
from eval_suites.study_curves import analyse, headline, over_trainings, trend
from tests.test_pretrain import COLOURS, make_shards

PACKAGE = Path(study.__file__).parent
WAYS = ("image_to_text", "text_to_image")
NAME = "<b onclick=x>&study"  # of the study's folder: it must not become part of the page's markup
GRID = [Point("synthetic", strategy, length, 0) for strategy in ("truncation", "sub_caption") for length in (4, 8)] + [
    Point("web", "truncation", length, 0) for length in (1, 4)
]


def make_held_out(folder: Path) -> Path:
    """Every pair of colours once, with two captions of its own."""
    samples = []
    for top in COLOURS:
        for bottom in COLOURS:
            pixels = np.zeros((16, 16, 3), dtype=np.uint8)
            pixels[:8], pixels[8:] = COLOURS[top], COLOURS[bottom]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            caption = f"It is {top} over {bottom}\nThe upper half is {top} the lower half is {bottom}"
            samples.append({"__key__": f"{top}-{bottom}", "png": buffer.getvalue(), "txt": caption, "json": {}})
    write_shards(samples, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name tiny shards and held-out pictures."""
    folder = tmp_path_factory.mktemp("data")
    shards, held_out = make_shards(folder / "train"), make_held_out(folder / "held_out")
    return [
        f"pretrain.data.train={shards}",
        f"pretrain.data.vocab={shards / 'vocab.txt'}",
        f"pretrain.evaluation.shards={held_out}",
    ]


def config(data: Sequence[str], out: Path, *settings: str, recipe: str = "study_world_debug") -> CaptionStudyConfig:
    return load_settings(CaptionStudyConfig, PACKAGE, [recipe, f"out={out}", *data, *settings])


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


def test_grid_is_what_the_config_says(data: list[str], tmp_path: Path) -> None:
    assert points(config(data, tmp_path)) == GRID
    seeds = points(config(data, tmp_path, "seeds=[3, 1]"))
    assert [point.seed for point in seeds] == [3] * 6 + [1] * 6  # a whole figure with the first seed, then the next
    assert points(config(data, tmp_path, "sources=[web]", "web_lengths=null", "web_strategies=[block_mask]")) == [
        Point("web", "block_mask", 4, 0),
        Point("web", "block_mask", 8, 0),
    ]
    full = points(config(data, tmp_path, recipe="study_world"))
    assert len(full) == len(set(full)) == 3 * (4 * 5 + 4)


def test_shipped_recipes_fit_their_own_texts(data: list[str], tmp_path: Path) -> None:
    for recipe in ("study_world", "study_world_anywhere", "study_world_debug", "study_stamps"):
        loaded = config(data, tmp_path, recipe=recipe)
        runs = {point: pretrain_config(loaded, point) for point in points(loaded)}
        study._check_lengths(list(runs), runs)
        longest = max(point.length for point in runs)  # no FLOP is spent on mere padding
        if recipe != "study_stamps":  # whose held-out captions are longer than any text that its towers learn from
            assert {run.model.context_length for run in runs.values()} == {longest + 3}


def test_points_see_the_same_pictures_and_other_texts(data: list[str], tmp_path: Path) -> None:
    loaded = config(data, tmp_path, "pretrain.data.crop_area=0.4", "pretrain.data.colour_jitter=0.4")
    runs = {point: pretrain_config(loaded, point) for point in GRID}
    alike = [{k: v for k, v in to_dict(run).items() if k not in ("out", "texts")} for run in runs.values()]
    assert all(settings == alike[0] for settings in alike) and alike[0]["method"] == "clip"
    assert len({run.out for run in runs.values()}) == len(GRID)
    first: dict[Point, dict[str, Any]] = {}
    for point, run in runs.items():
        assert run.data.vocab is not None
        dataset = PretrainDataset(run, ClipsTokenizer(run.data.vocab))
        first[point] = next(batches(dataset, 0, 1, 32, workers=0)).tensors
        lengths = (first[point]["texts"][:, 0] > 2).sum(dim=1) - 1  # without bos, eos, pads and the CLS at the end
        assert 1 <= lengths.max() <= point.length
    assert all((batch["image"] == first[GRID[0]]["image"]).all() for batch in first.values())
    texts = {point: batch["texts"].numpy().tobytes() for point, batch in first.items()}
    assert len(set(texts.values())) >= 5  # web captions of two words are the same at 4 tokens, and that is all


def test_recipe_of_pretraining_and_keys_over_it(data: list[str], tmp_path: Path) -> None:
    settings = ["pretrain.recipe=[one_node/clips_b16_112, debug]", "pretrain.model.context_length=32", "lengths=[16]"]
    loaded = load_settings(CaptionStudyConfig, PACKAGE, [f"out={tmp_path}", *data, *settings])
    run = pretrain_config(loaded, points(loaded)[0])
    assert (run.samples, run.model.size, run.model.context_length) == (64, "debug", 32)  # debug's, and ours over it
    assert run.method == "clip" and run.model.decoder is None  # whatever the recipe says
    assert run.texts.length == 16 and str(run.data.vocab).endswith("vocab.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pretrain.samplez=5"], r"samplez.*did you mean 'samples'"),
        (["pretrain.samples=none"], r"'samples'.*integer"),
        (["pretrain.seed=5"], r"pretrain\.seed: the study sets it; say it in seeds"),
        (["pretrain.texts.length=5"], r"pretrain\.texts: .*strategies, lengths and sources"),
        (["pretrain.recipe=demo_pretrian"], "did you mean 'demo_pretrain'"),
        (["pretrain.recipe=3"], r"pretrain\.recipe: must be"),
        (["lengths=[4, 9]"], r"lengths: 9 tokens need pretrain\.model\.context_length of at least 12 .* it is 11"),
        (["pretrain.evaluation.shards=null"], r"pretrain\.evaluation\.shards: name the held-out pictures"),
        (["lengths=[4, 4]"], "lengths must name at least one, and each once"),
        (["strategies=[]"], "strategies must name at least one"),
        (["lengths=[0]"], "at least 1"),
        (["web_strategies=[sub_caption]"], "web_strategies"),
        (["strategies=[sub_captions]"], "strategies"),
        (["part=4/4"], "i from 0 to n − 1"),
        (["length=[4]"], "did you mean 'lengths'"),
    ],
)
def test_bad_settings_are_said_before_anything_is_trained(
    data: list[str], tmp_path: Path, settings: list[str], message: str
) -> None:
    out = tmp_path / "study"
    with pytest.raises(InputError, match=message):
        study_captions(config(data, out, *settings))
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The debug twin, killed and run again
# ---------------------------------------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from clips_core import checkpoint
from eval_suites.cli import main
save, calls = checkpoint.save, 0
def killed_save(*args):
    global calls
    save(*args)
    calls += 1
    if calls == 10: os.kill(os.getpid(), signal.SIGKILL)  # four a point: in the third, after its second
checkpoint.save = killed_save
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug twin through the command, killed in its third point and run again."""
    out = tmp_path_factory.mktemp("study") / NAME
    arguments = ["study", "captions", "study_world_debug", f"out={out}", *data, "pretrain.samples=160"]
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *arguments], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    before = {point: manifest_time(out, point) for point in GRID}
    assert [time is not None for time in before.values()] == [True, True, False, False, False, False]
    assert len(list((out / "results").iterdir())) == 2  # nothing that was earned is lost
    assert main(arguments) == 0
    assert all(manifest_time(out, point) == before[point] for point in GRID[:2])  # finished: not repeated
    return out


def manifest_time(out: Path, point: Point) -> int | None:
    path = out / "points" / point.name / "manifest.json"
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.fixture(scope="module")
def result(finished: Path) -> dict[str, Any]:
    return dict(read_json(finished / "study.json"))


def test_killed_point_went_on(data: list[str], finished: Path, tmp_path: Path) -> None:
    point = GRID[2]
    rows = MetricsLog(finished / "points" / point.name / "metrics.jsonl").rows()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    whole = config(data, tmp_path, "pretrain.samples=160")
    weights = read_manifest(pretrain(pretrain_config(whole, point)))["weights"]
    assert read_manifest(finished / "points" / point.name)["weights"] == weights


def test_figure_is_that_of_the_run_folders(finished: Path, result: dict[str, Any]) -> None:
    rows = [read_json(finished / "results" / f"{point.name}.json") for point in GRID]
    measured: dict[tuple[str, str, str, int], float] = {}
    for row, point in zip(rows, GRID, strict=True):
        folder = finished / "points" / point.name
        manifest, zero_shot = read_manifest(folder, "pretrain"), read_json(folder / "zero_shot.json")
        assert row["weights"] == manifest["weights"]["export/open_clip/open_clip_model.safetensors"]
        assert row["flops_per_sample"] == manifest["outputs"]["flops_per_sample"] and row["samples"] == 160
        assert (row["n"], row["captions"]) == (16, 32)
        ways = {way: zero_shot[way]["R@1"] for way in ("image_to_text", "text_to_image")}
        assert ways == pytest.approx({way: np.mean(row["scores"][way]) for way in ways})
        for measure, value in {**ways, "mean": sum(ways.values()) / 2}.items():
            measured[point.source, point.strategy, measure, point.length] = value
    assert len({row["flops_per_sample"] for row in rows}) == 1 and len({row["weights"] for row in rows}) == 6
    assert len(set(measured.values())) > 3  # there is something to draw
    drawn = {
        (curve["source"], curve["strategy"], curve["measure"], estimate["length"]): estimate
        for curve in result["curves"]
        for estimate in curve["points"]
    }
    assert drawn.keys() == measured.keys()
    for key, estimate in drawn.items():
        assert estimate["value"] == pytest.approx(measured[key], abs=1e-6)
        assert 0 <= estimate["interval"][0] <= estimate["value"] <= estimate["interval"][1] <= 1
        assert estimate["interval"][0] < estimate["interval"][1] and estimate["trainings"] == 1
    assert "One training per point (seed 0)" in result["findings"][1] and len(result["findings"]) == 2 + 3


def test_page_is_self_contained_and_escapes_names(finished: Path, result: dict[str, Any]) -> None:
    page = (finished / "captions.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=|url\(|https?:|<script|@import""", page)
    assert NAME not in page and html.escape(NAME) in page
    assert page.count('<svg class="chart"') == 6 and "One training per point" in page
    for estimate in (estimate for curve in result["curves"] for estimate in curve["points"]):
        low, high = (f"{100 * bound:.1f}" for bound in estimate["interval"])
        assert f"<b>{100 * estimate['value']:.1f}</b> <small>[{low}, {high}]</small>" in page


def test_figure_files(finished: Path) -> None:
    drawing = ElementTree.parse(finished / "captions.svg")
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Synthetic captions", "Web captions", "sub-caption", "truncation", "1", "4", "8"} <= words
    with Image.open(finished / "captions.png") as image:
        assert image.format == "PNG" and image.width > image.height > 300


def test_run_again_does_nothing_but_report(data: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("points/*/*")}
    figure = (finished / "captions.svg").read_bytes()
    study_captions(config(data, finished, "pretrain.samples=160"))
    assert {path: path.stat().st_mtime_ns for path in finished.glob("points/*/*")} == before
    assert (finished / "captions.svg").read_bytes() == figure
    told = capsys.readouterr().out
    assert "6 finished; 0 to do here" in told and "All 6 points are finished" in told and "[1/" not in told
    for curve in read_json(finished / "study.json")["curves"]:
        for point in curve["points"] if curve["measure"] == "mean" else ():
            figures = [f"{100 * value:.1f}" for value in (point["value"], *point["interval"])]
            name = f"{point['source']} +{point['strategy'].replace('_', '-')} +{point['length']} "
            assert re.search(rf"{name} +{figures[0]} +\[{figures[1]}, {figures[2]}\]", told)  # on one line of 80


def test_shared_grid(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part takes every n-th point, and a point that another process has is passed over."""

    def finished() -> list[int]:
        return [number for number, point in enumerate(GRID) if manifest_time(tmp_path, point) is not None]

    study_captions(config(data, tmp_path, "part=0/6"))
    assert finished() == [0]
    with claimed(tmp_path / "points" / GRID[3].name) as ours, claimed(tmp_path / "points" / GRID[3].name) as twice:
        assert ours and not twice
        study_captions(config(data, tmp_path, "part=1/2", "pretrain.log_every=3"))  # how it is done may differ
    assert finished() == [0, 1, 5]
    told = capsys.readouterr().out
    assert f"[2/3] {GRID[3]}: another process has it" in told and re.search(r"\[3/3\] web .* left\)", told)
    assert "3 of 6 points are not finished" in told and "3 of 6 points are finished" in told


def test_other_settings_or_data_are_refused(data: list[str], finished: Path, tmp_path: Path) -> None:
    other = config(data, finished, "pretrain.samples=160", "pretrain.learning_rate=0.01")
    with pytest.raises(
        InputError, match=r"seed0\.json was made with other settings \(settings\.learning_rate: 0\.001 → 0\.01"
    ):
        study_captions(other)
    shutil.copytree(finished / "points", tmp_path / "points")  # and no results: the run folders know what made them
    with pytest.raises(
        InputError, match=r"a training with other settings \(learning_rate: 0\.001 → 0\.01\); choose another"
    ):
        study_captions(dataclasses.replace(other, out=tmp_path))
    assert not (tmp_path / "results").exists()
    manifest = tmp_path / "points" / GRID[1].name / "manifest.json"
    write_json(manifest, {**read_json(manifest), "inputs": {"data": "others", "vocab": "other"}})
    with pytest.raises(InputError, match=r"saw different data \(inputs\.data: "):
        study_captions(config(data, tmp_path, "pretrain.samples=160"))


def test_results_spare_the_training(
    data: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_captions(config(data, tmp_path, "pretrain.samples=160", f"results={finished / 'results'}"))
    told = capsys.readouterr().out
    assert "6 finished; 0 to do here" in told and "All 6 points are finished" in told
    assert not (tmp_path / "points").exists() and not (tmp_path / "results").exists()
    assert (tmp_path / "captions.svg").read_bytes() == (finished / "captions.svg").read_bytes()


def test_an_evaluation_that_does_not_say_whose_its_captions_are(
    data: list[str], finished: Path, tmp_path: Path
) -> None:
    run = pretrain_config(config(data, tmp_path, "pretrain.samples=160"), GRID[0])
    shutil.copytree(finished / "points" / GRID[0].name, run.out)
    path, scores = run.out / "zero_shot.json", read_scores(run)
    older = read_json(path)
    assert older.pop("owner") == np.repeat(np.arange(16), 2).tolist()
    write_json(path, older)
    with pytest.raises(
        InputError, match=r"zero_shot\.json: lacks `owner`.* of its 32 captions is; delete manifest\.json"
    ):
        read_scores(run)
    (run.out / "manifest.json").unlink()
    pretrain(run)
    again = read_scores(run)
    assert all((again[measure] == scores[measure]).all() for measure in scores)
    ranks = {"image_to_text": [0] * 16, "text_to_image": [0, 1] * 8}
    write_json(path, {**older, "captions": 16, "ranks": ranks})  # one caption a picture: its own
    assert read_scores(run)["text_to_image"].tolist() == [1, 0] * 8


def test_command_line(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "captions", "study_wrld", *data]) == 2
    assert "did you mean 'study_world'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "captions", "--keys"])
    assert "seeds: list[int] = [0]" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and words
# ---------------------------------------------------------------------------------------------------------------------


def made_result(source: str, strategy: str, length: int, seed: int, share: float) -> dict[str, Any]:
    """A point at which `share` of 400 pictures is found."""
    rng = np.random.default_rng([length, seed])
    scores = {way: (rng.random(400) < share).astype(float).tolist() for way in WAYS}
    recalls = {way: {"R@1": float(np.mean(values))} for way, values in scores.items()}
    row = {"point": f"{source}-{length}", "source": source, "strategy": strategy, "length": length, "seed": seed}
    figures = {"chance": {"R@1": 1 / 400}, "n": 400, "samples": 1000, "seconds": 1.0, "flops_per_sample": 1e6}
    return {**row, **recalls, **figures, "weights": "0" * 64, "scores": scores, "settings": {"seed": seed, "texts": {}}}


def mean_scores(row: dict[str, Any]) -> Any:
    return np.mean([row["scores"][way] for way in WAYS], axis=0)


def test_several_captions_a_picture() -> None:
    """The mean over pictures is the recall over queries, and one picture's captions are no independent queries."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(300), 5)
    found = np.repeat(rng.random(300) < 0.4, 5)  # of a picture all captions find it, or none
    ranks = {"image_to_text": rng.integers(0, 3, 300).tolist(), "text_to_image": np.where(found, 0, 7).tolist()}
    scores = scores_by_picture(ranks, owner)
    to_text, to_image = (float(np.mean(np.asarray(value) == 0)) for value in ranks.values())
    assert scores["text_to_image"].mean() == pytest.approx(to_image)
    made = {**made_result("web", "truncation", 4, 0, 0.5), "scores": scores}
    by_measure = {curve.measure: curve.points[0] for curve in analyse([made], {}, 1).curves}
    assert by_measure["mean"].value == pytest.approx((to_text + to_image) / 2)
    expected = recall_interval(int(found[::5].sum()), 300)  # Wilson's, of 300 and not of 1,500
    assert by_measure["text_to_image"].interval == pytest.approx(expected, abs=2e-3)
    uneven = scores_by_picture({"image_to_text": [0, 1], "text_to_image": [0, 0, 1]}, np.array([0, 0, 1]))
    assert uneven["text_to_image"].mean() == pytest.approx(2 / 3)


def test_trend_is_the_least_squares_slope_with_its_t_interval() -> None:
    lengths = [4, 8, 32]  # uneven on the logarithmic axis
    made = {
        length: mean_scores(made_result("synthetic", "truncation", length, 0, 0.8 - 0.02 * length))
        for length in lengths
    }
    own = trend({length: {0: scores} for length, scores in made.items()})
    slopes = np.polyfit(np.log2(lengths), np.stack([made[length] for length in lengths]), 1)[0]  # of each picture
    expected = stats.ttest_1samp(slopes, 0).confidence_interval()
    assert own is not None and own.trainings == 1 and own.verdict == "falls"
    assert own.value == pytest.approx(slopes.mean()) and own.interval == pytest.approx(tuple(expected))
    assert trend({4: {0: made[4]}}) is None and trend({4: {0: made[4]}, 8: {1: made[8]}}) is None


def test_several_seeds_give_t_intervals_over_trainings() -> None:
    results = [
        made_result("synthetic", "block_mask", length, seed, 0.7 - 0.01 * length + 0.05 * seed)
        for length in (4, 16, 32)
        for seed in (0, 1, 2)
    ]
    made = analyse(results[:-1], {}, len(results))
    curve = made.curves[0]
    values = [float(mean_scores(result).mean()) for result in results[:3]]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert curve.points[0].interval == pytest.approx(expected)
    assert [point.trainings for point in curve.points] == [3, 3, 2]
    means = np.array([[mean_scores(result).mean() for result in results[i : i + 3]] for i in (0, 3, 6)])
    slopes = np.polyfit([2, 4, 5], means, 1)[0][:2]  # the third seed lacks a length
    assert curve.trend is not None and curve.trend.trainings == 2
    expected = stats.t.interval(0.95, 1, slopes.mean(), stats.sem(slopes))
    assert (curve.trend.value, *curve.trend.interval) == pytest.approx((slopes.mean(), *expected))
    assert "8 of 9 points are finished. Up to 3 trainings per point (seeds 0, 1, 2)" in made.findings[1]
    assert (
        analyse(results, {}, len(results))
        .findings[1]
        .startswith("3 trainings per point (seeds 0, 1, 2), 1,000 pictures")
    )
    assert over_trainings([0.9, 0.99], 0.0)[1][1] == 1.0


def test_headline_says_what_the_intervals_bear() -> None:
    opposite = [made_result("synthetic", "truncation", length, 0, 0.9 - 0.1 * i) for i, length in enumerate((4, 8, 16))]
    opposite += [made_result("web", "truncation", length, 0, 0.2 + 0.1 * i) for i, length in enumerate((1, 2, 4))]
    told = analyse(opposite, {}, 6).findings
    assert told[0] == "With longer synthetic captions R@1 falls. With longer web captions R@1 rises."
    flat = [made_result("synthetic", "sub_caption", length, 0, 0.5) for length in (4, 8, 16)]
    mixed = analyse(opposite[:3] + flat, {}, 6)
    assert mixed.findings[0] == (
        "With longer synthetic captions R@1 falls (truncation); shows no clear trend (sub-caption)."
    )
    assert mixed.findings[2].startswith("synthetic, truncation: −") and "% at 4 tokens" in mixed.findings[2]
    assert headline(analyse(opposite[:1], {}, 6).curves[:1]).endswith("R@1 has one length only.")


def test_page_of_a_single_point() -> None:
    made = analyse([made_result("web", "truncation", 8, 0, 0.0)], {"out": "x"}, 4)
    page = study_page.render(made)
    assert "A trend needs two lengths" in page and "1 of 4 points are finished" in page
    assert study_page.figure(made, "png") == study_page.figure(made, "png")


def test_interval_chart_places_points_on_a_logarithmic_axis() -> None:
    line = IntervalLine("<truncation>", 2, [(4, 30.0, 20.0, 40.0), (8, 20.0, 10.0, 30.0), (32, 10.0, 0.0, 20.0)])
    chart = ElementTree.fromstring(str(interval_chart("R@1 & more", [line], "tokens", 1.0)))
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.iter("circle")]
    assert (circles[2][0] - circles[1][0]) == pytest.approx(2 * (circles[1][0] - circles[0][0]), abs=0.3)
    spans = [s for s in chart.iter("line") if s.attrib["class"] == "span"]
    for (x, y), span in zip(circles, spans, strict=True):
        assert float(span.attrib["x1"]) == float(span.attrib["x2"]) == x
        assert (float(span.attrib["y1"]) + float(span.attrib["y2"])) / 2 == pytest.approx(y, abs=0.11)
    words = [text.text for text in chart.iter("text")]
    assert {"4", "8", "32", "tokens"} <= set(words) and chart.find("title").text == "R@1 & more"  # type: ignore[union-attr]
