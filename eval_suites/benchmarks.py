"""MLLM benchmarks: lmms-eval's own task code, on files of this machine, answered by our own model class.

Prompts, scoring and aggregation are lmms-eval's, unmodified. What is ours: the model (`chat_model.py`), which raises where
others score an empty answer; the check of the files before the first question (`local_data.py`); the blank and shuffled
pictures that tell looking from guessing (`pictures.py`); answers that survive a kill; one record per question.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, load_config, to_dict
from clips_core.errors import InputError
from clips_core.folders import (
    first_difference,
    is_finished,
    read_json,
    sha256_file,
    write_bytes,
    write_json,
    write_manifest,
)
from eval_suites.local_data import Found, Table, check, find, fingerprint, working_from
from eval_suites.pictures import Pictures, Swap, blank, own, picture_id, shuffled
from llava_bridge.config import Precision

if TYPE_CHECKING:
    from eval_suites.chat_model import ChatLlava

LMMS_EVAL = "0.7.3"  # what the tasks ask and how they score changes between versions
INSTALL = f"pip install -r requirements/eval.txt && pip install --no-deps lmms-eval=={LMMS_EVAL}"
SUITES = Path(__file__).parent / "suites"
ATTENTION = "sdpa"


@dataclass(config=FORBID)
class BenchmarkTask:
    """How a suite uses one of lmms-eval's tasks."""

    tables: list[Table]
    """What the task reads; the first holds the questions."""
    answers: Literal["yes/no", "open"]
    metrics: list[str]
    """lmms-eval's names of the figures to report."""
    primary: str
    """The one of them that stands for the task."""
    score: list[str]
    """Where the task's `process_results` keeps a question's score of 0-1: the first of these keys that it returns."""
    target: str = "answer"
    category: str | None = None
    """Column by which results can be told apart."""
    cluster: list[str] = field(default_factory=list)
    """Columns that say which questions belong together; empty: those that show the same picture."""
    cluster_size: int | None = None
    """Set where the task's score needs clusters of exactly this size."""
    generation: dict[str, int | float | str | bool | list[str] | None] = field(default_factory=dict)
    """Settings that overrule the task's own; null drops one."""


@dataclass(config=FORBID)
class Suite:
    """A set of tasks by lmms-eval's names. Suites are data: see the YAML files in `suites/`."""

    name: str
    tasks: dict[str, BenchmarkTask]


