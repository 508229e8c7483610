"""MLLM benchmarks: lmms-eval's own task code, on files of this machine, answered by our own model class.

Prompts, scoring and aggregation are lmms-eval's, unmodified. What is ours: the model (`chat_model.py`), which raises where
others score an empty answer; the check of the files before the first question (`local_data.py`); the blank and shuffled
pictures that tell looking from guessing (`pictures.py`); answers that survive a kill; one record per question.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, load_config, to_dict
from clips_core.errors import InputError
from clips_core.folders import (
    MANIFEST,
    claimed,
    first_difference,
    is_finished,
    read_json,
    read_manifest,
    sha256_file,
    write_bytes,
    write_json,
    write_manifest,
)
from eval_suites import definitions
from eval_suites.answering import AnswerLog, Part, alone, answer_all, batches, check_batches, evenly, this_part
from eval_suites.cider import cider
from eval_suites.local_data import Found, Table, check, find, fingerprint, working_from, wrong_counts
from eval_suites.needs import Need, unmet
from eval_suites.pictures import Pictures, Swap, blank, own, picture_id, shuffled
from llava_bridge.config import Precision
from llava_bridge.hub import WEIGHTS, download, is_repository

if TYPE_CHECKING:
    import torch

    from eval_suites.chat_model import ChatLlava, LmmsModel

LMMS_EVAL = "0.7.3"  # what the tasks ask and how they score changes between versions
INSTALL = f"pip install -r requirements/eval.txt && pip install --no-deps lmms-eval=={LMMS_EVAL}"
SUITES = Path(__file__).parent / "suites"
CATALOGUE = Path(__file__).parent / "catalogue" / "tasks.yaml"
ATTENTION = "sdpa"
ADAPTER = "adapter_config.json"  # PEFT's
UNKNOWN = "unknown"  # a setting that nobody told us


@dataclass(config=FORBID)
class BenchmarkTask:
    """How a suite uses one of lmms-eval's tasks.

    What a suite leaves out is taken from `catalogue/tasks.yaml` if the task stands there, then from lmms-eval's definition.
    """

    tables: list[Table] = field(default_factory=list)
    """What the task reads; the first holds the questions."""
    metrics: list[str] = field(default_factory=list)
    """lmms-eval's names of the figures to report."""
    primary: str = ""
    """The one of them that stands for the task; the first, if left out."""
    score: list[str] = field(default_factory=list)
    """Where the task's `process_results` keeps a question's score: the first of these keys that it returns. A question with
    none of them has no score, since it does not count for these figures. Empty: the primary's, if that is a score of 0-1
    for every question; else no question has one, and no paired test can be made of the task."""
    scored: Literal["value", "aggregate", "cider"] = "value"
    """What is kept there. value: the score of 0-1 itself. aggregate: what the task's own aggregation makes a score of, given
    this question alone. cider: a caption, whose score is its CIDEr / 10 (CIDEr goes from 0 to 10)."""
    answers: Literal["yes/no", "open"] = "open"
    target: str | None = None
    """Column with the right answer; None: what the task's definition says."""
    category: str | None = None
    """Column by which results can be told apart, `column.field` if that holds several; where a file lacks it, they are not."""
    cluster: list[str] = field(default_factory=list)
    """Columns that say which questions belong together; empty: those that show the same picture."""
    cluster_size: int | None = None
    """Set where the task's score needs clusters of exactly this size."""
    generation: dict[str, int | float | str | bool | list[str] | None] = field(default_factory=dict)
    """Settings that overrule the task's own; null drops one."""
    task: str | None = None
    """lmms-eval's name of the task, where the suite's is another because of `prompt`; None: the same."""
    prompt: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Prompt settings (the definition's `lmms_eval_specific_kwargs`) that overrule the task's own."""
    version: str = "unknown"
    """The task's version by its definition. Another one is refused; unknown: not looked at."""
    judge: bool = False
    """Answers are scored by a judge: they have no score until `eval judge` has asked one."""
    needs: list[Need] = field(default_factory=list)
    """What its scoring needs beside lmms-eval."""


@dataclass(config=FORBID)
class Stated:
    """What a publication says of how the numbers of a column were made. `unknown`: it does not say."""

    lmms_eval: str = "unknown"
    version: str = "unknown"  # of the task
    split: str = "unknown"
    metric: str = "unknown"
    prompt: str = "unknown"
    generation: str = "unknown"
    image_mode: str = "unknown"  # how a picture becomes square
    resolution: str = "unknown"


@dataclass(config=FORBID)
class Column:
    """A column of a published table: the figure of ours that stands for it."""

    task: str
    metric: str
    scale: float = 1.0
    """The table's number is this times lmms-eval's."""
    source: Stated = field(default_factory=Stated)


@dataclass(config=FORBID)
class Suite:
    """A set of tasks by lmms-eval's names. Suites are data: see the YAML files in `suites/`."""

    name: str
    tasks: dict[str, BenchmarkTask]
    columns: dict[str, Column] = field(default_factory=dict)
    """A published table's columns by the names that it gives them."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions of each task, unless the run says otherwise."""


@dataclass(config=FORBID)
class EvalConfig:
    """Let one model answer a suite, with one or several kinds of pictures."""

    model: Path | str
    """A stock transformers LLaVA (config, weights, processor with chat template; LlavaNext too): its folder, a run folder of
    stage 1 or 2 (its adapter is merged), a LoRA adapter's in PEFT's layout, or ORG/NAME[@REVISION] on the hub. Or lmms:NAME,
    of lmms-eval's own models."""
    data: Path
    """Folder that mirrors the hub: `lmms-lab-encoder/POPE/…parquet`."""
    out: Path
    """Each kind of pictures gets its folder in here."""
    suite: str = "demo"
    """The name of a suite that comes with the package, or a YAML file."""
    pictures: list[Pictures] = field(default_factory=lambda: ["real"])
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions of each task."""
    partial: bool = False
    """Take files that do not hold the published number of questions; how many they held is on record."""
    batch_size: int = Field(default=32, ge=1)
    exact: bool = False
    """Answer one question at a time: in bfloat16 too, no answer then depends on another question."""
    precision: Precision = "auto"
    """auto: bfloat16 where the hardware multiplies it. In float32 an answer does not depend on the batch it was made in."""
    batch_check: int = Field(default=32, ge=0)
    """Questions of each task that are answered alone besides, unless in float32 or `exact`: the share of answers that the
    batch changes is part of the results. 0: none."""
    seed: int = 0
    """Of the shuffled pictures. Answers are greedy."""
    part: str | None = None
    """i/n: answer every n-th batch only; whichever process ends last scores. null: RANK/WORLD_SIZE as torchrun sets them."""
    model_args: str = ""
    """Of an lmms:NAME, as lmms-eval's --model_args: key=value,key=value."""


class Source(NamedTuple):
    """The model that is asked: a LLaVA's folder, with an adapter or without, or a name in lmms-eval's registry."""

    folder: Path | None
    name: str = ""
    arguments: str = ""
    adapter: Path | None = None
    """A LoRA adapter's folder, to be merged into the LLaVA; None: the LLaVA is whole."""


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
    answers as they were made) and last `manifest.json`. A run that was stopped goes on with the next unanswered batch. Several
    processes may share the questions: each answers its part of the batches, and the last one scores.

    Raises:
        InputError: for bad input, before the first question.
    """
    if (version := _lmms_eval_version()) != LMMS_EVAL:
        raise InputError(f"lmms-eval {LMMS_EVAL} is needed, found {version or 'none'}; run: {INSTALL}")
    part = this_part(config.part)
    suite = load_suite(config.suite)
    config = replace(config, limit=config.limit or suite.limit)
    source = find_model(config)
    data, out = (Path(path).resolve() for path in (config.data, config.out))
    tables = {name: [find(data, table) for table in task.tables] for name, task in suite.tasks.items()}
    inputs = {
        "model": _fingerprint(source),
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
    partial = other_counts(suite, tables, dict.fromkeys(suite.tasks, config.limit), config.partial)

    import_lmms_eval()
    device = _device()
    cache = out / ".cache" / inputs["data"][:16]
    with alone(), quiet(out / "lmms_eval.log") as terminal:
        model = _load_model(source, runs[0], device)
        with working_from(data, cache):
            loaded = load_tasks(suite)
            ids = {name: picture_ids(name, task, config.limit, terminal) for name, task in loaded.items()}
            sittings = [_sitting(run, suite, config, model, loaded, ids, part) for run in runs]
            with tqdm(
                total=sum(sitting.share for sitting in sittings),
                unit=" questions", file=terminal, dynamic_ncols=True, smoothing=0.05,
            ) as progress:  # fmt: skip
                for sitting in sittings:
                    _answer(sitting, model, progress)
            for sitting in sittings:
                _score_when_answered(sitting, suite, config, loaded, ids, partial, terminal)
    if all(is_finished(run.folder, "eval", run.config, run.inputs) for run in runs):
        shutil.rmtree(out / ".cache", ignore_errors=True)  # of the last of several processes
    return out


def suite_of(manifest: Mapping[str, Any], folder: Path) -> Suite:
    """What an evaluation asked, as its manifest recorded it.

    Raises:
        InputError: if another version wrote it.
    """
    try:
        return TypeAdapter(Suite).validate_python(manifest["config"].get("suite"))
    except ValidationError as error:
        raise InputError(f"{folder}: its manifest holds no suite that this version reads ({error})") from None


def find_model(config: EvalConfig) -> Source:
    """Where the model of a run is; one of the hub is fetched, or taken from its cache.

    Raises:
        InputError: if it is nowhere.
    """
    name = str(config.model)
    if name.startswith("lmms:"):
        if set(config.pictures) != {"real"}:
            raise InputError(
                f"{name}: lmms-eval's own models are shown the questions' own pictures: set pictures=[real]"
            )
        return Source(None, name.removeprefix("lmms:"), config.model_args)
    if config.model_args:
        raise InputError(f"model_args {config.model_args!r} are of an lmms:NAME, and the model is {name}")
    path = Path(name)
    if not (path / ADAPTER).is_file():
        return Source(_model_folder(name))
    if (path.resolve().parent / MANIFEST).is_file():  # stage 2 wrote it, which knows the model beneath
        return Source(path.resolve().parent)
    settings = read_json(path / ADAPTER)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base or not (path / "adapter_model.safetensors").is_file():
        lacking = (
            "adapter_model.safetensors beside it"
            if base
            else "base_model_name_or_path, the LLaVA that it was trained on"
        )
        raise InputError(f"{path / ADAPTER}: no {lacking}")
    return Source(_model_folder(str(base)), adapter=path.resolve())


def _model_folder(name: str) -> Path:
    """A folder as it is; a model of the hub is fetched, or taken from its cache."""
    if not Path(name).exists() and is_repository(name):
        return download(name, ("*.json", "*.jinja", "*.model", "*.txt"), [WEIGHTS[0]]).resolve()
    return Path(name).resolve()


def load_suite(name: str) -> Suite:
    """A suite by its name or its YAML file, with all that it leaves out filled in."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else SUITES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(suite.stem for suite in SUITES.glob("*.yaml")))
        raise InputError(f"suite {name!r}: no such file; name a .yaml file or one of {shipped}")
    suite = load_config(Suite, path)
    if not suite.tasks:
        raise InputError(f"{path}: names no task")
    known = load_config(Suite, CATALOGUE).tasks
    suite.tasks = {name: _filled_in(f"{path}: {name}", name, task, known) for name, task in suite.tasks.items()}
    for task_name, task in suite.tasks.items():
        if task.primary not in task.metrics:
            raise InputError(f"{path}: {task_name}: primary {task.primary!r} is not among its metrics")
    for column_name, column in suite.columns.items():
        if column.task not in suite.tasks:
            raise InputError(f"{path}: column {column_name!r}: {column.task!r} is not among the suite's tasks")
        if column.metric not in suite.tasks[column.task].metrics:
            raise InputError(f"{path}: column {column_name!r}: {column.task} reports no {column.metric!r}")
    return suite


