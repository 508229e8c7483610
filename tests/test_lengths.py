"""Lengths of samples: the same however many processes find them, kept for a run that goes on."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clips_core.errors import BadSample
from llava_bridge import lengths
from llava_bridge.conversations import Conversation, Sample
from llava_bridge.lengths import sample_lengths

CONVERSATIONS = [Conversation(str(i), (), ()) for i in range(100)]
WANTED = [i for i in range(100) if i % 3]


def encode_and_note(folder: Path) -> Callable[[Conversation], Sample]:
    """An encoder whose samples have as many tokens as their number + 2, and which notes each call."""

    def encode(conversation: Conversation) -> Sample:
        number = int(conversation.where)
        with open(folder / "calls", "a") as file:
            file.write(f"{number}\n")
        tokens = np.arange(number + 2, dtype=np.int32)
        return Sample(conversation.where, (), tokens, tokens)

    return encode


def find(folder: Path) -> None:
    lengths.PART = 7
    assert sample_lengths(CONVERSATIONS, WANTED, encode_and_note(folder), folder / "known") == {
        i: i + 2 for i in WANTED
    }


def calls(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "calls").read_text().split()))


def test_few_are_found_without_a_file(tmp_path: Path) -> None:
    found = sample_lengths(CONVERSATIONS, WANTED, encode_and_note(tmp_path), tmp_path / "known")
    assert found == {i: i + 2 for i in WANTED}
    assert not (tmp_path / "known").exists()


def test_processes_share_the_work(tmp_path: Path) -> None:
    """Each sample is encoded once, whichever process does it."""
    processes = [multiprocessing.get_context("fork").Process(target=find, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert calls(tmp_path) == WANTED


def test_a_run_that_goes_on_finds_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "PART", 7)
    encode = encode_and_note(tmp_path)

    def killed(conversation: Conversation) -> Sample:
        if conversation.where == "50":
            raise KeyboardInterrupt
        return encode(conversation)

    with pytest.raises(KeyboardInterrupt):
        sample_lengths(CONVERSATIONS, WANTED, killed, tmp_path / "known")
    before = len(calls(tmp_path))
    find(tmp_path)
    assert before + len(WANTED) - before // 7 * 7 == len(calls(tmp_path))  # only the part that was cut off is repeated
    find(tmp_path)
    assert before + len(WANTED) - before // 7 * 7 == len(calls(tmp_path))


def test_a_bad_sample_is_named_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "PART", 7)
    encode = encode_and_note(tmp_path)

    def bad(conversation: Conversation) -> Sample:
        if conversation.where == "71":
            raise BadSample("nothing to learn", "sample 71: no token to learn")
        return encode(conversation)

    with pytest.raises(BadSample, match="sample 71"):
        sample_lengths(CONVERSATIONS, WANTED, bad, tmp_path / "known")
