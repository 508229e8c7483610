"""The methods study: its grid and budgets, results that spare a training, and figures against plain sums."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from clips_core import zero_shot
from clips_core.config import load_settings
from clips_core.errors import InputError
from clips_core.folders import read_json
from clips_core.formats import load_open_clip
from eval_suites import study_methods as module
from eval_suites.cli import main
from eval_suites.results import WEIGHTS, identity
from eval_suites.study_methods import MethodStudyConfig, Point, analyse, study_methods, tables, training_order
from tests.test_pretrain import COLOURS, make_shards
from tests.test_study import make_held_out

PACKAGE = Path(module.__file__).parent
SMALL = {
    "image_size": 16, "patch_size": 8, "embed_dim": 16, "context_length": 12, "learnable_tokens": 12, "vocab_size": 400,
    "vision": {"width": 16, "layers": 1, "heads": 2}, "text": {"width": 16, "layers": 1, "heads": 2},
    "decoder": {"width": 16, "layers": 1, "heads": 2},
}  # fmt: skip
TEMPLATES = ("{c} stuff", "the upper half is {c}")
NAME = "clips-pictures-own-seed1"


def make_classes(folder: Path) -> Path:
    """Noisy pictures of one colour above others; the upper one is the class."""
    rng = np.random.default_rng(1)
    for name, colour in COLOURS.items():
        (folder / "test" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (16, 16, 3))
            pixels[:8] = (pixels[:8] + 3 * np.array(colour)) // 4
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "test" / name / f"{i:02d}.png")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of two arms and two seeds, seconds long."""
    folder = tmp_path_factory.mktemp("data")
    shards = make_shards(folder / "train")
    pretrain: dict[str, Any] = {
        "data": {"train": str(shards), "vocab": str(shards / "vocab.txt"), "workers": 0},
        "evaluation": {"shards": str(make_held_out(folder / "held_out"))},
        "model": SMALL, "samples": 64, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "log_every": 1,
    }  # fmt: skip
    recipe = {
        "pretrain": pretrain,
        "arms": {"clip_mix": {"method": "clip_mix", "model": {"decoder": None}}, "clips": {"method": "clips"}},
        "baseline": "clip_mix",
        "flops_of": "clips",
        "classes": {
            "test": str(make_classes(folder / "classes") / "test"),
            "templates": str(folder / "classes/templates.txt"),
        },
        "data": {"jitter": {"data": {"colour_jitter": 0.4}}},
        "grids": [
            {"arms": ["clip_mix", "clips"], "seeds": [0, 1], "budgets": ["pictures", "flops"]},
            {"arms": ["clip_mix", "clips"], "seeds": [0], "data": ["jitter"]},
        ],
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(recipe))
    return [str(path)]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    assert main(["study", "methods", *settings, f"out={out}", f"results={out / 'kept'}"]) == 0
    return out


def config(settings: Sequence[str], *more: str) -> MethodStudyConfig:
    return load_settings(MethodStudyConfig, PACKAGE, [*settings, *more])


def results(finished: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in (finished / "kept").iterdir()}


def test_a_whole_study_with_the_first_seed_comes_first(settings: list[str]) -> None:
    order = training_order(config(settings, "out=x"))
    assert [point.seed for point in order] == [0] * 5 + [1] * 3
    assert Point("clips", "flops", "own", 0) not in order  # the same training as with equal pictures
    assert len(set(order)) == len(order)


def test_shipped_recipe_names_what_can_be_trained(tmp_path: Path) -> None:
    shipped = config(["study_methods"])
    runs = {point: module._config(shipped, point) for point in training_order(shipped)}
    assert len(runs) == (5 + 5 + 5) + 2 * 3 * 4 + 3 + 2 * 3 * 3
    assert {run.method for run in runs.values()} == {"clip", "clip_mix", "coca", "clips"}
    assert (
        len({json.dumps(identity(run) | {"train": str(run.data.train)}) for run in runs.values()})
        == 5 + 5 + 4 * 3 + 3 + 18
    )


def test_the_long_study_is_the_same_but_for_its_length() -> None:
    shipped, long = config(["study_methods"]), config(["study_methods_long"])
    for point in training_order(long):
        ours, theirs = (identity(module._config(study, point)) for study in (long, shipped))
        assert ours.pop("samples") == 3 * theirs.pop("samples") and ours == theirs
    assert len(training_order(long)) == 3 * 3


def test_equal_flops_are_equal_to_a_batch(finished: Path) -> None:
    made = results(finished)
    clips, mix, more = (
        made[name] for name in ("clips-pictures-own-seed0", "clip_mix-pictures-own-seed0", "clip_mix-flops-own-seed0")
    )
    assert clips["samples"] == mix["samples"] == 64 < more["samples"]
    spent = [row["samples"] * row["flops_per_sample"] for row in (clips, more)]
    assert abs(spent[0] - spent[1]) <= 16 * more["flops_per_sample"]
    assert mix["inputs"] == clips["inputs"] and mix["settings"]["seed"] == 0
    assert "train" not in mix["settings"]["data"]


