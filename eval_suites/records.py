"""The finished runs of a tower, read from their folders and checked: what a comparison starts from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from clips_core.errors import InputError
from clips_core.folders import first_difference, read_json, read_manifest
from eval_suites.benchmarks import Suite, model_fingerprint

PICTURES = ("real", "blank", "shuffled")

Key = tuple[str, int]  # task, doc_id


@dataclass(frozen=True)
class Entry:
    """The folders of one training of a tower's LLaVA, all finished. A tower may have several trainings, of different seeds."""

    name: str  # the tower's
    tower: Path | None  # pretraining run; None: the tower was not pretrained here
    align: Path | None  # stage 1
    tune: Path | None  # stage 2; neither: the model was not trained here
    real: Path  # evaluations: with each question's own picture,
    blank: Path | None = None  # with a blank one,
    shuffled: Path | None = None  # with another question's
    seed: int = 0

    @classmethod
    def of(cls, folder: Path, name: str | None = None, seed: int = 0) -> "Entry":
        """What there is of `folder/{tower,align,tune,eval/real,eval/blank,eval/shuffled}`, under the folder's name."""
        places = {field: folder / field for field in ("tower", "align", "tune")}
        places |= {pictures: folder / "eval" / pictures for pictures in PICTURES}
        found = {field: path if path.is_dir() else None for field, path in places.items() if field != "real"}
        return cls(name or folder.name, real=places["real"], seed=seed, **found)


def entries_of(folder: Path) -> list[Entry]:
    """The trainings of one tower: `folder/seed0`, `folder/seed1`, … as `study towers` leaves them, or `folder` itself.

    The pretraining run is `folder/tower`, or where the tower was pretrained anew for each seed, `folder/seed0/tower`, ….
    """
    seeds = {int(path.name.removeprefix("seed")): path for path in folder.glob("seed*") if path.name[4:].isdigit()}
    if not seeds:
        return [Entry.of(folder)]
    shared = folder / "tower" if (folder / "tower").is_dir() else None
    found = [Entry.of(path, folder.name, seed) for seed, path in sorted(seeds.items())]
    return [replace(entry, tower=entry.tower or shared) for entry in found]


@dataclass(frozen=True)
class Record:
    """One answered question."""

    task: str
    doc_id: int  # row of the benchmark's file
    cluster: str  # shared by the questions of the task that share a picture
    category: str
    question: str
    target: str
    answer: str
    score: Annotated[float, Field(ge=0, le=1)]

    @property
    def right(self) -> bool:
        return self.score >= 0.5


@dataclass(frozen=True)
class Run:
    """All that was read of one `Entry`."""

    entry: Entry
    manifests: dict[str, dict[str, Any]]  # by field of `Entry`
    zero_shot: dict[str, Any] | None  # None: no pretraining run, or it had no held-out pictures
    records: dict[str, dict[Key, Record]]  # by pictures shown, the right ones among them
    metrics: dict[str, dict[str, dict[str, Any]]]  # by pictures shown and task: lmms-eval's own figures
    logs: dict[str, list[dict[str, Any]]]  # tower, align, tune: the rows of metrics.jsonl

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def seed(self) -> int:
        return self.entry.seed

    @cached_property
    def suite(self) -> Suite:
        """What was asked, as the evaluation with the right pictures recorded it."""
        try:
            return TypeAdapter(Suite).validate_python(self.manifests["real"]["config"].get("suite"))
        except ValidationError as error:
            raise InputError(
                f"{self.entry.real}: its manifest holds no suite that this version reads ({error})"
            ) from None

    @cached_property
    def llava(self) -> Path | None:
        """The LLaVA's folder; where stage 2 kept its adapter alone, that of stage 1, whose tower it left as it was."""
        stages = [folder / "model" for folder in (self.entry.tune, self.entry.align) if folder is not None]
        return next((folder for folder in stages if (folder / "config.json").is_file()), None)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage that recorded them, by field of `Entry`."""
        found = {}
        for field, manifest in self.manifests.items():
            logged = [row["seconds"] for row in self.logs.get(field, []) if "seconds" in row]
            value = manifest["outputs"].get("seconds", logged[-1] if logged else None)
            if value is not None:
                found[field] = float(sum(value.values()) if isinstance(value, dict) else value)
        return found


def read_run(entry: Entry) -> Run:
    """Everything in the folders of `entry`.

    Raises:
        InputError: if a folder is missing, unfinished or another stage's, shows other pictures than it should, or holds a
            malformed file (naming it and the line).
    """
    stages = {"tower": "pretrain", "align": "align", "tune": "tune", **dict.fromkeys(PICTURES, "eval")}
    folders = {field: getattr(entry, field) for field in stages if getattr(entry, field) is not None}
    manifests = {field: read_manifest(folder, stages[field]) for field, folder in folders.items()}
    _check_chain(entry, manifests)
    shown = [pictures for pictures in PICTURES if pictures in folders]
    # Without the weights (of a bundle) what was recorded of them must do: all evaluations are of one model.
    weights = entry.tune is not None and any(
        path for kind in ("model", "adapter") for path in (entry.tune / kind).glob("*.safetensors")
    )
    model = model_fingerprint(entry.tune) if entry.tune and weights else manifests["real"]["inputs"].get("model")
    for pictures in shown:
        manifest, folder = manifests[pictures], folders[pictures]
        if manifest["config"].get("pictures") != pictures:
            raise InputError(
                f"{folder}: evaluated with {manifest['config'].get('pictures')} pictures; {pictures} ones are needed"
            )
        if manifest["inputs"].get("model") != model:
            raise InputError(
                f"{folder}: answered by another model than that of {entry.tune or entry.real}; evaluate this one"
            )
    zero_shot = None if entry.tower is None else entry.tower / "zero_shot.json"
    evaluations = {pictures: _read_evaluation(folders[pictures]) for pictures in shown}
    return Run(
        entry,
        manifests,
        read_json(zero_shot) if zero_shot is not None and zero_shot.exists() else None,
        {pictures: records for pictures, (records, _) in evaluations.items()},
        {pictures: metrics for pictures, (_, metrics) in evaluations.items()},
        {
            field: _read_jsonl(folders[field] / "metrics.jsonl")
            for field in ("tower", "align", "tune")
            if field in folders
        },
    )


def _check_chain(entry: Entry, manifests: dict[str, dict[str, Any]]) -> None:
    """Raise an `InputError` unless stage 1 was trained on this tower and stage 2 on this stage 1, by the weights' hashes."""
    if "tower" in manifests and "align" in manifests:
        tower = manifests["tower"]["weights"].get("export/hf/model.safetensors")
        if manifests["align"]["inputs"].get("tower") != tower:
            raise InputError(
                f"{entry.align}: trained with another tower than {entry.tower}; run stage 1 again with this one"
            )
    if "align" in manifests and "tune" in manifests:
        aligned = _model_hash(manifests["align"]["weights"])
        if manifests["tune"]["inputs"].get("align") != aligned:
            raise InputError(
                f"{entry.tune}: goes on from another stage 1 than {entry.align}; run stage 2 again from this one"
            )


