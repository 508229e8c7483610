"""Answers that a judge has to score: MM-Vet, and tasks of lmms-eval that ask a language model as it does.

`eval run` stores the answers; this asks the judge, behind an OpenAI-compatible endpoint. What the judge is asked, and what
becomes of its numbers, is the task's own code: its `process_results` runs unmodified, with our endpoint in the place of the
client that lmms-eval would make (whose failures score zero).
"""

import contextlib
import datetime
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.captioners import Endpoint, Outcome, Reply, check_endpoint, read_key
from clips_core.config import FORBID
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, read_manifest, write_bytes, write_json
from eval_suites.answering import drop_cut_line
from eval_suites.benchmarks import BenchmarkTask, Suite, import_lmms_eval, load_tasks, quiet, suite_of
from eval_suites.local_data import check, find, fingerprint, working_from

TRIES = 3  # of one question, before a judge that gives no number is an error
WARMER = 0.5  # added to the temperature of every further try, as MM-Vet's own code does
ANSWER = "{answer}"  # stands for the answer in the prompt that is recorded
IDENTITY = ("model", "answered_by", "prompt_sha256", "temperature")  # what makes a judge the same judge


@dataclass(config=FORBID)
class JudgeConfig:
    """Who judges which run."""

    run: Path
    """An evaluation's folder: of one kind of pictures, or the one that holds them."""
    model: Annotated[str, Field(min_length=1)]
    """The name that the server knows the judge by."""
    endpoint: str
    """The server's address up to /v1; questions, references and answers are sent there."""
    repeats: int = Field(default=3, ge=1)
    """How often every answer is judged: their spread shows what a score owes to the judge's mood."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is MM-Vet's; a server that is deterministic then repeats itself."""
    max_new_tokens: int = Field(default=128, ge=1)
    """MM-Vet's; a judge that thinks aloud needs more."""
    data: Path | None = None
    """The benchmarks' files; null: where the run read them."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=300.0, gt=0)
    """Seconds for one reply."""
    retries: int = Field(default=5, ge=0)
    retry_wait: float = Field(default=1.0, gt=0)
    """Seconds before the second try after an error that may pass; doubles up to 60."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More keys of the request's JSON; null removes one."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint)


@plain_dataclass(eq=False)
class Verdict:
    """One answer to be judged once."""

    doc_id: int
    repeat: int
    messages: list[dict[str, Any]]
    replies: list[str] = field(default_factory=list)
    """All that the judge said, the last of which counts."""
    answered_by: str = ""

    @property
    def batch(self) -> int:
        """Nothing here is asked in batches."""
        return self.doc_id

    def read(self) -> Outcome:
        raise NotImplementedError("a verdict has no picture")


def judge(config: JudgeConfig) -> list[Path]:
    """Judge the answers of a run; returns the evaluation folders, whose records and results now hold the scores.

    Every reply is kept in `judge-<task>.jsonl` as it comes, so that a stopped run goes on. A record's score is the mean over
    the repeats; the manifest's `outputs.judge` says who judged, when, with what prompt, and how far the judge differed from itself.

    Raises:
        InputError: if there is nothing to judge, other files than the run's are there, another judge has begun, the
            server can't be asked, or it gives no number for an answer.
    """
    folders = [config.run, *sorted(path for path in config.run.glob("*") if path.is_dir())]
    folders = [folder for folder in folders if (folder / MANIFEST).is_file()]
    folders = [folder for folder in folders if read_manifest(folder).get("stage") == "eval"]
    if not folders:
        raise InputError(f"{config.run}: holds no finished evaluation; answer first: clips-llava eval run")
    judged = [folder for folder in folders if judged_tasks(suite_of(read_manifest(folder), folder))]
    if not judged:
        raise InputError(f"{config.run}: no task of its suite asks for a judge; its scores are in results.json")
    read_key(config.api_key_env)
    import_lmms_eval()
    for folder in judged:
        _judge_folder(folder, config)
    return judged