def test_results_spare_the_training(
    settings: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = shutil.copytree(finished / "kept", tmp_path / "kept")
    gone = [f"{key}={tmp_path / 'gone'}" for key in ("pretrain.data.train", "pretrain.data.vocab", "classes.test")]
    study_methods(config(settings, *gone, f"out={tmp_path / 'new'}", f"results={kept}"))
    assert "8 trainings, 8 finished; 0 to do here" in capsys.readouterr().out
    assert not (tmp_path / "new" / "points").exists()
    assert (tmp_path / "new" / "methods.md").read_text() == (finished / "methods.md").read_text()
    with pytest.raises(
        InputError, match=r"clip_mix-.*-seed0\.json was made with other settings \(settings\.learning_rate"
    ):
        study_methods(config(settings, f"out={tmp_path / 'new'}", f"results={kept}", "pretrain.learning_rate=1e-2"))


def test_a_result_that_is_lost_is_written_again_from_its_run(settings: list[str], finished: Path) -> None:
    path = finished / "kept" / "clips-pictures-own-seed1.json"
    before = path.read_bytes()
    path.unlink()
    study_methods(config(settings, f"out={finished}", f"results={finished / 'kept'}"))
    assert path.read_bytes() == before


def test_towers_are_classified_as_clips_core_does_it(finished: Path, settings: list[str]) -> None:
    classes = Path(settings[0]).parent / "classes" / "test"
    for name, row in results(finished).items():
        model, tokenizer = load_open_clip(str(finished / "points" / name))
        found = zero_shot.classification(model, tokenizer, classes, [text.replace("{c}", "{}") for text in TEMPLATES])
        own = row["classification"]
        assert own["scores"] == [int(rank == 0) for rank in found["ranks"]]
        assert own["top1"] == pytest.approx(found["top1"]) == pytest.approx(np.mean(own["scores"]))
        assert (own["classes"], own["labels"]) == (sorted(COLOURS), [i for i in range(4) for _ in range(12)])
    study = read_json(finished / "methods.json")
    assert study["n_classes"] == 4
    for row in study["rows"]:
        assert row["top1"]["n_seeds"] == len(row["seeds"]) and row["top1"]["n_clusters"] == 48
    told = {seed: results(finished)[f"clips-pictures-own-seed{seed}"]["classification"]["top1"] for seed in (0, 1)}
    [of_clips] = [row for row in study["rows"] if row["arm"] == "clips" and row["budget"] == "flops"]
    assert of_clips["top1"]["value"] == pytest.approx(np.mean(list(told.values())))


def test_results_without_classification_are_completed_where_the_tower_is_there(
    settings: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = results(finished)
    shutil.copytree(finished, tmp_path / "study")
    kept = tmp_path / "study" / "kept"
    for path in kept.iterdir():  # as they were before there was a classification
        path.write_text(json.dumps({key: value for key, value in whole[path.stem].items() if key != "classification"}))
    shutil.rmtree(tmp_path / "study" / "points" / "clip_mix-pictures-own-seed0")
    manifest = tmp_path / "study" / "points" / NAME / "manifest.json"
    other = read_json(manifest)
    other["weights"][WEIGHTS] = "0" * 64  # this folder holds another tower than the result is of
    manifest.write_text(json.dumps(other))
    arguments = [*settings, f"out={tmp_path / 'study'}", f"results={kept}"]
    study_methods(config(arguments, "classes=null"))
    assert "top-1" not in (tmp_path / "study" / "methods.md").read_text()
    study_methods(config(arguments))
    assert capsys.readouterr().out.count("8 trainings, 8 finished; 0 to do here") == 2
    made = results(tmp_path / "study")
    lacking = {name for name, row in made.items() if "classification" not in row}
    assert lacking == {"clip_mix-pictures-own-seed0", NAME}
    assert {name: row for name, row in made.items() if name not in lacking} == {
        name: row for name, row in whole.items() if name not in lacking
    }
    study = read_json(tmp_path / "study" / "methods.json")
    rows = {row["arm"]: row for row in study["rows"] if (row["budget"], row["data"]) == ("pictures", "own")}
    assert {arm: (row["recall"]["n_seeds"], row["top1"]["n_seeds"]) for arm, row in rows.items()} == {
        "clip_mix": (2, 1),
        "clips": (2, 1),
    }
    assert rows["clips"]["difference"] is not None and rows["clips"]["top1_difference"] is None  # no seed in common
    assert tables(study).count("(of 1)") == 3


def test_figures_are_those_of_the_runs(finished: Path) -> None:
    made, study = results(finished), read_json(finished / "methods.json")
    for row in study["rows"]:
        of = [
            made.get(f"{row['arm']}-{row['budget']}-{row['data']}-seed{seed}")
            or made[f"clips-pictures-{row['data']}-seed{seed}"]
            for seed in row["seeds"]
        ]
        for way in ("image_to_text", "text_to_image"):
            zero_shot = [read_json(finished / "points" / result["point"] / "zero_shot.json") for result in of]
            assert row[way] == pytest.approx(np.mean([own[way]["R@1"] for own in zero_shot]))
        assert row["recall"]["value"] == pytest.approx((row["image_to_text"] + row["text_to_image"]) / 2)
        assert row["recall"]["n_seeds"] == len(row["seeds"])
    by = {(row["budget"], row["data"], row["arm"]): row for row in study["rows"]}
    assert len(by) == len(study["rows"]) == 6
    for (budget, data, arm), row in by.items():
        if arm == "clips":
            baseline = by[budget, data, "clip_mix"]
            assert row["difference"]["difference"] == pytest.approx(
                row["recall"]["value"] - baseline["recall"]["value"]
            )
        else:
            assert row["difference"] is None


def test_a_difference_takes_the_seeds_that_both_have() -> None:
    rng = np.random.default_rng(0)

    def row(arm: str, seed: int, share: float) -> dict[str, Any]:
        scores = {way: (rng.random(300) < share).astype(float).tolist() for way in ("image_to_text", "text_to_image")}
        recalls = {way: {"R@1": float(np.mean(values))} for way, values in scores.items()}
        return {"arm": arm, "budget": "pictures", "data": "own", "seed": seed, "samples": 10, "flops_per_sample": 1.0,
                "seconds": 1.0, "scores": scores, **recalls}  # fmt: skip

    made = [row("a", seed, 0.5) for seed in range(5)] + [row("b", seed, 0.7) for seed in (1, 3)]
    study = analyse(made, "a", "b")
    a, b = study["rows"]
    shared = [np.mean(module.hits(own)) for own in made if own["arm"] == "a" and own["seed"] in (1, 3)]
    assert b["difference"]["difference"] == pytest.approx(b["recall"]["value"] - np.mean(shared))
    assert (a["recall"]["n_seeds"], b["difference"]["n_seeds"]) == (5, 2)
    assert "| b | 2 | 10 |" in tables(study)
    assert study["n_classes"] is None and b["top1"] is None and "top-1" not in tables(study)


def classified(arm: str, seed: int, share: float, pictures: str = "a") -> dict[str, Any]:
    """A result whose R@1 does not vary and whose top-1 does."""
    rng = np.random.default_rng([seed, int(1000 * share)])
    ways: dict[str, Any] = {way: {"R@1": 0.5} for way in ("image_to_text", "text_to_image")}
    told = {
        "n_classes": 4,
        "pictures": pictures,
        "prompts": "p",
        "scores": (rng.random(400) < share).astype(int).tolist(),
    }
    return {"arm": arm, "budget": "pictures", "data": "own", "seed": seed, "samples": 10, "flops_per_sample": 1.0,
            "seconds": 1.0, "point": f"{arm}-{seed}", "scores": {way: [0.0, 1.0] for way in ways}, **ways,
            "classification": told}  # fmt: skip


def test_top1_has_its_own_family_of_tests() -> None:
    made = [classified(arm, seed, share) for arm, share in (("a", 0.5), ("b", 0.6), ("c", 0.52)) for seed in range(4)]
    study = analyse(made, "a", "a")
    _, b, c = study["rows"]
    p = [row["top1_difference"]["p_value"] for row in (b, c)]
    assert p[0] < 0.03 < p[1]
    adjusted = [row["top1_difference"]["adjusted_p"] for row in (b, c)]
    assert adjusted == pytest.approx([2 * p[0], max(2 * p[0], p[1])])  # of two, not of four with those of R@1
    means = {arm: np.mean([row["classification"]["scores"] for row in made if row["arm"] == arm]) for arm in "ab"}
    assert b["top1_difference"]["difference"] == pytest.approx(means["b"] - means["a"])
    assert "top-1 of 4 classes" in tables(study)


def test_interval_of_one_training_is_that_of_its_pictures() -> None:
    row = classified("a", 0, 0.7)
    [found] = analyse([row], "a", "a")["rows"]
    hits = sum(row["classification"]["scores"])
    known = stats.binomtest(hits, 400).proportion_ci(0.95, method="wilson")
    assert found["top1"]["interval"] == pytest.approx([known.low, known.high], abs=2e-3)


def test_trainings_classified_on_different_sets_are_not_compared() -> None:
    with pytest.raises(
        InputError, match=r'a-0 and b-0 were classified on different sets \(pictures: "a" → "b"\); delete'
    ):
        analyse([classified("a", 0, 0.5), classified("b", 0, 0.5, pictures="b")], "a", "a")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["baseline=clip"], r"no arm is called 'clip'; the arms are clip_mix, clips"),
        (
            ["grids=[{arms: [clips], seeds: [0], data: [jiter]}]"],
            r"no data is called 'jiter'; besides own there are jitter",
        ),
        (["pretrain.method=clip"], r"pretrain\.method: the study sets it; say it in the arms"),
        (["pretrain.evaluation.shards=null"], r"pretrain\.evaluation\.shards: name the held-out pictures"),
        (["arms.clips.metod=clip"], r"did you mean 'method'"),
        (["classes.tasks=[knn]", "classes.train=x"], r"classes\.tasks must be \[zero_shot\]"),
        (["classes.test=no_such_folder"], r"no_such_folder: no such folder"),
    ],
)
def test_one_clear_error(settings: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study_methods(config(settings, f"out={tmp_path}", *more))