def _filled_in(where: str, name: str, task: BenchmarkTask, known: Mapping[str, BenchmarkTask]) -> BenchmarkTask:
    """The task with what it leaves out: from the catalogue, then from lmms-eval's definition."""
    if (entry := known.get(name) or known.get(task.task or name)) is not None:
        empty = BenchmarkTask()
        left_out = [key for key in vars(empty) if not key.startswith("_") and getattr(task, key) == getattr(empty, key)]
        task = replace(task, **{key: getattr(entry, key) for key in left_out})
    if not task.tables or not task.metrics:
        if _lmms_eval_version() != LMMS_EVAL:
            raise InputError(f"{where}: lmms-eval {LMMS_EVAL} is needed to look its definition up; run: {INSTALL}")
        task = definitions.completed(where, name, task)
    return replace(task, primary=task.primary or task.metrics[0])


def model_fingerprint(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of a model folder's files; a run folder's model is the one that it holds.

    Raises:
        InputError: if a file is missing, or the weights are not those that the run which made them wrote.
    """
    if (folder / MANIFEST).is_file() and (folder / "adapter").is_dir():
        manifest = read_manifest(folder, "tune")
        files = sorted(path for path in (folder / "adapter").iterdir() if path.is_file())
        hashes = {f"adapter/{path.name}": sha256_file(path) for path in files}
        _check_written(folder, hashes, manifest)
        stage_1 = str(manifest["inputs"].get("align"))
        return hashlib.sha256(json.dumps({**hashes, "stage 1": stage_1}).encode()).hexdigest()
    if not (folder / "config.json").is_file() and (folder / MANIFEST).is_file():
        folder = folder / "model"
    needed = ("config.json", "generation_config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.safetensors")):
        lacking = missing[0] if missing else "*.safetensors"
        raise InputError(f"model folder {folder}: no {lacking}; a stock transformers LLaVA folder is needed")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("llava", "llava_next"):
        raise InputError(f"{folder}/config.json: model_type is {kind!r}, but 'llava' or 'llava_next' is needed")
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    written = folder.parent / MANIFEST
    if written.is_file():
        _check_written(
            folder.parent, {f"{folder.name}/{name}": digest for name, digest in hashes.items()}, read_json(written)
        )
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _check_written(run: Path, hashes: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
    """Raise an `InputError` unless the weights among the files are those that the run wrote."""
    written = manifest.get("weights", {})
    for name, digest in hashes.items():
        if written.get(name, digest) != digest:
            raise InputError(f"{run / name}: not the weights that {run / MANIFEST} tells of; make them again")


def _fingerprint(source: Source) -> str:
    """As `model_fingerprint`; of one of lmms-eval's models by its name, its arguments and the folders that these name."""
    if source.folder is not None:
        model = model_fingerprint(source.folder)
        if source.adapter is None:
            return model
        hashes = {name: sha256_file(source.adapter / name) for name in (ADAPTER, "adapter_model.safetensors")}
        return hashlib.sha256(json.dumps({**hashes, "model": model}).encode()).hexdigest()
    values = [part.partition("=")[2] for part in source.arguments.split(",")]
    files = sorted(
        path for value in values if Path(value).is_dir() for path in Path(value).rglob("*") if path.is_file()
    )
    told = [source.name, source.arguments, [[path.name, sha256_file(path)] for path in files]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _lmms_eval_version() -> str | None:
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def import_lmms_eval() -> None:
    """Its own metadata does not name all that it imports."""
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise InputError(f"lmms-eval can't be imported ({error}); run: {INSTALL}") from None


# ------------------------------------------------------------------------------------------------ before the first question


def _run(pictures: Pictures, config: EvalConfig, suite: Suite, out: Path, inputs: dict[str, str]) -> Run:
    """The folder of one kind of pictures, and all that its answers depend on."""
    own = not str(config.model).startswith("lmms:")  # else these are matters of `model_args`
    depends = {
        "pictures": pictures,
        "limit": config.limit,
        "batch_size": 1 if config.exact else config.batch_size,
        "dtype": _dtype_name(config.precision) if own else UNKNOWN,
        "attention": ATTENTION if own else UNKNOWN,
        "device": _device().type,
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
    """What the task's scoring needs, and what it asserts about the questions, before they are answered."""
    if found := [*unmet(task.needs), *question_faults(task, questions, limit)]:
        raise InputError("\n".join(found))


def question_faults(task: BenchmarkTask, questions: Found, limit: int | None = None) -> Iterator[str]:
    """What the task's scoring would stumble over in the questions, one sentence a fault."""
    if task.answers == "yes/no":
        target = task.target or "answer"
        for row, answer in enumerate(questions.values(target)[:limit]):
            if str(answer).strip().lower() not in ("yes", "no"):
                yield f"{questions.files[0]}, row {row}, column {target!r}: {answer!r} is neither yes nor no"
                break
    if task.cluster_size is not None:
        keys = zip(*(questions.values(column) for column in task.cluster), strict=True)
        for key, count in Counter(list(keys)[:limit]).items():
            if count != task.cluster_size:
                cause = f"; limit {limit} may cut a group in two" if limit else ""
                yield (
                    f"{questions.files[0]}: {' / '.join(task.cluster)} {key} has {count} rows, not {task.cluster_size}{cause}"
                )
                break


def other_counts(
    suite: Suite, tables: Mapping[str, list[Found]], limits: Mapping[str, int | None], accepted: bool
) -> dict[str, list[int]]:
    """The tasks whose files do not hold the published number of questions: [have, published].

    Where only the first questions are asked, these must be there.

    Raises:
        InputError: if there are such tasks and they are not `accepted`: a download that was cut off must not give a figure.
    """
    found: dict[str, list[int]] = {}
    wrong: list[str] = []
    for name in suite.tasks:
        questions, limit = tables[name][0], limits[name]
        have, published = questions.rows, questions.table.rows
        if published is None or have == published or (limit is not None and limit <= min(have, published)):
            continue
        found[name] = [have, published]
        wrong += wrong_counts([questions])
    if wrong and not accepted:
        raise InputError(
            "\n".join(
                [
                    *dict.fromkeys(wrong),
                    "Fetch them again (clips-llava eval fetch), or set partial=true to ask what is there",
                ]
            )
        )
    return found


def load_tasks(suite: Suite) -> dict[str, Any]:
    """lmms-eval's task objects by name."""
    from eval_suites.chat_model import generation_settings

    for name, task in suite.tasks.items():
        where = f"suite {suite.name}: {name}"
        _check_against_task(where, task, definitions.definition(f"suite {suite.name}", task.task or name))
    tasks = definitions.load_tasks(f"suite {suite.name}", suite.tasks)
    for name, task in suite.tasks.items():
        try:
            generation_settings(tasks[name].config.generation_kwargs, task.generation)
        except InputError as error:
            raise InputError(f"suite {suite.name}: {name}: {error}") from None
    return tasks


def _check_against_task(where: str, task: BenchmarkTask, config: Mapping[str, Any]) -> None:
    """The suite must speak of the files and figures that the task's own definition names."""
    table = task.tables[0]
    own = (config["dataset_path"], config.get("dataset_name"), definitions.split_of(config))
    if (table.repository, table.configuration, table.split) != own:
        raise InputError(
            f"{where}: its questions are in {own} (repository, configuration, split), not where the suite says"
        )
    known = [metric["metric"] for metric in config["metric_list"]]
    for metric in task.metrics:
        if metric not in known:
            raise InputError(f"{where}: has no metric {metric!r} (it has: {', '.join(known)})")
    version = definitions.version_of(config)
    if task.version not in ("unknown", version):
        raise InputError(
            f"{where}: is of version {version} in lmms-eval {LMMS_EVAL}, but the suite says {task.version}"
        )


def _device() -> "torch.device":
    """This process's: the GPU that torchrun gave it, else the first, else the CPU."""
    import torch

    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _load_model(source: Source, run: Run, device: "torch.device") -> "ChatLlava | LmmsModel":
    import torch

    from eval_suites.chat_model import ChatLlava, LmmsModel

    if device.type == "cuda":
        torch.cuda.set_device(device)  # what a library means by "cuda"
    size = run.config["batch_size"]
    if source.folder is None:
        return LmmsModel(source.name, source.arguments, size, device)
    dtype = getattr(torch, run.config["dtype"])
    return ChatLlava(source.folder, dtype, run.config["attention"], size, device, source.adapter)


def picture_ids(name: str, task: Any, limit: int | None, terminal: Any) -> list[list[str]]:
    """Per question, the `picture_id` of each picture that the model will be shown."""
    from eval_suites.chat_model import picture_parts

    docs = task.eval_docs
    wanted = range(min(len(docs), limit or len(docs)))
    bar = tqdm(wanted, desc=f"{name}: looking at the pictures", file=terminal, dynamic_ncols=True, leave=False, delay=2)
    return [[picture_id(part["url"]) for part in picture_parts(task.doc_to_messages(docs[doc_id]))] for doc_id in bar]


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Any]:
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
        with (
            open(log, "a", encoding="utf-8") as file,
            contextlib.redirect_stderr(file),
            contextlib.redirect_stdout(file),
        ):
            yield terminal
    finally:
        for module in ("lmms_eval", "utils"):
            logger.enable(module)
        if not bars:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------- answering and scoring


class Questions(NamedTuple):
    """One task of a sitting, and what of it this process answers."""

    requests: list[Any]
    swap: Swap
    generation: dict[str, Any]
    log: AnswerLog
    batches: list[list[int]]
    checked: AnswerLog
    """Answers to a sample of the questions, each alone."""
    sample: list[int]
    """All processes' sample; empty where a batch changes no answer."""
    share: list[list[int]]
    """Of the sample, one by one, what this process answers."""


class Sitting(NamedTuple):
    """A run's questions by task."""

    run: Run
    tasks: dict[str, Questions]

    @property
    def share(self) -> int:
        """Answers that this process is to have."""
        return sum(sum(map(len, asked.batches)) + len(asked.share) for asked in self.tasks.values())


def _sitting(
    run: Run,
    suite: Suite,
    config: EvalConfig,
    model: "ChatLlava | LmmsModel",
    loaded: dict[str, Any],
    ids: dict[str, list[list[str]]],
    part: Part,
) -> Sitting:
    from eval_suites.chat_model import requests_of

    asked, size = _requested(model, suite, loaded), run.config["batch_size"]
    sampled = 0 if size == 1 or run.config["dtype"] == "float32" else config.batch_check
    tasks = {}
    for name, spec in suite.tasks.items():
        requests = requests_of(asked[name], config.limit)
        groups = batches(model.lengths(requests), size)
        sample = evenly([doc_id for group in groups for doc_id in group], sampled)
        tasks[name] = Questions(
            requests,
            _swap(run.pictures, name, loaded[name], ids[name], model, config.seed),
            spec.generation,
            AnswerLog(run.folder, f"answers-{name}", part),
            groups[part.index :: part.count],
            AnswerLog(run.folder, f"alone-{name}", part),
            sample,
            [[doc_id] for doc_id in sample[part.index :: part.count]],
        )
    return Sitting(run, tasks)


def _requested(model: "ChatLlava | LmmsModel", suite: Suite, loaded: dict[str, Any]) -> dict[str, Any]:
    """The tasks as the model's class wants to be asked, their questions made known to it."""
    from eval_suites.chat_model import LmmsModel

    registered = model.model if isinstance(model, LmmsModel) else model
    asked = loaded
    if registered.is_simple:
        asked = definitions.load_tasks(f"suite {suite.name}", suite.tasks, "simple")
    registered.task_dict |= {name: task.dataset for name, task in asked.items()}
    return asked


def _answer(sitting: Sitting, model: "ChatLlava | LmmsModel", progress: tqdm) -> None:
    """This process's part of a run."""
    write_json(sitting.run.folder / "run.json", sitting.run.claim)
    for name, asked in sitting.tasks.items():
        progress.set_description(f"{sitting.run.pictures} pictures, {name}")
        answer_all(asked.requests, model, asked.swap, asked.generation, asked.log, asked.batches, progress)
        answer_all(asked.requests, model, asked.swap, asked.generation, asked.checked, asked.share, progress)


def _score_when_answered(
    sitting: Sitting,
    suite: Suite,
    config: EvalConfig,
    loaded: dict[str, Any],
    ids: dict[str, list[list[str]]],
    partial: dict[str, list[int]],
    terminal: Any,
) -> None:
    """Score a run if all of its questions are answered; else other processes are still at it, and the last one does."""
    run = sitting.run
    with claimed(run.folder, wait=True, lock=".scoring.lock"):  # two processes may have ended in the same moment
        if is_finished(run.folder, "eval", run.config, run.inputs):
            return
        missing = 0
        for asked in sitting.tasks.values():
            asked.log.read()
            asked.checked.read()
            missing += len(asked.requests) - len(asked.log.answers)
            missing += len(set(asked.sample) - asked.checked.answers.keys())
        if missing:
            left = f"{missing} answers of other parts are missing; the part that ends last scores"
            print(f"{run.folder}: this part is done; {left}", file=terminal)
            return
        _score_run(sitting, suite, config, loaded, ids, partial)
        print(told(run.folder, suite, read_json(run.folder / "results.json"), partial), file=terminal)
    (run.folder / ".scoring.lock").unlink(missing_ok=True)


def _score_run(
    sitting: Sitting,
    suite: Suite,
    config: EvalConfig,
    loaded: dict[str, Any],
    ids: dict[str, list[list[str]]],
    partial: dict[str, list[int]],
) -> None:
    """Records, figures and manifest from the answers."""
    run = sitting.run
    results, seconds, checked = {}, {}, {}
    for name, spec in suite.tasks.items():
        asked, answers = sitting.tasks[name], sitting.tasks[name].log.answers
        figures = score_task(run, name, spec, loaded[name], asked.requests, answers, ids[name])
        if figures is not None:
            results[name] = figures
        seconds[name] = round(asked.log.seconds, 2)
        if asked.sample:
            alone_too = {doc_id: asked.checked.answers[doc_id] for doc_id in asked.sample}
            checked[name] = check_batches(answers, alone_too)
    write_json(run.folder / "results.json", results)
    outputs = {"results": results, "seconds": seconds, "batch_check": checked}
    outputs |= {"partial": partial, "model": str(config.model), "data": str(config.data)}
    write_manifest(run.folder, "eval", run.config, run.inputs, outputs)


def told(
    folder: Path, suite: Suite, results: Mapping[str, Mapping[str, float]], partial: Mapping[str, Sequence[int]]
) -> str:
    """The figures as lines for the terminal, and what is still to be done about the others."""
    lines = [f"{folder}:"]
    for name, task in suite.tasks.items():
        if name not in results:
            lines.append(f"  {name:20} waits for its judge: clips-llava eval judge {folder} --model … --endpoint …")
            continue
        figures = results[name]
        values = ", ".join(f"{metric} {figures[metric]:.4g}" for metric in task.metrics if metric in figures)
        whole = f" of {partial[name][1]:,}" if name in partial else ""
        lines.append(f"  {name:20} {values} ({figures['n']:,}{whole} questions)")
    return "\n".join(lines)


def score_task(
    run: Run,
    name: str,
    spec: BenchmarkTask,
    task: Any,
    requests: Sequence[Any],
    answers: Mapping[int, str],
    ids: Sequence[Sequence[str]],
) -> dict[str, float] | None:
    """Score the answers to the first questions of a task as lmms-eval does, and write `run.folder/<task>.jsonl`.

    Args:
        requests: lmms-eval's, one a question.
        answers: by doc_id, as many.
        ids: the `picture_id` of each question's pictures.

    Returns:
        lmms-eval's figures and `n`; None for a task that waits for its judge.
    """
    samples, figures = _scored(name, spec, task, requests, answers, run.folder)
    records = _records(name, spec, task.eval_docs_no_media, samples, ids, task.aggregation())
    made = {key: run.config[key] for key in ("batch_size", "dtype", "attention")}
    lines = (json.dumps({**record, **made}, ensure_ascii=False) + "\n" for record in records)
    write_bytes(run.folder / f"{name}.jsonl", "".join(lines).encode())
    return None if figures is None else {**_figures(name, spec, figures), "n": len(records)}


def _scored(
    name: str, spec: BenchmarkTask, task: Any, requests: Sequence[Any], answers: Mapping[int, str], folder: Path
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
    """What lmms-eval says of each answer, and its figures; of a task that a judge scores, the answers alone and None."""
    if spec.judge:
        return [
            {
                "doc_id": request.args[3],
                "filtered_resps": [answers[request.args[3]]],
                "target": task.doc_to_target(task.eval_docs_no_media[request.args[3]]),
                "arguments": [request.args[0]],
            }
            for request in requests
        ], None
    from lmms_eval.evaluator import simple_evaluate

    from eval_suites.chat_model import Answered

    definitions.forget_earlier_sums(task)
    output = simple_evaluate(
        model=Answered(answers),
        tasks=[task],
        task_manager=definitions.task_manager(),
        limit=len(requests),
        bootstrap_iters=0,
        process_docs_parallel=1,
        # Where a task may write files, and that scoring needs no pictures unless the task says so.
        cli_args=argparse.Namespace(
            output_path=str(folder), process_with_media=bool(task.config.process_results_use_image)
        ),
    )
    return output["samples"][name], output["results"][name]


def _swap(
    pictures: Pictures, name: str, task: Any, ids: list[list[str]], model: "ChatLlava | LmmsModel", seed: int
) -> Swap:
    """What to show in place of each picture of a task."""
    from eval_suites.chat_model import LmmsModel, picture_parts

    if pictures == "real":
        return own
    if pictures == "blank":
        assert not isinstance(model, LmmsModel)
        return blank(model.mean_colour)

    def load(doc_id: int, position: int) -> Any:
        return picture_parts(task.doc_to_messages(task.eval_docs[doc_id]))[position]["url"]

    return shuffled(ids, load, f"{seed} {name}")


def _records(
    name: str,
    spec: BenchmarkTask,
    docs: Any,
    samples: Sequence[Mapping[str, Any]],
    ids: Sequence[Sequence[str]],
    aggregation: Mapping[str, Callable[..., Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row per question, in order. `samples` are lmms-eval's: answers, and what the task's scoring said of each.

    `aggregation`: the task's own functions by metric, for questions that are scored by them. A `score` of None: the question has
    none, for it counts only as one of many, or not at all, or a judge has still to give it.
    """
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in samples] != list(range(len(ids))):
        raise RuntimeError(f"{name}: lmms-eval scored {len(samples)} of {len(ids)} questions")
    rows = []
    scores = _scores(name, spec, samples, aggregation or {})
    for sample, of_question, score in zip(samples, ids, scores, strict=True):
        doc_id = sample["doc_id"]
        doc = docs[doc_id]
        target = sample["target"] if spec.target is None else doc[spec.target]
        cluster = [str(doc[column]) for column in spec.cluster] or list(of_question) or [f"{name} question {doc_id}"]
        rows.append(
            {
                "task": name,
                "doc_id": doc_id,
                "cluster": " / ".join(cluster),
                "category": _category(doc, spec.category),
                # A task that asks the same of every picture has its question in the prompt alone.
                "question": str(doc["question"] if "question" in doc else sample["arguments"][0]).strip(),
                "target": " / ".join(dict.fromkeys(target)) if isinstance(target, list) else str(target),
                "answer": sample["filtered_resps"][0],
                "score": score,
            }
        )
    return rows


def _category(doc: Mapping[str, Any], path: str | None) -> str:
    value: Any = doc
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    return "" if value is None or path is None else str(value)


def _scores(
    name: str,
    spec: BenchmarkTask,
    samples: Sequence[Mapping[str, Any]],
    aggregation: Mapping[str, Callable[..., Any]],
) -> list[float | None]:
    """Each question's score of 0-1, or None."""
    if spec.judge:
        return [None] * len(samples)
    if spec.scored == "cider":
        return list(cider([sample[spec.primary] for sample in samples]))
    keys = spec.score or [spec.primary]
    scores = [
        _score(spec, next((key for key in keys if key in sample), None), sample, aggregation) for sample in samples
    ]
    wrong = [i for i, score in enumerate(scores) if not isinstance(score, float | None)]
    if wrong and not spec.score:  # nobody said that there are such scores
        return [None] * len(samples)
    if wrong or all(score is None for score in scores):
        i = wrong[0] if wrong else 0
        given = {key: samples[i].get(key) for key in keys}
        raise RuntimeError(f"{name}, doc_id {samples[i]['doc_id']}: the task gave {given}, not a score of 0-1")
    return scores


def _score(
    spec: BenchmarkTask, key: str | None, sample: Mapping[str, Any], aggregation: Mapping[str, Callable[..., Any]]
) -> Any:
    """A float of 0-1; None if the question counts for none of these figures; what was found, if it is something else."""
    if key is None:
        return None
    value = sample[key]
    if spec.scored == "aggregate":
        with contextlib.redirect_stdout(io.StringIO()):  # some print what they add up
            value = aggregation[key]([value])
    elif isinstance(value, dict):
        value = value.get("score", value)
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else {key: value}


def _figures(name: str, spec: BenchmarkTask, results: Mapping[str, Any]) -> dict[str, float]:
    """lmms-eval's aggregated values, by metric; one that no question counts for is left out."""
    filters = [key.rpartition(",")[2] for key in results if key.rpartition(",")[0] == spec.primary]
    values = {metric: results.get(f"{metric},{filters[0]}") for metric in spec.metrics if filters}
    figures = {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
    if spec.primary not in figures:
        raise RuntimeError(f"{name}: lmms-eval gave no {spec.primary!r}")
    return figures
