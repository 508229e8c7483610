"""What plain lmms-eval wrote (`--log_samples --output_path FOLDER`) as an evaluation of ours.

So a model that was answered elsewhere, by whatever class, enters the same paired tests. Its answers are scored anew by the same
code as ours; the figures that came with them are kept beside. What such an output does not say (dtype, attention kernel) is
`unknown`, and a comparison names it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.folders import is_finished, read_json, sha256_file, write_json, write_manifest
from eval_suites.benchmarks import (
    UNKNOWN,
    BenchmarkTask,
    Run,
    Suite,
    import_lmms_eval,
    load_suite,
    load_tasks,
    other_counts,
    picture_ids,
    quiet,
    score_task,
)
from eval_suites.local_data import check, find, fingerprint, working_from

RESULTS = "_results.json"


@dataclass(config=FORBID)
class ImportConfig:
    """Which output of lmms-eval, and what was asked."""

    folder: Path
    """What lmms-eval was given as --output_path, or the model's folder in it."""
    data: Path
    """Folder that mirrors the hub, with the same questions."""
    out: Path
    """Gets a folder `real`, as `eval run` writes it."""
    suite: str = "demo"
    """The tasks to take, by the name of a suite or a YAML file. All of them must be in the output."""
    date: str | None = None
    """Where the folder holds several runs: how the names of this one's files begin."""
    partial: bool = False
    """Take benchmark files that do not hold the published number of questions."""
    allow_empty: bool = False
    """Take empty answers as answers. Many of lmms-eval's models make an error into one, so they are refused at first."""


def import_output(config: ImportConfig) -> Path:
    """Write `config.out/real` from an output of lmms-eval; returns it.

    Raises:
        InputError: if the output lacks a task of the suite or a question, was made from other files, or holds empty answers.
    """
    results_file = _results_file(config)
    told = _object(results_file)
    suite = load_suite(config.suite)
    files = {name: _samples_file(results_file, name, task) for name, task in suite.tasks.items()}
    rows = {name: _samples(file, config.allow_empty) for name, file in files.items()}
    data = config.data.resolve()
    tables = {name: [find(data, table) for table in task.tables] for name, task in suite.tasks.items()}
    hashes = [sha256_file(path) for path in (results_file, *files.values())]
    inputs = {
        "model": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "data": fingerprint(data, [found for own in tables.values() for found in own]),
    }
    for own in tables.values():
        check(own)
    counts = {name: (len(rows[name]) if _limited(told, name, rows[name]) else None) for name in suite.tasks}
    partial = other_counts(suite, tables, counts, config.partial)
    import_lmms_eval()
    folder = config.out.resolve() / "real"
    cache = config.out.resolve() / ".cache" / inputs["data"][:16]
    with quiet(config.out / "lmms_eval.log") as terminal, working_from(data, cache):
        loaded = load_tasks(suite)
        used = Suite(
            suite.name, {name: _as_asked(task, loaded[name], told, name) for name, task in suite.tasks.items()}
        )
        requests = {name: _requests(files[name], loaded[name], rows[name]) for name in suite.tasks}
        depends = _settings(told, used, requests, rows)
        run = Run(folder, "real", depends, inputs)
        if not is_finished(folder, "eval", run.config, run.inputs):
            results = {}
            for name, task in suite.tasks.items():
                ids = picture_ids(name, loaded[name], len(requests[name]), terminal)
                answers = {doc_id: str(row["answer"]) for doc_id, row in rows[name].items()}
                figures = score_task(run, name, task, loaded[name], requests[name], answers, ids)
                if figures is not None:
                    results[name] = figures
            write_json(folder / "run.json", run.claim)
            write_json(folder / "results.json", results)
            reported = {name: _reported(told, name, task) for name, task in suite.tasks.items()}
            outputs = {
                "results": results,
                "reported": reported,
                "model": _model_name(told),
                "data": str(config.data),
                "partial": partial,
                "imported": {"folder": str(config.folder), "date": told.get("date"), "seconds": _seconds(told)},
            }
            for line in _differences(results, reported):
                print(line, file=terminal)
            write_manifest(folder, "eval", run.config, run.inputs, outputs)
    shutil.rmtree(cache.parent, ignore_errors=True)
    return folder


# ------------------------------------------------------------------------------------------------------ lmms-eval's files


def _results_file(config: ImportConfig) -> Path:
    found = sorted(config.folder.rglob(f"*{RESULTS}"))
    if config.date is not None:
        found = [path for path in found if path.name.startswith(config.date)]
    if not found:
        raise InputError(
            f"{config.folder}: no *{RESULTS}{f' of {config.date}' if config.date else ''}; give the folder that lmms-eval wrote to "
            "(--output_path, with --log_samples)"
        )
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(config.folder)) for path in found)
        raise InputError(
            f"{config.folder}: holds several runs ({names}): give the model's folder, and date=… for one of them"
        )
    return found[0]


def _samples_file(results_file: Path, name: str, task: BenchmarkTask) -> Path:
    date = results_file.name.removesuffix(RESULTS)
    names = [name] if task.prompt else [name, task.task or name]
    for each in names:
        path = results_file.with_name(f"{date}_samples_{each}.jsonl")
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in results_file.parent.glob(f"{date}_samples_*.jsonl"))) or "none"
    raise InputError(
        f"{results_file.parent}: no {date}_samples_{name}.jsonl (there: {there}); run lmms-eval with --log_samples and "
        f"--tasks {name}, or take a suite of the tasks that are there"
    )


