"""The repair list: what `clips-llava data check` has found wrong, one finding a line, for people and for training.

`repair.jsonl` has one JSON object a line, in the order of the data:

    {"shard": "dc/00017.tar", "key": "000170042", "cause": "damaged picture", "detail": "…", "repair": "leave out"}

    shard   the file, as training names it: its path or url as found from `data.train`
    key     the sample's key; "" where the finding is about the whole file
    cause   a few words that are the same for every finding of this kind
    detail  what exactly was found; of a copy of an evaluation picture, which one
    repair  "leave out": the sample alone is at fault, training does without it (`excluded` lists these)
            "replace the file": fetch or build it again; what can be read of it is used meanwhile
            "rename": samples of one shard share a key; training reads them all, other tools may not
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from clips_core.errors import InputError

Repair = Literal["leave out", "replace the file", "rename"]


class Finding(NamedTuple):
    """One line of the list."""

    shard: str
    key: str
    cause: str
    detail: str
    repair: Repair


def repair_lines(findings: Iterable[Finding]) -> Iterator[bytes]:
    """The findings as lines of `repair.jsonl`; as ASCII, since a path or key need not be UTF-8."""
    for finding in findings:
        yield json.dumps(finding._asdict()).encode() + b"\n"


def read_repair_list(path: Path | str) -> Iterator[Finding]:
    """The findings of a `repair.jsonl`, line by line.

    Raises:
        InputError: naming the line, if the file is missing, or a line is not a finding.
    """
    if not Path(path).is_file():
        raise InputError(f"repair list {path}: no such file")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                finding = Finding(**json.loads(line))
                valid = all(isinstance(value, str) for value in finding) and finding.repair in get_args(Repair)
            except (ValueError, TypeError):
                valid = False
            if not valid:
                raise InputError(
                    f"repair list {path}, line {number}: not a finding like "
                    '{"shard": …, "key": …, "cause": …, "detail": …, "repair": "leave out"}'
                )
            yield finding


def excluded(path: Path | str) -> set[tuple[str, str]]:
    """Shard and key of each sample that is to be left out, as samples' `__shard__` and `__key__` have them.

    Shards are compared by path: after moving them, check again, or edit the list.
    """
    return {(f.shard, f.key) for f in read_repair_list(path) if f.repair == "leave out" and f.key}