@dataclass(config=FORBID)
class EvalConfig:
    """Let one model answer a suite, with one or several kinds of pictures."""

    model: Path
    """Folder of a stock transformers LLaVA: config, weights, processor with chat template."""
    data: Path
    """Folder that mirrors the hub: `lmms-lab-encoder/POPE/…parquet`."""
    out: Path
    """Each kind of pictures gets its folder in here."""
    suite: str = "demo"
    """The name of a suite that comes with the package, or a YAML file."""
    pictures: list[Pictures] = field(default_factory=lambda: ["real"])
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions of each task."""
    batch_size: int = Field(default=32, ge=1)
    precision: Precision = "auto"
    """auto: bfloat16 where the hardware multiplies it. In float32 an answer does not depend on the batch it was made in."""
    seed: int = 0
    """Of the shuffled pictures. Answers are greedy."""


@dataclass(frozen=True)
class Run:
    """One evaluation folder: a suite under one kind of pictures."""

    folder: Path
    pictures: Pictures
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def claim(self) -> dict[str, Any]:
        """What `run.json` says from the first answer on: all that the answers depend on."""
        return {"config": self.config, "inputs": self.inputs}


def run_suite(config: EvalConfig) -> Path:
    """Answer and score the suite; returns `config.out`, which holds a folder per kind of pictures.

    Each holds `<task>.jsonl` (a record per question), `results.json` (lmms-eval's figures), `answers-<task>.jsonl` (the
    answers as they were made) and last `manifest.json`. A run that was stopped goes on with the next unanswered batch.

    Raises:
        InputError: for bad input, before the first question.
    """
    if (version := _lmms_eval_version()) != LMMS_EVAL:
        raise InputError(f"lmms-eval {LMMS_EVAL} is needed, found {version or 'none'}; run: {INSTALL}")
    suite = load_suite(config.suite)
    data, out, model_folder = (Path(path).resolve() for path in (config.data, config.out, config.model))
    tables = {name: [find(data, table) for table in task.tables] for name, task in suite.tasks.items()}
    inputs = {
        "model": model_fingerprint(model_folder),
        "data": fingerprint(data, [found for of_task in tables.values() for found in of_task]),
    }
    runs = [_run(pictures, config, suite, out, inputs) for pictures in dict.fromkeys(config.pictures)]
    runs = [run for run in runs if not is_finished(run.folder, "eval", run.config, run.inputs)]
    if not runs:
        return out
    for run in runs:
        _refuse_answers_of_another(run)
    for name, task in suite.tasks.items():
        check(tables[name])
        _check_questions(task, tables[name][0], config.limit)

    _import_lmms_eval()
    cache = out / ".cache" / inputs["data"][:16]
    with _quiet(out / "lmms_eval.log") as terminal, working_from(data, cache):
        loaded = _load_tasks(suite)
        model = _load_model(model_folder, runs[0])
        ids = {name: _picture_ids(name, task, config.limit, terminal) for name, task in loaded.items()}
        questions = len(runs) * sum(len(of_task) for of_task in ids.values())
        with tqdm(total=questions, unit=" questions", file=terminal, dynamic_ncols=True, smoothing=0.05) as progress:
            for run in runs:
                _answer_and_score(run, suite, config, model, loaded, ids, progress)
    shutil.rmtree(out / ".cache")
    return out


def load_suite(name: str) -> Suite:
    """A suite by its name or its YAML file."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else SUITES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(suite.stem for suite in SUITES.glob("*.yaml")))
        raise InputError(f"suite {name!r}: no such file; name a .yaml file or one of {shipped}")
    suite = load_config(Suite, path)
    for task_name, task in suite.tasks.items():
        if task.primary not in task.metrics:
            raise InputError(f"{path}: {task_name}: primary {task.primary!r} is not among its metrics")
        if not task.tables:
            raise InputError(f"{path}: {task_name}: names no table")
    if not suite.tasks:
        raise InputError(f"{path}: names no task")
    return suite


