"""LLaVA files as streams: equal to what `json` reads, with exact places, in little memory; bad records are one clear error."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llava_samples import save_conversations

from clips_core.errors import InputError
from llava_bridge import records
from llava_bridge.records import Record, faults, read_conversations, read_records, to_conversation, with_turns_cut


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_conversations(tmp_path_factory.mktemp("data") / "llava")


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = {"id": "x7", "image": "0.png", "conversations": turns("<image>\nWhat?", "A bird.")}
SAMPLE = r"sample 1 \(id 'x7'\): "

# ------------------------------------------------------------------------------------------------------------- streaming


def some_value(rng: np.random.Generator, depth: int = 0) -> Any:
    kind = rng.integers(0, 5 if depth > 2 else 7)
    if kind < 3:
        return "".join(rng.choice(list('aZ "\\\n\té€😀{}[],:'), rng.integers(0, 12)))
    if kind == 3:
        return [True, None, False][rng.integers(0, 3)]
    if kind == 4:
        return [int(rng.integers(-(10**9), 10**9)), -0.5, 1e-7, 12345.678][rng.integers(0, 4)]
    inner = [some_value(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return inner if kind == 5 else {f"k{i}é": value for i, value in enumerate(inner)}


@pytest.mark.parametrize("layout", ["one line", "pretty", "escaped", "spread", "with a byte order mark"])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_a_stream_equals_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, piece: int) -> None:
    monkeypatch.setattr(records, "PIECE", piece)
    rng = np.random.default_rng(piece)
    values = [some_value(rng) for _ in range(60)]
    text = {
        "one line": json.dumps(values, ensure_ascii=False),
        "pretty": json.dumps(values, indent=1, ensure_ascii=False),
        "escaped": json.dumps(values, separators=(",", ":")),
        "spread": " \r\n[\n" + " ,\n\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\t]\n\n",
        "with a byte order mark": json.dumps(values),
    }[layout]
    raw = (b"\xef\xbb\xbf" if layout == "with a byte order mark" else b"") + text.encode()
    file = tmp_path / "values.json"
    file.write_bytes(raw)
    found = list(read_records(file))
    assert [record.value for record in found] == json.loads(raw.decode("utf-8-sig"))
    assert [record.element for record in found] == list(range(1, 61))
    for record in found:  # a place is where the element begins
        assert json.JSONDecoder().raw_decode(raw[record.byte :].decode())[0] == record.value
        assert record.line == raw[: record.byte].count(b"\n") + 1
    for start in (found[0], found[17], found[-1]):
        assert list(read_records(file, (start.element, start.line, start.byte))) == found[start.element - 1 :]


def test_a_file_that_is_cut_off_anywhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PIECE", 5)
    raw = json.dumps([GOOD, "é", -12.5, [True, {"a": None}]], indent=1, ensure_ascii=False).encode()
    file = tmp_path / "cut.json"
    for length in range(len(raw)):
        file.write_bytes(raw[:length])
        with pytest.raises(InputError, match=r"cut\.json.*(cut off|not JSON|must be a list|not UTF-8)"):
            list(read_records(file))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.replace('"B 500"', '"B 500'), r"line 502: not JSON \(.*\), at byte \d+, in sample 501"),
        (lambda t: t.replace('"B 500"', 'B 500"'), r"line 502: not JSON \(Expecting value\), at byte {byte}, in sample 501"),
        (lambda t: t.replace('{"id": "B 500"},', '{"id": "B 500"}'), r"line 503: not JSON \(Expecting ',' or '\]'\).*sample 501"),
        (lambda t: t + "x", r"line 1002: not JSON \(Extra data after the list\)"),
        (lambda t: t.replace("\n]", ",\n]"), r"line 1002: not JSON \(Expecting value\), at byte \d+, in sample 1001"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [64, 2**20])
def test_damage_is_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str, piece: int
) -> None:
    monkeypatch.setattr(records, "PIECE", piece)
    text = "[\n" + ",\n".join(json.dumps({"id": f"B {i}"}) for i in range(1000)) + "\n]"
    file = tmp_path / "damaged.json"
    file.write_text(damage(text))
    with pytest.raises(InputError, match=message.replace("{byte}", str(text.index('"B 500"')))):
        list(read_records(file))


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    file = tmp_path / "latin.json"
    file.write_bytes(b'[{"id": 1},\n{"id": "B\xe4r"}]')
    with pytest.raises(InputError, match=r"latin\.json: not UTF-8 at byte 21"):
        list(read_records(file))


def test_a_file_of_one_line_takes_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "long.json"
    record = json.dumps({**GOOD, "conversations": turns("<image>\nWhat?", "A bird. " * 200)})
    with open(file, "w") as opened:
        opened.write("[" + ", ".join([record] * 12000) + "]")
    assert file.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(file)) == 12000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_an_element_without_an_end_does_not_take_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST", 10**5)
    monkeypatch.setattr(records, "PIECE", 1000)
    file = tmp_path / "endless.json"
    file.write_text('[{"id": "' + "a" * 10**6)
    with pytest.raises(InputError, match=r"line 1: not JSON \(Unterminated string .* at byte 8, in sample 1"):
        list(read_records(file))
    with open(file, "a") as opened:
        opened.write('"}]')
    with pytest.raises(InputError, match="Unterminated"):
        list(read_records(file))


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    raw = b'\xef\xbb\xbf{"id": 1}\n\n{"id": "\xc3\xa9"}\r\n{"id": \n{"id": "\xe4"}\n{"id": 5}'
    file.write_bytes(raw)
    found = list(read_records(file))
    assert [(r.element, r.line, r.value) for r in found] == [
        (1, 1, {"id": 1}), (2, 3, {"id": "é"}), (3, 4, None), (4, 5, None), (5, 6, {"id": 5})
    ]  # fmt: skip
    assert [raw[r.byte : r.byte + 6] for r in found[1:]] == [b'{"id":'] * 4
    assert [bool(r.fault) for r in found] == [False, False, True, True, False]
    assert list(read_records(file, (4, 5, found[3].byte))) == found[3:]
    with pytest.raises(InputError, match=r"some\.jsonl, sample 1 \(id 1\): .* \(line 1, byte 0\)"):
        read_conversations(file, tmp_path)


# --------------------------------------------------------------------------------------------------------------- reading


def conversation(**changes: Any) -> Any:
    return to_conversation(Record(1, 1, 0, {**GOOD, **changes}), Path("f.json"), Path("/pictures"))


def test_reading(data: Path) -> None:
    entries = json.loads((data / "tune.json").read_text())
    conversations = read_conversations(data / "tune.json", data / "images")
    assert len(conversations) == len(entries)
    for entry, item in zip(entries, conversations, strict=True):
        assert item.images == ((data / "images" / entry["image"]).resolve(),)
        assert [m["content"] for m in item.messages] == [turn["value"] for turn in entry["conversations"]]
        assert f"(id {entry['id']!r})" in item.where


def test_lines_read_as_the_array_does(data: Path, tmp_path: Path) -> None:
    lines = tmp_path / "tune.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in json.loads((data / "tune.json").read_text())))
    by_array = read_conversations(data / "tune.json", data / "images")
    by_line = read_conversations(lines, data / "images")
    assert [(c.images, c.messages) for c in by_line] == [(c.images, c.messages) for c in by_array]


def test_published_shapes() -> None:
    """As LCS-558K, mix-665K, ShareGPT4V and LLaVA-NeXT's several pictures have them."""
    lcs = conversation(
        id="004539375",
        image="00453/004539375.jpg",
        conversations=turns("Render a clear and concise summary of the photo.\n<image>", "select luxury furniture"),
    )
    assert lcs.images == (Path("/pictures/00453/004539375.jpg"),)
    assert lcs.messages[0]["content"] == "<image>\nRender a clear and concise summary of the photo."
    mix = conversation(conversations=turns("<image>\nWhat?", "Red", "And?\nAnswer shortly.", "Blue"), extra=1)
    assert [m["role"] for m in mix.messages] == ["user", "assistant"] * 2
    text_only = to_conversation(
        Record(3, 1, 0, {"id": "wgByO4Y_0", "model": "", "conversations": turns("Hi", "Hello")}), Path("f"), Path("/p")
    )
    assert text_only.images == () and text_only.messages[1] == {"role": "assistant", "content": "Hello"}
    assert conversation(id=7, conversations=turns("<image>", "Red")).messages[0]["content"] == "<image>"
    later = conversation(conversations=turns("Hi", "Hello", "What? <image>", "Red"))
    assert later.messages[2]["content"] == "<image>\nWhat?"
    several = conversation(
        image=["a.png", "b.png", "c.png"],
        conversations=turns("From <image> to <image>?", "Red", "Now <image>", "Blue"),
    )
    assert several.images == tuple(Path("/pictures") / name for name in ("a.png", "b.png", "c.png"))
    assert [m["content"] for m in several.messages[::2]] == ["From <image> to <image>?", "<image>\nNow"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", r"bad\.json, line 1: not JSON"),
        ('[\n{"id": 1,}]', r"bad\.json, line 2: not JSON"),
        ({"a": 1}, "must be a list of conversations"),
        ([], "must be a list of conversations, and not empty"),
        (["text"], "sample 1: must be an object"),
        ([{**GOOD, "conversations": None}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": []}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": turns("<image>\nWhat?")}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": turns("<image>", "a", "b")}], SAMPLE + "its last turn is from 'human'"),
        ([{**GOOD, "conversations": turns("<image>\nWhat?", "  ")}], SAMPLE + "an empty answer"),
        ([{**GOOD, "conversations": turns("", "A bird.")}], SAMPLE + "an empty question"),
        ([{**GOOD, "conversations": [{"from": "human"}, {"from": "gpt"}]}], SAMPLE + "each turn must be"),
        ([{**GOOD, "conversations": turns("a", "<image>", "c", "d")[1:]}], SAMPLE + "a turn is from 'gpt' where 'human'"),
        ([{**GOOD, "conversations": turns("<image>", "a")[:1] * 2 + turns("", "b")[1:]}], "'human' where 'gpt'"),
        ([{**GOOD, "conversations": [{"from": "user", "value": "<image>"}, *turns("", "b")[1:]]}], "is from 'user'"),
        ([{**GOOD, "conversations": turns("What?", "A bird.")}], SAMPLE + "has 0 <image> and 1 picture"),
        ([{**GOOD, "conversations": turns("<image><image>", "A bird.")}], SAMPLE + "has 2 <image> and 1 picture"),
        ([{**GOOD, "image": ["0.png", "1.png"]}], SAMPLE + "has 1 <image> and 2 pictures"),
        ([{**GOOD, "conversations": turns("a", "<image>", "c", "d")}], SAMPLE + "has <image> in a gpt turn"),
        ([{**GOOD, "image": None}], SAMPLE + "has 1 <image> and 0 picture"),
        ([{**GOOD, "image": 3}], SAMPLE + '"image" must be one path or a list'),
        ([{**GOOD, "image": ["0.png", 3]}], SAMPLE + '"image" must be one path or a list'),
        ([{**GOOD, "image": None, "images": ["0.png"]}], SAMPLE + 'the key "images" is not read'),
        ([{**GOOD, "image": "absent.png"}], SAMPLE + r"its picture .*absent\.png does not exist"),
        ([{**GOOD, "image": "../align.json"}], SAMPLE + r"its picture '\.\./align\.json' lies outside"),
        ([{**GOOD, "image": "/etc/passwd"}], SAMPLE + "its picture '/etc/passwd' lies outside"),
        ([GOOD, {**GOOD, "id": "y"}, {"image": 3}], r"sample 3: \"conversations\" must be pairs .* \(line 1, byte \d+\)"),
    ],
)  # fmt: skip
def test_malformed_files(data: Path, tmp_path: Path, content: Any, message: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_conversations(bad, data / "images")


def test_turns_are_cut_to_what_can_be_learned() -> None:
    for values, kept in (
        (turns("", "Hello", "<image>", "a")[1:], turns("<image>", "a")),
        (turns("<image>", "a", "b"), turns("<image>", "a")),
        (turns("", "Hello", "<image>", "a", "b", "c", "d")[1:], turns("<image>", "a", "b", "c")),
    ):
        value = {**GOOD, "conversations": values}
        assert {fault.repair for fault in faults(value)} == {"cut turns"}
        cut = with_turns_cut(value)
        assert cut == {**GOOD, "conversations": kept} and faults(cut) == []
    assert {f.repair for f in faults({**GOOD, "conversations": turns("a", "b")[1:]})} == {"leave out"}


def test_missing_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        read_conversations(tmp_path / "absent.json", data / "images")
    with pytest.raises(InputError, match="absent: no such folder of pictures"):
        read_conversations(data / "tune.json", tmp_path / "absent")