def _samples(path: Path, allow_empty: bool) -> dict[int, dict[str, Any]]:
    """By doc_id: the answer before the task's filters, the target, the prompt."""
    found: dict[int, dict[str, Any]] = {}
    # Not splitlines: it would cut an answer in two at characters such as U+2028, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
            answer = row.get("resps", row["filtered_resps"])
            while isinstance(answer, list) and len(answer) == 1:  # one list for each request, and one for its replies
                answer = answer[0]
            if not isinstance(answer, str):
                raise TypeError("several answers to one question")
            doc_id, kept = (
                int(row["doc_id"]),
                {"answer": answer, "target": str(row["target"]), "input": str(row["input"])},
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: not a sample of lmms-eval's ({type(error).__name__}: {error})"
            ) from None
        if doc_id in found:
            raise InputError(
                f"{path}, line {number}: a second answer to doc_id {doc_id} (lmms-eval appends to old files)"
            )
        if not answer.strip() and not allow_empty:
            raise InputError(
                f"{path}, line {number}: an empty answer, which may be an error that the model's class has swallowed; "
                "if it is meant so, set allow_empty=true"
            )
        found[doc_id] = kept
    if sorted(found) != list(range(len(found))) or not found:
        missing = next((i for i in range(len(found)) if i not in found), 0)
        raise InputError(f"{path}: has no answer to doc_id {missing}; the questions from the first one on are needed")
    return found


def _requests(file: Path, task: Any, rows: Mapping[int, Mapping[str, Any]]) -> list[Any]:
    """lmms-eval's requests for the same questions, once it is sure that they are the same."""
    from eval_suites.chat_model import requests_of

    docs = task.eval_docs_no_media
    if len(rows) > len(docs):
        raise InputError(f"{file}: {len(rows)} answers, but the data folder has {len(docs)} questions")
    for doc_id, row in rows.items():
        target = str(task.doc_to_target(docs[doc_id]))
        if target != row["target"]:
            raise InputError(
                f"{file}: doc_id {doc_id} has the target {row['target']!r} there and {target!r} in the data folder: other files"
            )
    return requests_of(task, len(rows))


# --------------------------------------------------------------------------------------------------------- what it says


def _settings(
    told: Mapping[str, Any], suite: Suite, requests: Mapping[str, Sequence[Any]], rows: Mapping[str, Mapping[int, Any]]
) -> dict[str, Any]:
    """What the answers depend on, as `eval run` would record it."""
    config = told.get("config", {})
    if config.get("offset"):
        raise InputError(f"the run began at question {config['offset']} (--offset); the first ones are needed")
    whole = not any(_limited(told, name, own) for name, own in rows.items())
    other = [
        name
        for name, asked in requests.items()
        if any(request.args[0] != rows[name][request.args[3]]["input"] for request in asked)
    ]
    prompts = {
        name: hashlib.sha256(json.dumps([rows[name][i]["input"] for i in sorted(rows[name])]).encode()).hexdigest()
        for name in other
    }
    return {
        "pictures": "real",
        "limit": None if whole else max(map(len, rows.values())),
        "batch_size": config.get("batch_size") or UNKNOWN,
        "dtype": UNKNOWN,
        "attention": UNKNOWN,
        "device": config.get("device") or UNKNOWN,
        "seed": 0,
        "lmms_eval": str(told.get("lmms_eval_version") or UNKNOWN),
        "suite": to_dict(suite),
        **({"prompts": prompts} if prompts else {}),  # which are not the task's default ones
    }


def _limited(told: Mapping[str, Any], name: str, rows: Mapping[int, Any]) -> bool:
    """Whether only the first of a task's questions were asked."""
    return told.get("n-samples", {}).get(name, {}).get("original") not in (None, len(rows))


def _as_asked(spec: BenchmarkTask, task: Any, told: Mapping[str, Any], name: str) -> BenchmarkTask:
    """The suite's task with the generation settings that the run had in place of the suite's own."""
    config = told.get("configs", {}).get(name) or told.get("configs", {}).get(spec.task or name) or {}
    had = dict(config.get("generation_kwargs") or {})
    own = dict(task.config.generation_kwargs)
    if had == {**own, **{key: value for key, value in spec.generation.items() if value is not None}}:
        return spec
    return replace(spec, generation={} if had == own else {**dict.fromkeys(own.keys() - had.keys()), **had})


def _reported(told: Mapping[str, Any], name: str, spec: BenchmarkTask) -> dict[str, float]:
    """The figures that lmms-eval wrote, whichever filter they are of."""
    own = told.get("results", {}).get(name) or told.get("results", {}).get(spec.task or name) or {}
    named = {key.partition(",")[0]: value for key, value in own.items()}
    return {metric: float(named[metric]) for metric in spec.metrics if isinstance(named.get(metric), int | float)}


def _differences(results: Mapping[str, Mapping[str, float]], reported: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each figure that came with the output and is another when its answers are scored here."""
    return [
        f"{name}: {metric} is {value:g} in the output, and {results[name][metric]:g} as scored here (kept as `reported`)"
        for name, figures in reported.items()
        for metric, value in figures.items()
        if name in results
        and metric in results[name]
        and abs(value - results[name][metric]) > 1e-6 * max(1.0, abs(value))
    ]


def _model_name(told: Mapping[str, Any]) -> str:
    config = told.get("config", {})
    return " ".join(str(part) for part in (config.get("model"), config.get("model_args")) if part) or UNKNOWN


def _seconds(told: Mapping[str, Any]) -> float | None:
    try:
        return float(told["total_evaluation_time_seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise InputError(f"{path}: not a results file of lmms-eval's")
    return found