def model_fingerprint(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of a model folder's files.

    Raises:
        InputError: if a file is missing, or the weights are not those that the run which made them wrote.
    """
    needed = ("config.json", "generation_config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        lacking = missing[0] if missing else "*.safetensors"
        raise InputError(f"model folder {folder}: no {lacking}; a stock transformers LLaVA folder is needed")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "llava":
        raise InputError(f"{folder}/config.json: model_type is {kind!r}, but 'llava' is needed")
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = folder.parent / "manifest.json"
    written = read_json(manifest).get("weights", {}) if manifest.is_file() else {}
    for name, digest in hashes.items():
        if written.get(f"{folder.name}/{name}", digest) != digest:
            raise InputError(f"{folder}/{name}: not the weights that {manifest} tells of; make them again")
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _lmms_eval_version() -> str | None:
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_lmms_eval() -> None:
    """Its own metadata does not name all that it imports."""
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise InputError(f"lmms-eval can't be imported ({error}); run: {INSTALL}") from None


# ------------------------------------------------------------------------------------------------ before the first question


def _run(pictures: Pictures, config: EvalConfig, suite: Suite, out: Path, inputs: dict[str, str]) -> Run:
    """The folder of one kind of pictures, and all that its answers depend on."""
    import torch

    depends = {
        "pictures": pictures,
        "limit": config.limit,
        "batch_size": config.batch_size,
        "dtype": _dtype_name(config.precision),
        "attention": ATTENTION,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seed": config.seed,
        "lmms_eval": _lmms_eval_version(),
        "suite": to_dict(suite),
    }
    return Run(out / pictures, pictures, depends, inputs)


def _dtype_name(precision: Precision) -> str:
    """`auto` resolved for this machine."""
    if precision != "auto":
        return precision
    from llava_bridge.precision import resolve_precision

    return str(resolve_precision(precision)).removeprefix("torch.")


def _refuse_answers_of_another(run: Run) -> None:
    """An unfinished folder may hold answers already: they must be this run's."""
    path = run.folder / "run.json"
    difference = first_difference(read_json(path), run.claim) if path.is_file() else None
    if difference is not None:
        raise InputError(
            f"{run.folder} holds answers of another run ({difference}); choose another folder or delete this one"
        )


def _check_questions(task: BenchmarkTask, questions: Found, limit: int | None) -> None:
    """What the task's scoring asserts about the questions, before they are answered."""
    if task.answers == "yes/no":
        for row, answer in enumerate(questions.values(task.target)[:limit]):
            if str(answer).strip().lower() not in ("yes", "no"):
                raise InputError(
                    f"{questions.files[0]}, row {row}, column {task.target!r}: {answer!r} is neither yes nor no"
                )
    if task.cluster_size is not None:
        keys = zip(*(questions.values(column) for column in task.cluster), strict=True)
        for key, count in Counter(list(keys)[:limit]).items():
            if count != task.cluster_size:
                cause = f"; limit {limit} may cut a group in two" if limit else ""
                raise InputError(
                    f"{questions.files[0]}: {' / '.join(task.cluster)} {key} has {count} rows, not {task.cluster_size}{cause}"
                )


def _load_tasks(suite: Suite) -> dict[str, Any]:
    """lmms-eval's task objects by name."""
    from lmms_eval.tasks import get_task_dict
    from lmms_eval.utils import load_yaml_config

    from eval_suites.chat_model import generation_settings

    manager = _task_manager()
    for name, task in suite.tasks.items():
        entry = manager.task_index.get(name)
        if entry is None or entry["type"] != "task":
            kind = (
                "lmms-eval has no such task"
                if entry is None
                else f"is a {entry['type']} of tasks: name them one by one"
            )
            raise InputError(f"suite {suite.name}: {name!r}: {kind}")
        _check_against_task(f"suite {suite.name}: {name}", task, load_yaml_config(entry["yaml_path"], mode="full"))
    tasks = get_task_dict(list(suite.tasks), manager, "chat")
    for name, task in suite.tasks.items():
        try:
            generation_settings(tasks[name].config.generation_kwargs, task.generation)
        except InputError as error:
            raise InputError(f"suite {suite.name}: {name}: {error}") from None
    return {name: tasks[name] for name in suite.tasks}


@functools.cache
def _task_manager() -> Any:
    """lmms-eval's index of its tasks: some thousand YAML files, seconds to read."""
    from lmms_eval.tasks import TaskManager

    return TaskManager()


def _check_against_task(where: str, task: BenchmarkTask, config: Mapping[str, Any]) -> None:
    """The suite must speak of the files and figures that the task's own definition names."""
    table = task.tables[0]
    split = config.get("test_split") or config.get("validation_split") or ""
    own = (config["dataset_path"], config.get("dataset_name"), split.strip())
    if (table.repository, table.configuration, table.split) != own:
        raise InputError(
            f"{where}: its questions are in {own} (repository, configuration, split), not where the suite says"
        )
    known = [metric["metric"] for metric in config["metric_list"]]
    for metric in task.metrics:
        if metric not in known:
            raise InputError(f"{where}: has no metric {metric!r} (it has: {', '.join(known)})")


def _load_model(folder: Path, run: Run) -> "ChatLlava":
    import torch

    from eval_suites.chat_model import ChatLlava

    return ChatLlava(folder, getattr(torch, run.config["dtype"]), run.config["attention"], run.config["batch_size"])


def _picture_ids(name: str, task: Any, limit: int | None, terminal: Any) -> list[list[str]]:
    """Per question, the `picture_id` of each picture that the model will be shown."""
    from eval_suites.chat_model import picture_parts

    docs = task.eval_docs
    wanted = range(min(len(docs), limit or len(docs)))
    bar = tqdm(wanted, desc=f"{name}: looking at the pictures", file=terminal, dynamic_ncols=True, leave=False, delay=2)
    return [[picture_id(part["url"]) for part in picture_parts(task.doc_to_messages(docs[doc_id]))] for doc_id in bar]


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[Any]:
    """Send the chatter of lmms-eval and `datasets` to a file. Yields the terminal, for our own progress bar."""
    import datasets
    from loguru import logger

    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stderr
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for module in ("lmms_eval", "utils"):  # a task's own code runs under the name of its file: utils
        logger.disable(module)
    try:
        with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            yield terminal
    finally:
        for module in ("lmms_eval", "utils"):
            logger.enable(module)
        if not bars:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- answering and scoring


def _answer_and_score(
    run: Run,
    suite: Suite,
    config: EvalConfig,
    model: "ChatLlava",
    loaded: dict[str, Any],
    ids: dict[str, list[list[str]]],
    progress: tqdm,
) -> None:
    from lmms_eval.evaluator import simple_evaluate

    from eval_suites.chat_model import AnswerLog, Sitting

    results, seconds = {}, {}
    write_json(run.folder / "run.json", run.claim)
    for name, spec in suite.tasks.items():
        started = time.monotonic()
        task = loaded[name]
        progress.set_description(f"{run.pictures} pictures, {name}")
        log = AnswerLog(run.folder / f"answers-{name}.jsonl")
        model.sitting = Sitting(
            _swap(run.pictures, name, task, ids[name], model, config.seed), spec.generation, log, progress
        )
        output = simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=_task_manager(),
            limit=config.limit,
            bootstrap_iters=0,
            process_docs_parallel=1,
            # Where a task may write files, and that scoring needs no pictures unless the task says so.
            cli_args=argparse.Namespace(
                output_path=str(run.folder), process_with_media=bool(task.config.process_results_use_image)
            ),
        )
        records = _records(name, spec, task.eval_docs_no_media, output["samples"][name], ids[name])
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_bytes(run.folder / f"{name}.jsonl", "".join(lines).encode())
        results[name] = {**_figures(name, spec, output["results"][name]), "n": len(records)}
        seconds[name] = round(time.monotonic() - started, 2)
    write_json(run.folder / "results.json", results)
    outputs = {"results": results, "seconds": seconds, "model": str(config.model), "data": str(config.data)}
    write_manifest(run.folder, "eval", run.config, run.inputs, outputs)


