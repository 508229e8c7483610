"""LLaVA files (JSON arrays or JSONL) read as a stream, and what is wrong with a record. Imports no torch.

LLaVA's own files are arrays of up to a gigabyte, often in a single line: they are never in memory as a whole, and a place in
them is the element's number (from 1), its line (from 1) and its byte (from 0).
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from clips_core.errors import InputError
from clips_core.listings import is_inside

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
PIECE = 2**20  # bytes that are read at a time
LONGEST = (
    2**26
)  # characters of one element: beyond, a bracket or quote is missing, and reading on would take all memory


class Record(NamedTuple):
    """One element of a file, and where it begins."""

    element: int
    line: int
    byte: int
    value: Any
    fault: str = ""  # why a line of a .jsonl has no value


@dataclass(frozen=True)
class Conversation:
    """One sample of a LLaVA file."""

    where: str  # file and id, for messages
    images: tuple[Path, ...]  # in the order of their marks; none: text only
    messages: tuple[dict[str, str], ...]  # {"role": "user" | "assistant", "content"} in turn, the user first


Repair = Literal["leave out", "cut turns", "rename", "none"]


class Fault(NamedTuple):
    """What is wrong with a record, and what a repair does about it."""

    cause: str  # the same words for all faults of a kind
    detail: str
    repair: Repair


def read_conversations(file: Path, images: Path) -> list[Conversation]:
    """All conversations of a LLaVA file (the shapes of LCS-558K, mix-665K and ShareGPT4V), checked.

    Args:
        file: a list of {"id", "image" (a path, a list of paths, or absent), "conversations": [{"from": "human" | "gpt",
            "value"}, …]}; named .jsonl, one such object a line.
        images: the folder that "image" is relative to.

    Raises:
        InputError: naming file and sample, line and byte, at the first thing that is wrong; a picture that is not there too.
    """
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of pictures")
    root = images.resolve()
    conversations = [to_conversation(record, file, root) for record in read_records(file)]
    if not conversations:
        raise InputError(f"{file}: must be a list of conversations, and not empty")
    for path, where in {path: c.where for c in reversed(conversations) for path in c.images}.items():
        if not path.is_file():
            raise InputError(f"{where}: its picture {path} does not exist")
    return conversations


def to_conversation(record: Record, file: Path, images: Path) -> Conversation:
    """A record as a conversation.

    Raises:
        InputError: at the first of its faults.
    """
    value = record.value
    where = f"{file}, sample {record.element}"
    where += f" (id {value['id']!r})" if isinstance(value, dict) and "id" in value else ""
    found = [Fault("not JSON", record.fault, "leave out")] if record.fault else faults(value)
    if found:
        raise InputError(
            f"{where}: {found[0].detail} (line {record.line}, byte {record.byte}); "
            "`clips-llava data conversations` lists all such faults and writes a repaired file"
        )
    messages = [{"role": ROLES[t["from"]], "content": _mark_first(t["value"].strip())} for t in value["conversations"]]
    return Conversation(where, tuple(images / name for name in image_names(value)), tuple(messages))


def _mark_first(text: str) -> str:
    """LLaVA puts a turn's mark into a line of its own before the words; several marks stay where they are (LLaVA-NeXT)."""
    if text.count(IMAGE_MARK) != 1:
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()


# --------------------------------------------------------------------------------------------------------- one record


def image_names(value: dict[str, Any]) -> list[str]:
    """The paths under "image": none, one, or several. What is no path within a folder is left out."""
    image = value.get("image")
    names = image if isinstance(image, list) else [image]
    return [name for name in names if isinstance(name, str) and name and is_inside(name)]