def _model_hash(weights: Mapping[str, str]) -> str | None:
    """`llava_bridge.llm.weight_hash` of a stage's model, from what its manifest recorded."""
    whole = weights.get("model/model.safetensors")
    parts = [digest for name, digest in sorted(weights.items()) if name.startswith("model/model-")]
    return whole or (hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None)


def check_same_questions(runs: Sequence[Run]) -> None:
    """Raise an `InputError`, naming what differs first, unless all runs answered the same questions in the same way."""
    first, settings = runs[0].records["real"], _settings(runs[0], "real")
    for run, pictures in ((own, shown) for own in runs for shown in own.records):
        other = run.records[pictures]
        folders = f"{runs[0].entry.real} and {getattr(run.entry, pictures)}"
        difference = first_difference(settings, _settings(run, pictures))
        if difference is not None:
            raise InputError(f"{folders} were evaluated differently ({difference})")
        for task, doc_id in sorted(first.keys() ^ other.keys())[:1]:
            raise InputError(f"{folders} do not hold the same questions: {task} {doc_id} is in one of them only")
        for (task, doc_id), record in first.items():
            for field in ("question", "target", "cluster"):
                a, b = getattr(record, field), getattr(other[task, doc_id], field)
                if a != b:
                    raise InputError(f"{folders} differ in the {field} of {task} {doc_id}: {a!r} and {b!r}")


# How answers were computed: these may be waived by name (`eval_suites.fairness`), unlike what was asked.
COMPUTED = ("batch_size", "dtype", "attention", "device", "lmms_eval", "prompts", "exact", "model_args", "batch_check")


def _settings(run: Run, pictures: str) -> dict[str, Any]:
    """What was asked in an evaluation, but for the pictures shown."""
    manifest = run.manifests[pictures]
    config = {key: value for key, value in manifest["config"].items() if key not in ("pictures", *COMPUTED)}
    tasks = {name: {**task, "generation": None} for name, task in config.get("suite", {}).get("tasks", {}).items()}
    return {**config, "suite": {**config.get("suite", {}), "tasks": tasks}, "data": manifest["inputs"].get("data")}


def _read_evaluation(folder: Path) -> tuple[dict[Key, Record], dict[str, dict[str, Any]]]:
    """Records by key, and lmms-eval's own figures by task."""
    metrics = read_json(folder / "results.json")
    validator = TypeAdapter(Record)
    records: dict[Key, Record] = {}
    for task in metrics:
        path = folder / f"{task}.jsonl"
        for number, row in enumerate(_read_jsonl(path), start=1):
            if "score" in row and row["score"] is None:
                continue  # counts for no figure of its own: a video beside pictures, or a task that has its figure alone
            try:
                record = validator.validate_python(row)
            except ValidationError as error:
                problem = error.errors()[0]
                key = ".".join(map(str, problem["loc"]))
                raise InputError(f"{path}, line {number}, {key}: {problem['msg']}; run the evaluation again") from None
            if (record.task, record.doc_id) in records:
                raise InputError(f"{path}, line {number}: a second answer to question {record.doc_id}")
            records[record.task, record.doc_id] = record
    if not records:
        raise InputError(f"{folder}: holds no answered question")
    return records, metrics


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not a JSON object ({error})") from None
    return rows