def _swap(pictures: Pictures, name: str, task: Any, ids: list[list[str]], model: "ChatLlava", seed: int) -> Swap:
    """What to show in place of each picture of a task."""
    from eval_suites.chat_model import picture_parts

    if pictures == "real":
        return own
    if pictures == "blank":
        return blank(model.mean_colour)

    def load(doc_id: int, position: int) -> Any:
        return picture_parts(task.doc_to_messages(task.eval_docs[doc_id]))[position]["url"]

    return shuffled(ids, load, f"{seed} {name}")


def _records(
    name: str, spec: BenchmarkTask, docs: Any, samples: Sequence[Mapping[str, Any]], ids: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """One row per question, in order. `samples` are lmms-eval's: answers, and what the task's scoring said of each."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in samples] != list(range(len(ids))):
        raise RuntimeError(f"{name}: lmms-eval scored {len(samples)} of {len(ids)} questions")
    rows = []
    for sample, of_question in zip(samples, ids, strict=True):
        doc_id = sample["doc_id"]
        doc = docs[doc_id]
        target = doc[spec.target]
        cluster = [str(doc[column]) for column in spec.cluster] or list(of_question) or [f"question {doc_id}"]
        rows.append(
            {
                "task": name,
                "doc_id": doc_id,
                "cluster": " / ".join(cluster),
                "category": str(doc[spec.category]) if spec.category else "",
                "question": str(doc["question"]).strip(),
                "target": " / ".join(dict.fromkeys(target)) if isinstance(target, list) else str(target),
                "answer": sample["filtered_resps"][0],
                "score": _score(name, doc_id, spec, sample),
            }
        )
    return rows


def _score(name: str, doc_id: int, spec: BenchmarkTask, sample: Mapping[str, Any]) -> float:
    value = next((sample[key] for key in spec.score if key in sample), None)
    if isinstance(value, dict):
        value = value["score"]
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RuntimeError(f"{name}, doc_id {doc_id}: the task gave {value!r} under {spec.score}, not a score of 0-1")
    return float(value)


def _figures(name: str, spec: BenchmarkTask, results: Mapping[str, Any]) -> dict[str, float]:
    """lmms-eval's aggregated values, by metric; one that no question counts for is left out."""
    values = {metric: results.get(f"{metric},none") for metric in spec.metrics}
    figures = {metric: float(value) for metric, value in values.items() if value is not None}
    if spec.primary not in figures:
        raise RuntimeError(f"{name}: lmms-eval gave no {spec.primary!r}")
    return figures
