"""An output that lmms-eval itself has written, read back: its records are those of our own run of the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmark_files import make_files, records_of
from test_benchmarks import make_model

from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest
from eval_suites.benchmarks import EvalConfig, run_suite
from eval_suites.lmms_output import ImportConfig, import_output
from eval_suites.local_data import working_from
from eval_suites.records import Entry, check_same_questions, read_run

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("pope", "mme")
GENERATION = {"max_new_tokens": 2, "min_new_tokens": 1}
DATE = "20260102_030405"


def write_output(folder: Path, model: Path, data: Path) -> None:
    """What `python -m lmms_eval --log_samples --output_path` does, step by step, with our model class."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    from eval_suites.chat_model import ChatLlava

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args("chat_llava", "pretrained=lab/tiny-llava", "", "", False)
    settings = ",".join(f"{key}={value}" for key, value in GENERATION.items())
    with working_from(data, folder / "cache"):
        results = simple_evaluate(
            model=ChatLlava(model, torch.float32, "sdpa", batch_size=3),
            tasks=list(TASKS),
            batch_size=3,
            bootstrap_iters=0,
            gen_kwargs=settings,
            process_docs_parallel=1,
            datetime_str=DATE,
        )
    shutil.rmtree(folder / "cache")
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=DATE)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    make_files(folder / "data", list(TASKS), n=8)
    suite = {"name": "two", "tasks": {name: {"generation": GENERATION} for name in TASKS}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    write_output(folder / "lmms", make_model(folder / "model"), folder / "data")
    return folder


def config(made: Path, out: Path, **values: Any) -> ImportConfig:
    suite = str(made / "suite.yaml")
    settings = {"folder": made / "lmms", "data": made / "data", "out": out, "suite": suite, "partial": True, **values}
    return ImportConfig(**settings)


def test_an_output_of_lmms_eval_becomes_our_records(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = import_output(config(folder, tmp_path / "imported"))
    ours = run_suite(
        EvalConfig(
            folder / "model",
            folder / "data",
            tmp_path / "ours",
            str(folder / "suite.yaml"),
            precision="float32",
            partial=True,
        )
    )
    said = set()
    for task in TASKS:
        a, b = records_of(imported, task), records_of(ours / "real", task)
        for row in (*a, *b):
            said.add(row["answer"])
            for key in ("batch_size", "dtype", "attention"):
                row.pop(key)
        assert a == b and len(a) == 8
    assert len(said) > 1
    assert read_json(imported / "results.json") == read_json(ours / "real/results.json")

    manifest = read_manifest(imported, "eval")
    for task, figures in manifest["outputs"]["reported"].items():
        for metric, value in figures.items():
            assert manifest["outputs"]["results"][task][metric] == pytest.approx(value)
    assert "in the output, and" not in capsys.readouterr().err
    told, own = manifest["config"], read_manifest(ours / "real")["config"]
    assert told["suite"] == own["suite"], "generation settings are those that lmms-eval was given"
    assert (told["batch_size"], told["dtype"], told["attention"], told["limit"]) == (3, "unknown", "unknown", None)
    assert "prompts" not in told and manifest["outputs"]["imported"]["date"] == DATE
    assert "tiny-llava" in manifest["outputs"]["model"] or "ChatLlava" in manifest["outputs"]["model"]


def test_it_is_read_like_any_run_and_what_differs_is_named(folder: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        imported = import_output(config(folder, tmp_path / name))
        runs.append(read_run(Entry(name, tower=None, align=None, tune=None, real=imported)))
    assert {task for task, _ in runs[0].records["real"]} == set(TASKS)
    check_same_questions(runs)


def test_a_second_import_changes_nothing(folder: Path, tmp_path: Path) -> None:
    imported = import_output(config(folder, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in imported.iterdir()}
    assert import_output(config(folder, tmp_path / "out")) == imported
    assert {path: path.stat().st_mtime_ns for path in imported.iterdir()} == before


def test_settings_that_were_others_are_recorded(folder: Path, tmp_path: Path) -> None:
    """A suite that would have asked for longer answers: the record holds what lmms-eval was given."""
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    suite["tasks"]["pope"]["generation"] = {"max_new_tokens": 9}
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(suite))
    imported = import_output(config(folder, tmp_path / "out", suite=str(tmp_path / "longer.yaml")))
    generation = read_manifest(imported)["config"]["suite"]["tasks"]["pope"]["generation"]
    assert {key: generation[key] for key in GENERATION} == GENERATION


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    """A copy of the output, to spoil; returns POPE's samples."""
    shutil.copytree(folder / "lmms", tmp_path / "lmms")
    [path] = (tmp_path / "lmms").rglob("*_samples_pope.jsonl")
    return path


def change(path: Path, line: int, **values: Any) -> None:
    lines = path.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **values})
    path.write_text("\n".join(lines) + "\n")


def test_what_is_not_whole_is_refused(folder: Path, spoilt: Path, tmp_path: Path) -> None:
    good = spoilt.read_text()
    asked = config(folder, tmp_path / "out", folder=tmp_path / "lmms")

    def message() -> str:
        with pytest.raises(InputError) as caught:
            import_output(asked)
        assert not (tmp_path / "out/real/manifest.json").exists()
        spoilt.write_text(good)
        return str(caught.value)

    change(spoilt, 3, filtered_resps="", resps=[""])
    assert "line 4: an empty answer, which may be an error that the model's class has swallowed" in message()
    change(spoilt, 2, target="perhaps")
    assert "doc_id 2 has the target 'perhaps' there and" in message()
    spoilt.write_text(good + good.splitlines()[0] + "\n")
    assert "line 9: a second answer to doc_id 0" in message()
    spoilt.write_text("\n".join(good.splitlines()[1:]) + "\n")
    assert "has no answer to doc_id 0" in message()
    spoilt.write_text(good[:-40])
    assert "line 8: not a sample of lmms-eval's" in message()
    spoilt.rename(spoilt.with_name("away"))
    with pytest.raises(InputError, match=r"no .*_samples_pope\.jsonl .*--log_samples and --tasks pope"):
        import_output(asked)


def test_empty_answers_count_where_they_are_meant(folder: Path, spoilt: Path, tmp_path: Path) -> None:
    change(spoilt, 3, filtered_resps="", resps=[""])
    imported = import_output(config(folder, tmp_path / "out", folder=tmp_path / "lmms", allow_empty=True))
    row = records_of(imported, "pope")[3]
    assert (row["answer"], row["score"]) == ("", 0.0)


def test_another_prompt_is_recorded(folder: Path, spoilt: Path, tmp_path: Path) -> None:
    change(spoilt, 0, input="Is it so? Think step by step.")
    imported = import_output(config(folder, tmp_path / "out", folder=tmp_path / "lmms"))
    assert list(read_manifest(imported)["config"]["prompts"]) == ["pope"]


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the folder that lmms-eval wrote to"):
        import_output(config(folder, tmp_path / "out", folder=tmp_path))
    with pytest.raises(InputError, match=r"no \*_results\.json of 1999"):
        import_output(config(folder, tmp_path / "out", date="1999"))
    shutil.copytree(folder / "lmms", tmp_path / "two/a")
    shutil.copytree(folder / "lmms", tmp_path / "two/b")
    with pytest.raises(InputError, match="holds several runs"):
        import_output(config(folder, tmp_path / "out", folder=tmp_path / "two"))