def judged_tasks(suite: Suite) -> dict[str, BenchmarkTask]:
    """Those that have no score without a judge."""
    return {name: task for name, task in suite.tasks.items() if task.judge}


def check_judged(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise an `InputError` unless all runs have been judged, and by the same judge.

    Args:
        manifests: of evaluations, by what to call them (their folders).
    """
    judges: dict[str, dict[str, dict[str, Any]]] = {}
    for name, manifest in manifests.items():
        for task in judged_tasks(suite_of(manifest, Path(name))):
            who = manifest["outputs"].get("judge", {}).get(task)
            if who is None:
                raise InputError(
                    f"{name}: {task} is answered, but not judged, and no judge is no score: "
                    f"run clips-llava eval judge {name} --model … --endpoint …"
                )
            judges.setdefault(task, {})[name] = {key: who[key] for key in IDENTITY}
    for task, by_run in judges.items():
        (first, judge_a), *others = by_run.items()
        for name, judge_b in others:
            if judge_a != judge_b:
                raise InputError(
                    f"{task}: scores by different judges are not compared: {first} by {told(judge_a)}, {name} by {told(judge_b)}"
                )


def told(judge: Mapping[str, Any]) -> str:
    """A judge in words."""
    names = " and ".join(judge["answered_by"])
    known = judge["model"] if names in ("", judge["model"]) else f"{judge['model']} (which answers as {names})"
    return f"{known} at temperature {judge['temperature']:g} with prompt {judge['prompt_sha256'][:8]}"


# ---------------------------------------------------------------------------------------------------------- one evaluation


def _judge_folder(folder: Path, config: JudgeConfig) -> None:
    manifest = read_manifest(folder, "eval")
    suite = suite_of(manifest, folder)
    data = (config.data or Path(manifest["outputs"]["data"])).resolve()
    tables = {name: [find(data, table) for table in task.tables] for name, task in suite.tasks.items()}
    if fingerprint(data, [found for own in tables.values() for found in own]) != manifest["inputs"]["data"]:
        raise InputError(f"{data}: not the files that {folder} was answered from; give them as data=FOLDER")
    wanted = Suite(suite.name, judged_tasks(suite))
    for name in wanted.tasks:
        check(tables[name])
    folder = folder.resolve()
    cache = folder / ".cache" / manifest["inputs"]["data"][:16]
    with quiet(folder / "lmms_eval.log") as terminal, working_from(data, cache):
        for name, task in load_tasks(wanted).items():
            _judge_task(folder, name, wanted.tasks[name], task, config, terminal)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _judge_task(folder: Path, name: str, spec: BenchmarkTask, task: Any, config: JudgeConfig, terminal: Any) -> None:
    from eval_suites.statistics import with_repeats

    # Not splitlines: it would cut an answer in two at characters such as U+2028, which JSON leaves as they are.
    rows_of_run = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in rows_of_run]
    docs = {record["doc_id"]: task.eval_docs_no_media[record["doc_id"]] for record in records}
    asked = [_messages(task, docs[record["doc_id"]], ANSWER) for record in records]
    text = "\n".join(str(message["content"]) for message in asked[0])
    who = {
        "model": config.model,
        "prompt_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "temperature": config.temperature,
    }
    journal = folder / f"judge-{name}.jsonl"
    rows = _journal(journal)
    if rows:
        _refuse_another_judge(folder, name, who)
    verdicts = [
        Verdict(record["doc_id"], repeat, _messages(task, docs[record["doc_id"]], record["answer"]))
        for record in records
        for repeat in range(config.repeats)
        if (record["doc_id"], repeat) not in rows
    ]
    if verdicts:
        write_json(folder / f"judge-{name}.json", {**who, "prompt": text})
        _ask(verdicts, config, name, journal, terminal)
        rows = _journal(journal)

    scores: list[list[float]] = []
    figures: list[dict[str, Any]] = []
    by_repeat: list[dict[str, list[Any]]] = [{} for _ in range(config.repeats)]
    for record in records:
        own = []
        for repeat in range(config.repeats):
            metrics = _process(task, docs[record["doc_id"]], record["answer"], rows[record["doc_id"], repeat])
            for metric, value in metrics.items():
                by_repeat[repeat].setdefault(metric, []).append(value)
            value = next(metrics[key] for key in spec.score or [spec.primary] if key in metrics)
            own.append(float(value["score"] if isinstance(value, dict) else value))
        scores.append(own)
    for metrics_of in by_repeat:
        aggregation = task.aggregation()
        figures.append({metric: aggregation[metric](metrics_of[metric]) for metric in spec.metrics})
    found = with_repeats(scores, [record["cluster"] for record in records])

    for record, own in zip(records, scores, strict=True):
        record |= {"score": sum(own) / len(own), "scores": own}
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_bytes(folder / f"{name}.jsonl", lines.encode())
    means = {metric: sum(own[metric] for own in figures) / len(figures) for metric in spec.metrics}
    results = {**read_json(folder / "results.json"), name: {**means, "n": len(records)}}
    write_json(folder / "results.json", results)
    manifest = read_json(folder / MANIFEST)
    judged = {
        **who,
        "answered_by": sorted({row["answered_by"] for row in rows.values()}),
        "endpoint": urlsplit(config.endpoint).netloc,
        "date": max(row["date"] for row in rows.values()),
        "prompt": text,
        "repeats": config.repeats,
        "mean": found.mean.value,
        "interval": list(found.mean.interval),
        "judge_error": found.judge_error,
        "categories": _categories(records),
    }
    manifest["outputs"] |= {"results": results, "judge": {**manifest["outputs"].get("judge", {}), name: judged}}
    write_json(folder / MANIFEST, manifest)
    print(
        f"{folder.name}: {name} {100 * found.mean.value:.1f} of 100 [{100 * found.mean.interval[0]:.1f}, "
        f"{100 * found.mean.interval[1]:.1f}] by {config.model}, {config.repeats} times",
        file=terminal,
    )


def _categories(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean score by capability; MM-Vet's questions ask for several each (`rec,ocr`) and count for all of them."""
    by_name: dict[str, list[float]] = {}
    for record in records:
        for name in filter(None, (part.strip() for part in record["category"].split(","))):
            by_name.setdefault(name, []).append(record["score"])
    return {name: {"score": sum(own) / len(own), "n": len(own)} for name, own in sorted(by_name.items())}


def _refuse_another_judge(folder: Path, name: str, who: Mapping[str, Any]) -> None:
    path = folder / f"judge-{name}.json"
    before = read_json(path) if path.is_file() else None
    if before is not None and {key: before.get(key) for key in who} != who:
        a, b = ({**judge, "answered_by": []} for judge in (before, who))
        raise InputError(
            f"{folder}: {name} holds verdicts by {told(a)}, and this is {told(b)}: judges are not mixed; "
            f"to judge anew delete {path.name} and judge-{name}.jsonl"
        )


def _journal(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The verdicts so far, by doc_id and repeat; what a kill cut off is dropped."""
    if not path.exists():
        return {}
    drop_cut_line(path)
    lines = path.read_bytes().split(b"\n")[:-1]
    return {(row["doc_id"], row["repeat"]): row for row in map(json.loads, lines)}


# --------------------------------------------------------------------------------------------- the task's own code and prompt


@contextlib.contextmanager
def _server(task: Any, evaluate: Any) -> Iterator[None]:
    """Inside, the task asks `evaluate` where it would ask lmms-eval's client."""
    names = task.config.process_results.__globals__
    if not hasattr(names.get("server"), "evaluate"):
        raise InputError(
            f"{task.config.task}: `judge: true` in the suite, but its code has no judge `server` of lmms-eval's llm_judge"
        )
    before = names["server"]
    names["server"] = SimpleNamespace(evaluate=evaluate)
    try:
        yield
    finally:
        names["server"] = before


def _messages(task: Any, doc: Mapping[str, Any], answer: str) -> list[dict[str, Any]]:
    """What the task would ask its judge about an answer."""
    asked: list[Any] = []

    def evaluate(request: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(content="0.0", model_used="")

    with _server(task, evaluate):
        task.process_results(doc, [answer])
    if len(asked) != 1 or asked[0].images:
        raise InputError(f"{task.config.task}: asks its judge {len(asked)} times, or with pictures: not supported")
    return list(asked[0].messages)


def _process(task: Any, doc: Mapping[str, Any], answer: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The task's own values for an answer that was judged."""
    reply = SimpleNamespace(content=str(row["score"]), model_used=row["answered_by"])
    with _server(task, lambda request: reply):
        return dict(task.process_results(doc, [answer]))


# ------------------------------------------------------------------------------------------------------------ the judge


def _ask(verdicts: Sequence[Verdict], config: JudgeConfig, name: str, journal: Path, terminal: Any) -> None:
    """Ask for all verdicts; each is in the journal as soon as it is there."""
    failed: list[tuple[Verdict, Outcome]] = []
    endpoint = JudgeEndpoint(
        config.endpoint, config.model, config.max_new_tokens, read_key(config.api_key_env), config.temperature,
        config.concurrency, config.timeout, config.retries, config.retry_wait, config.extra,
    )  # fmt: skip
    with (
        open(journal, "a", encoding="utf-8") as file,
        tqdm(total=len(verdicts), desc=f"{name}: judging", unit=" answers", file=terminal, dynamic_ncols=True) as bar,
    ):
        for verdict, outcome in endpoint.captions(iter(verdicts)):
            bar.update()
            if outcome.kind != "captioned":
                failed.append((verdict, outcome))
                continue
            row = {
                "doc_id": verdict.doc_id,
                "repeat": verdict.repeat,
                "score": number(outcome.caption),
                "replies": verdict.replies,
                "answered_by": verdict.answered_by,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    if failed:
        verdict, outcome = failed[0]
        raise InputError(
            f"{name}: judge {config.model} gave no score for {len(failed)} of {len(verdicts)} answers, and none is made up; "
            f"doc_id {verdict.doc_id}: {outcome.cause}: {outcome.detail!r}. The others are kept: run again to go on"
        )


def number(reply: str) -> float | None:
    """The score that a reply begins with, as MM-Vet reads it; None if that is no number of 0-1."""
    words = reply.rpartition("</think>")[2].split()
    try:
        value = float(words[0])
    except (ValueError, IndexError):
        return None
    return value if 0 <= value <= 1 else None


class JudgeEndpoint(Endpoint):
    """A server that is asked for numbers: in words alone, and again where its reply is none."""

    EARNED = "verdicts"

    async def _caption(self, client: Any, task: Any) -> Any:
        said = ""
        for attempt in range(TRIES):
            temperature = self.temperature + WARMER * attempt
            seed = random.Random(f"{task.doc_id} {task.repeat} {attempt}").randrange(2**31 - 1)
            reply: Any = await self._ask(client, task.messages, seed, temperature)
            if not isinstance(reply, NamedReply):
                return task, reply
            said, task.answered_by = reply.text, reply.answered_by
            task.replies.append(said)
            if number(said) is not None:
                return task, Outcome("captioned", said)
        return task, Outcome("uncaptioned", cause=f"no number of 0-1 in {TRIES} replies, the last", detail=said[:200])

    async def _probe(self, client: Any) -> Any:
        messages = [{"role": "user", "content": "Reply with the number 1.0 and nothing else."}]
        answer = await self._ask(client, messages, 0, self.temperature)
        return None if isinstance(answer, Reply) else answer

    def _parse(self, response: Any) -> Reply | None:
        reply = super()._parse(response)
        return None if reply is None else NamedReply.of(reply, str(response.json().get("model") or ""))


class NamedReply(Reply):
    """A reply, and by what name the server says that it answers."""

    answered_by = ""

    @classmethod
    def of(cls, reply: Reply, answered_by: str) -> "NamedReply":
        named = cls(*reply)
        named.answered_by = answered_by
        return named
