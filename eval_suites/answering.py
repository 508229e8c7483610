"""How a task's questions are answered: in batches that follow from the questions alone, by one process or several, over kills.

A batch is what changes an answer in bfloat16: a neighbour's length decides how far a row is padded and in which order
sums are taken. So the batches of a task are fixed by its list of questions, whatever is answered already and however many
processes share them, and a batch is answered as a whole or not at all.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from clips_core.folders import write_bytes
from clips_core.recaption import parse_part
from eval_suites.pictures import Swap

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # what torchrun tells a process


@dataclass(frozen=True)
class Part:
    """This process's share: batches index, index + count, …"""

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """Of the names of the files that this process alone writes."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"


WHOLE = Part()


def this_part(text: str | None) -> Part:
    """`i/n` as it is written, or else what torchrun says, or else the whole.

    Raises:
        InputError: if it is no part.
    """
    if text is None and "RANK" in os.environ:
        text = f"{os.environ['RANK']}/{os.environ.get('WORLD_SIZE', '')}"
    return WHOLE if text is None else Part(*parse_part(text))


class Answerer(Protocol):
    """A model that answers lmms-eval's requests."""

    def lengths(self, requests: Sequence[Any]) -> dict[int, int]:
        """By doc_id, how long a question is: questions alike in length share a batch."""

    def answer(self, requests: Sequence[Any], swap: Swap, generation: Mapping[str, Any]) -> list[str]:
        """One answer to each of a batch of one task, with the pictures of `swap`; `generation` overrules the task's settings."""


class AnswerLog:
    """The answers of one task, one JSON line each, written batch by batch as they are made.

    All parts' files are read, so that what any process has answered counts; this process writes to its own.
    """

    def __init__(self, folder: Path, stem: str, part: Part = WHOLE):
        self.folder, self.stem, self.path = folder, stem, folder / f"{stem}{part.suffix}.jsonl"
        self.answers: dict[int, str] = {}
        self.seconds = 0.0
        drop_cut_line(self.path)
        self.read()

    def read(self) -> None:
        """What all processes have written by now."""
        self.answers, self.seconds = {}, 0.0
        for path in sorted([self.folder / f"{self.stem}.jsonl", *self.folder.glob(f"{self.stem}.*-of-*.jsonl")]):
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last one may be half written
            for row in map(json.loads, lines):
                self.answers.setdefault(row["doc_id"], row["answer"])
                self.seconds += row.get("seconds", 0.0)

    def add(self, answers: Mapping[int, str], seconds: float) -> None:
        each = round(seconds / max(1, len(answers)), 4)
        rows = [{"doc_id": doc_id, "answer": text, "seconds": each} for doc_id, text in answers.items()]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.answers |= answers
        self.seconds += each * len(rows)


def drop_cut_line(path: Path) -> None:
    """Take from a file of lines what a kill cut off: all behind its last newline. It may end within a character."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_bytes(path, whole)


def batches(lengths: Mapping[int, int], size: int) -> list[list[int]]:
    """The doc_ids of a task in batches: the longest questions first, those of equal length by doc_id."""
    order = sorted(lengths, key=lambda doc_id: (-lengths[doc_id], doc_id))
    return [order[start : start + size] for start in range(0, len(order), size)]


def evenly(doc_ids: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spread; all where there are no more."""
    count = min(count, len(doc_ids))
    return [doc_ids[i * len(doc_ids) // count] for i in range(count)]


def answer_all(
    requests: Sequence[Any],
    model: Answerer,
    swap: Swap,
    generation: Mapping[str, Any],
    log: AnswerLog,
    groups: Sequence[Sequence[int]],
    progress: tqdm,
) -> None:
    """Answer the batches `groups` of one task's `requests`; those that `log` holds are not answered again."""
    by_doc = {request.args[3]: request for request in requests}
    for batch in groups:
        if not all(doc_id in log.answers for doc_id in batch):
            started = time.monotonic()
            texts = model.answer([by_doc[doc_id] for doc_id in batch], swap, generation)
            for doc_id, text in zip(batch, texts, strict=True):
                if not text.strip():
                    raise RuntimeError(
                        f"{by_doc[doc_id].args[4]}, doc_id {doc_id}: the model generated no text, which is not an answer to"
                        " score (`generation: {min_new_tokens: 1}` in the suite makes it say something)"
                    )
            new = {doc_id: text for doc_id, text in zip(batch, texts, strict=True) if doc_id not in log.answers}
            log.add(new, time.monotonic() - started)
        progress.update(len(batch))


def check_batches(answers: Mapping[int, str], alone: Mapping[int, str]) -> dict[str, float]:
    """How many of the answers made `alone`, in batches of one, differ from the run's own."""
    changed = sum(answers[doc_id] != text for doc_id, text in alone.items())
    return {"n": len(alone), "changed": changed, "share": changed / len(alone)}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, libraries that would share the work once more see nothing of torchrun."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