def faults(value: Any) -> list[Fault]:
    """All that is wrong with a record, its pictures' files aside. Nothing: `to_conversation` takes it.

    Only what is wrong with the order of the turns can be repaired: `with_turns_cut`.
    """
    if not isinstance(value, dict):
        return [Fault("not an object", f"must be an object, not {json.dumps(value)[:60]}", "leave out")]
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [Fault("no turns", '"conversations" must be pairs of human and gpt turns', "leave out")]
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return [Fault("not a turn", 'each turn must be {"from": …, "value": text}', "leave out")]
    kept = _between_answers(turns)
    return [*_fault_of_roles(turns, kept), *_faults_of_texts(kept), *_faults_of_images(value, kept)]


def with_turns_cut(value: dict[str, Any]) -> dict[str, Any]:
    """A record without the answers before its first question and the questions after its last answer."""
    return {**value, "conversations": _between_answers(value["conversations"])}


def _between_answers(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = next((i for i, turn in enumerate(turns) if turn.get("from") != "gpt"), len(turns))
    last = next((i for i in range(len(turns), first, -1) if turns[i - 1].get("from") != "human"), first)
    return turns[first:last]


def _fault_of_roles(turns: list[dict[str, Any]], kept: list[dict[str, Any]]) -> Iterator[Fault]:
    if not kept:
        yield Fault("no answer", '"conversations" must be pairs of human and gpt turns', "leave out")
    for turn, expected in zip(kept, ("human", "gpt") * len(kept), strict=False):
        if turn.get("from") not in ROLES:
            roles = " and ".join(map(repr, ROLES))
            yield Fault("unknown role", f"a turn is from {turn.get('from')!r}; the roles are {roles}", "leave out")
            return
        if turn["from"] != expected:
            detail = f"a turn is from {turn['from']!r} where {expected!r} must come"
            yield Fault("roles out of order", detail, "leave out")
            return
    if kept and kept[0] is not turns[0]:
        yield Fault("begins with an answer", "a turn is from 'gpt' where 'human' must come first", "cut turns")
    if kept and kept[-1] is not turns[-1]:
        yield Fault("ends with a question", "its last turn is from 'human', and nothing answers it", "cut turns")


def _faults_of_texts(turns: list[dict[str, Any]]) -> Iterator[Fault]:
    for turn in turns:
        if not turn["value"].strip():
            kind = "answer" if turn.get("from") == "gpt" else "question"
            yield Fault(f"empty {kind}", f"an empty {kind}", "leave out")


def _faults_of_images(value: dict[str, Any], turns: list[dict[str, Any]]) -> Iterator[Fault]:
    for key in ("images", "video", "videos"):
        if value.get(key):
            detail = f'the key "{key}" is not read: pictures stand under "image"'
            yield Fault("pictures under another key", detail, "leave out")
    image = value.get("image")
    names = [image] if isinstance(image, str) else image if image is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        yield Fault("image is no path", '"image" must be one path or a list of paths', "leave out")
        return
    for name in names:
        if not is_inside(name):
            yield Fault("picture outside the folder", f"its picture {name!r} lies outside the folder", "leave out")
    if any(IMAGE_MARK in turn["value"] for turn in turns if turn.get("from") == "gpt"):
        yield Fault(
            "mark in an answer", f"has {IMAGE_MARK} in a gpt turn; pictures are the human's to show", "leave out"
        )
        return
    marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
    if marks != len(names):
        cause = (
            "mark without a picture"
            if not names
            else f"{'more' if marks > len(names) else 'fewer'} marks than pictures"
        )
        detail = (
            f"has {marks} {IMAGE_MARK} and {len(names)} pictures; each picture needs one {IMAGE_MARK} in a human turn"
        )
        yield Fault(cause, detail, "leave out")


# ------------------------------------------------------------------------------------------------------------- reading


def read_records(file: Path, start: tuple[int, int, int] = (1, 1, 0)) -> Iterator[Record]:
    """The elements of an array, or the lines of a .jsonl, one at a time.

    Args:
        start: number, line and byte of an element to begin with, as an earlier reading gave them.

    Raises:
        InputError: naming line and byte, if the file is missing, is no array, or is not JSON. Of a .jsonl, a line that is
            not JSON is a record with a fault.
    """
    try:
        with open(file, "rb") as opened:
            yield from (_read_lines if is_jsonl(file) else _read_array)(opened, file, *start)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _read_lines(opened: IO[bytes], file: Path, element: int, line: int, byte: int) -> Iterator[Record]:
    opened.seek(byte)
    for number, text in enumerate(opened, start=line):
        if text.strip():
            try:
                yield Record(element, number, byte, json.loads(text.removeprefix(codecs.BOM_UTF8).decode()))
            except (ValueError, RecursionError) as error:
                yield Record(element, number, byte, None, f"not JSON ({getattr(error, 'msg', error)})")
            element += 1
        byte += len(text)


def _read_array(opened: IO[bytes], file: Path, element: int, line: int, byte: int) -> Iterator[Record]:
    window = _Window(opened, file, line, byte)
    if byte == 0:
        if window.next_character() != "[":
            raise InputError(f"{file}: must be a list of conversations; with one object a line, name it .jsonl")
        window.move(1)
        if window.next_character() == "]":
            return
    while True:
        window.next_character()
        line, byte = window.line, window.byte
        yield Record(element, line, byte, window.take_value(element))
        following = window.next_character()
        if following not in (",", "]"):
            window.fail(window.at, "Expecting ',' or ']'" if following else "the file is cut off", element)
        window.move(1)
        if following == "]":
            if window.next_character():
                window.fail(window.at, "Extra data after the list", element)
            return
        element += 1


class _Window:
    """A stretch of a file's text in memory, from which values are taken one after another.

    Attributes:
        at: where in the stretch the next character stands; `line` and `byte` are that place in the file.
    """

    def __init__(self, opened: IO[bytes], file: Path, line: int, byte: int):
        self._opened, self._file = opened, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self.text, self.at, self.line, self.byte, self.ended = "", 0, line, byte, False
        opened.seek(byte)
        if byte == 0 and opened.read(3) == codecs.BOM_UTF8:
            self.byte = 3
        opened.seek(self.byte)

    def next_character(self) -> str:
        """Moves over white space; "" at the file's end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.move(end - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def take_value(self, element: int) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except RecursionError:
                self.fail(self.at, "too deeply nested", element)
            except json.JSONDecodeError as error:
                # A fault far from the stretch's end is the file's; near it, or in an open string, the rest may be to come.
                is_open = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                if not is_open or len(self.text) - self.at > LONGEST or not self._read_on():
                    cut = self.ended and error.pos >= len(self.text.rstrip())
                    self.fail(error.pos, f"the file is cut off: {error.msg}" if cut else error.msg, element)
                continue
            if end + 2 >= len(self.text) and self._read_on():
                continue  # a number may go on: 1 may become 1e-7
            self.move(end - self.at)
            return value

    def move(self, count: int) -> None:
        """Go on by so many characters."""
        passed = self.text[self.at : self.at + count]
        self.at += count
        self.line += passed.count("\n")
        self.byte += len(passed) if passed.isascii() else len(passed.encode())

    def fail(self, position: int, message: str, element: int) -> None:
        self.move(position - self.at)
        raise InputError(
            f"{self._file}, line {self.line}: not JSON ({message}), at byte {self.byte}, in sample {element}"
        )

    def _read_on(self) -> bool:
        """Lengthen the stretch, at least twofold if nothing has been taken from it. False: the file has ended."""
        if self.ended:
            return False
        data = self._opened.read(max(PIECE, len(self.text) - self.at))
        self.ended = not data
        try:
            more = self._decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            byte = self._opened.tell() - len(error.object) + error.start
            raise InputError(f"{self._file}: not UTF-8 at byte {byte}, after line {self.line}") from None
        self.text, self.at = self.text[self.at :] + more, 0
        return True
