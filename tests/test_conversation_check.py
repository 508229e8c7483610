"""A LLaVA file with each fault there is, looked through; what is found is compared with what was put in, and with training."""

import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoTokenizer

from clips_core.config import load_config
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from llava_bridge import conversation_check
from llava_bridge.conversation_check import ConversationCheckConfig, check_conversations
from llava_bridge.llm import smollm2
from llava_bridge.records import read_conversations


def encoded(kind: str, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def record(identity: Any, image: Any = "coco/a.jpg", *values: str) -> dict[str, Any]:
    return {"id": identity, "image": image, "conversations": turns(*(values or ("<image>\nWhat?", "A bird.")))}


def put_pictures(images: Path) -> None:
    files = {
        "coco/a.jpg": encoded("JPEG"), "coco/b.png": encoded("PNG"), "coco/half.jpg": encoded("JPEG")[:1000],
        "coco/page.jpg": b"<html>404</html>", "coco/empty.png": b"", "ocr/as_jpg.jpg": encoded("GIF"),
        "ocr/782118577.gif": encoded("GIF"), "ocr/capital.JPG": encoded("JPEG"), "ocr/broken.png": encoded("PNG")[:50],
    }  # fmt: skip
    for name, data in files.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(data)


LEAVE_OUT = {  # id → the causes for which a record cannot be used
    "missing": (record("missing", "coco/absent.jpg"), ["missing picture"]),
    "half": (record("half", "coco/half.jpg"), ["damaged picture"]),
    "page": (record("page", "coco/page.jpg"), ["not a picture"]),
    "empty file": (record("empty file", "coco/empty.png"), ["not a picture"]),
    "folder": (record("folder", "coco"), ["missing picture"]),
    "other broken": (record("other broken", "ocr/broken.jpg"), ["damaged picture"]),
    "one of two": (record("one of two", ["coco/a.jpg", "coco/absent.jpg"], "<image><image>", "b"), ["missing picture"]),
    "outside": (record("outside", "../secret.jpg"), ["picture outside the folder"]),
    "more": (record("more", "coco/a.jpg", "<image> <image>", "b"), ["more marks than pictures"]),
    "fewer": (record("fewer", "coco/a.jpg", "a", "b"), ["fewer marks than pictures"]),
    "text": (record("text", None, "<image>\na", "b"), ["mark without a picture"]),
    "answer": (record("answer", "coco/a.jpg", "a", "<image> b"), ["mark in an answer"]),
    "blank": (record("blank", None, "a", " \n"), ["empty answer"]),
    "both": (record("both", "coco/a.jpg", "", "b"), ["empty question", "fewer marks than pictures"]),
    "role": ({"id": "role", "conversations": [{"from": "system", "value": "x"}, *turns("a", "b")]}, ["unknown role"]),
    "order": ({"id": "order", "conversations": [*turns("a", "b"), *turns("c", "d")[1:]]}, ["roles out of order"]),
    "lonely": ({"id": "lonely", "conversations": turns("a")}, ["no answer"]),
    "turnless": ({"id": "turnless", "conversations": []}, ["no turns"]),
    "no text": ({"id": "no text", "conversations": [{"from": "human", "value": 3}]}, ["not a turn"]),
    "number": (record("number", 5), ["image is no path"]),
    "images": ({"id": "images", "images": ["coco/a.jpg"], "conversations": turns("<image>", "b")},
               ["pictures under another key", "mark without a picture"]),
}  # fmt: skip
CHANGED = {  # id → a record, the cause, what it becomes
    "gif": (record("gif", "ocr/782118577.jpg"), "other extension", record("gif", "ocr/782118577.gif")),
    "two": (record("two", ["ocr/capital.jpg", "coco/a.jpg"], "<image><image>", "b"), "other extension",
            record("two", ["ocr/capital.JPG", "coco/a.jpg"], "<image><image>", "b")),
    "late": (record("late", None, "a", "b", "c"), "ends with a question", record("late", None, "a", "b")),
    "early": ({"id": "early", "conversations": turns("", "b", "c", "d")[1:]}, "begins with an answer",
              {"id": "early", "conversations": turns("c", "d")}),
}  # fmt: skip
KEPT = {  # id → a record, the cause of a remark or none
    "good": (record("good"), None),
    "multi": (record("multi", "coco/b.png", "<image>\nWhat?", "A", "And?", "B"), None),
    "plain text": ({"id": "plain text", "model": "", "conversations": turns("Hi", "Hello — é")}, None),
    "gif inside": (record("gif inside", "ocr/as_jpg.jpg"), "content differs from extension"),
    7: (record(7), None),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """pictures/ and conversations in one line, pretty and as lines."""
    put_pictures(tmp_path / "pictures")
    entries = [entry for group in (LEAVE_OUT, KEPT, CHANGED) for entry, *_ in group.values()] + [record("good"), "text"]
    entries = [entries[i] for i in np.random.default_rng(0).permutation(len(entries))]
    (tmp_path / "line.json").write_text(json.dumps(entries, ensure_ascii=False))
    (tmp_path / "pretty.json").write_text(json.dumps(entries, indent=2))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"id": \n')
    return tmp_path


def config(data: Path, name: str = "line.json", **changes: Any) -> ConversationCheckConfig:
    settings = {
        "json": data / name,
        "images": data / "pictures",
        "out": data / "out",
        "workers": 1,
        "max_dropped_share": 1,
    }
    return ConversationCheckConfig(**{**settings, **changes})


def findings(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]


def test_each_fault_is_found_where_it_is(data: Path) -> None:
    expected = Counter((identity, cause) for identity, (_, causes) in LEAVE_OUT.items() for cause in causes)
    expected += Counter((identity, cause) for identity, (_, cause, _) in CHANGED.items())
    expected += Counter((identity, cause) for identity, (_, cause) in KEPT.items() if cause)
    expected += Counter([("good", "id occurs twice"), (None, "not an object")])
    for name in ("line.json", "pretty.json", "lines.jsonl"):
        out = check_conversations(config(data, name, out=data / f"out {name}"))
        found = findings(out)
        more = [(None, "not JSON")] if name == "lines.jsonl" else []
        assert Counter((f["id"], f["cause"]) for f in found) == expected + Counter(more)
        raw = (data / name).read_bytes()
        for f in found:
            if f["cause"] == "not JSON":
                assert raw[f["byte"] :] == b'{"id": \n'
                continue
            value = json.JSONDecoder().raw_decode(raw[f["byte"] :].decode())[0]
            assert (value["id"] if isinstance(value, dict) else None) == f["id"]
            assert f["line"] == raw[: f["byte"]].count(b"\n") + 1
            if name != "lines.jsonl":
                assert json.loads(raw)[f["element"] - 1] == value
        report = json.loads((out / "report.json").read_text())
        assert report["records"] == len(LEAVE_OUT) + len(CHANGED) + len(KEPT) + 2 + len(more)
        assert report["left_out"] == len(LEAVE_OUT) + 1 + len(more)
        assert report["repairable"] == len(CHANGED)
        assert report["usable"] == len(CHANGED) + len(KEPT) + 1
        assert not (out / "dropped.jsonl").exists()


@pytest.mark.parametrize("name", ["line.json", "lines.jsonl"])
def test_the_repaired_file_is_what_training_takes(data: Path, name: str) -> None:
    with pytest.raises(InputError):
        read_conversations(data / name, data / "pictures")
    out = check_conversations(config(data, name, apply=True))
    repaired = out / f"conversations{Path(name).suffix}"
    text = repaired.read_text()
    entries = json.loads(text) if name == "line.json" else [json.loads(line) for line in text.splitlines()]
    by_id = {entry["id"]: entry for entry in entries}
    assert by_id == {**{i: e for i, (e, _) in KEPT.items()}, **{i: new for i, (_, _, new) in CHANGED.items()}}
    assert len(entries) == len(KEPT) + len(CHANGED) + 1
    assert len(read_conversations(repaired, data / "pictures")) == len(entries)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {row["id"] for row in dropped} == {*LEAVE_OUT, None}
    raw = (data / name).read_bytes()
    manifest = read_manifest(out, "check_conversations")
    assert manifest["inputs"] == {"data": hashlib.sha256(raw).hexdigest()}
    assert manifest["outputs"]["repaired"] == {
        "file": repaired.name, "sha256": hashlib.sha256(repaired.read_bytes()).hexdigest(),
        "records": len(entries), "left_out": len(dropped),
    }  # fmt: skip
    again = check_conversations(config(data, json=repaired, out=data / "again"))
    assert json.loads((again / "report.json").read_text())["leave_out"] == {}
    assert {f["cause"] for f in findings(again)} == {"content differs from extension", "id occurs twice"}


def test_an_earlier_repaired_file_does_not_outlive_its_check(data: Path) -> None:
    out = check_conversations(config(data, apply=True))
    check_conversations(config(data))
    assert not (out / "conversations.json").exists() and not (out / "dropped.jsonl").exists()
    assert "repaired" not in read_manifest(out)["outputs"]


# -------------------------------------------------------------------------------------------------------------- resuming


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "manifest.json"}


def test_interrupted_and_run_again_is_as_if_nothing_had_happened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("SLICE", 4), ("PICTURES", 2)):
        monkeypatch.setattr(conversation_check, name, size)
    check_conversations(config(data, out=data / "whole", apply=True))
    looks: list[str] = []
    for function in ("_look_at_record", "_fault_of_file"):
        really = getattr(conversation_check, function)
        for until in (7, 3):

            def interrupted(*arguments: Any, really: Any = really, n: int = until) -> Any:
                looks.append("look")
                if len(looks) == n:
                    raise KeyboardInterrupt
                return really(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(conversation_check, function, interrupted)
                looks.clear()
                with pytest.raises(KeyboardInterrupt):
                    check_conversations(config(data, apply=True))
    assert not (data / "out" / "manifest.json").exists()
    check_conversations(config(data, apply=True))
    assert outputs(data / "out") == outputs(data / "whole")


def test_only_what_changed_is_looked_at_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_conversations(config(data))
    seen: list[str] = []
    really = conversation_check._fault_of_file
    monkeypatch.setattr(
        conversation_check, "_fault_of_file", lambda images, name: (seen.append(name), really(images, name))[1]
    )
    (data / "pictures/coco/absent.jpg").write_bytes(encoded("JPEG", 1))
    (data / "pictures/coco/half.jpg").write_bytes(encoded("JPEG", 2))
    os.remove(data / "pictures/coco/b.png")
    out = check_conversations(config(data))
    # Those under another extension are looked for anew, since their own name stands for no file.
    assert sorted(seen) == [
        "coco/absent.jpg",
        "coco/half.jpg",
        "ocr/782118577.gif",
        "ocr/broken.png",
        "ocr/capital.JPG",
    ]
    causes = ("missing picture", "damaged picture", "not a picture")
    bad = {f["id"] for f in findings(out) if f["cause"] in causes}
    assert bad == {"page", "empty file", "folder", "other broken", "multi"}
    monkeypatch.undo()
    fresh = check_conversations(config(data, out=data / "fresh"))
    assert outputs(out) == outputs(fresh)


def test_any_number_of_workers_gives_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_check, "PICTURES", 2)
    for workers in (1, 2):
        check_conversations(config(data, out=data / f"by {workers}", workers=workers, apply=True))
    assert outputs(data / "by 1") == outputs(data / "by 2")


# --------------------------------------------------------------------------------------------------------------- lengths


def test_lengths_are_those_of_training(tmp_path: Path) -> None:
    put_pictures(tmp_path / "pictures")
    short = record("short")
    long = record("long", "coco/a.jpg", "<image>\nWhat?", "A bird. " * 40, "And?", "No.")
    two = record("two", ["coco/a.jpg", "coco/b.png"], "<image><image>", "Same.")
    read_only = record("read only", None, "word " * 200, "Yes.")
    beyond = record("beyond", "coco/a.jpg", "word " * 200, "Yes.", "<image>", "No.")
    special = record("special", None, "What ends a turn?", "<|im_end|> does.")
    (tmp_path / "some.json").write_text(json.dumps([short, long, two, read_only, beyond, special]))
    settings: dict[str, Any] = {"llm": str(smollm2()), "image_tokens": 36, "max_length": 150}
    out = check_conversations(config(tmp_path, "some.json", **settings))
    tokenizer = AutoTokenizer.from_pretrained(smollm2())

    def length(entry: dict[str, Any]) -> int:
        """The template rendered by transformers alone; each mark is replaced by the tokens of a picture."""
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[t["from"]], "content": t["value"].strip()} for t in entry["conversations"]]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        words = sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in text.split("<image>"))
        return words + 36 * text.count("<image>")

    found = {f["id"]: (f["cause"], f["repair"], f["detail"]) for f in findings(out)}
    lost = length(long) - 150
    assert found["long"] == (
        "longer than max_length", "none", f"{length(long)} tokens: {lost} are cut at max_length 150"
    )  # fmt: skip
    assert found["read only"][:2] == ("nothing to learn", "leave out")
    assert found["beyond"][:2] == ("picture beyond max_length", "leave out")
    assert found["special"][:2] == ("special token in the words", "none")
    assert found.keys() == {"long", "read only", "beyond", "special"}
    tokens = json.loads((out / "report.json").read_text())["tokens"]
    lengths = [length(entry) for entry in (short, long, two, read_only, beyond, special)]
    assert (tokens["n"], tokens["min"], tokens["max"]) == (6, min(lengths), max(lengths))
    assert tokens["mean"] == pytest.approx(np.mean(lengths), abs=0.01)

    captions = check_conversations(config(tmp_path, "some.json", **settings, template="plain", out=tmp_path / "plain"))
    causes = {f["id"]: f["cause"] for f in findings(captions) if f["repair"] == "leave out"}
    assert causes == {
        "long": "not one caption", "two": "not one caption", "read only": "no picture", "beyond": "not one caption",
        "special": "no picture",
    }  # fmt: skip


def test_a_shipped_template_is_checked_with(tmp_path: Path) -> None:
    put_pictures(tmp_path / "pictures")
    (tmp_path / "some.json").write_text(json.dumps([record("a")]))
    lengths = {}
    for prompt in (None, "Be brief, and very polite."):
        out = tmp_path / f"out {prompt}"
        settings = {"llm": "smollm2", "template": "chatml", "system_prompt": prompt, "out": out}
        check_conversations(config(tmp_path, "some.json", **settings))
        lengths[prompt] = json.loads((out / "report.json").read_text())["tokens"]["max"]
        assert findings(out) == []
    assert 0 < lengths[None] < lengths["Be brief, and very polite."]


# ---------------------------------------------------------------------------------------------------------------- layout


def test_a_missing_source_is_named_with_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_pictures(tmp_path / "pictures")
    sources = [
        {"name": "COCO", "folders": {"coco": 5}, "records": 3, "origin": "http://coco"},
        {"name": "Text", "folders": {"text/train": 2}, "records": 2, "origin": "http://text"},
        {"name": "Genome", "folders": {"vg/one": 4, "vg/two": None}, "records": None, "origin": "http://genome"},
    ]
    layout = {"name": "small", "records": 8, "text_only": 1, "sources": sources}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(layout))
    entries = [record(1), record(2), record(3, "text/train/a.jpg"), record(4, "text/train/b.jpg"),
               record(5, "vg/two/c.jpg"), record(6, "ocr/as_jpg.jpg"), record(7, None, "a", "b"),
               record(8, "coco/absent.jpg")]  # fmt: skip
    (tmp_path / "some.json").write_text(json.dumps(entries))
    (tmp_path / "pictures/vg/two").mkdir(parents=True)
    (tmp_path / "pictures/vg/two/c.jpg").write_bytes(encoded("JPEG"))
    check = config(tmp_path, "some.json", layout=str(tmp_path / "small.yaml"), max_dropped_share=0.2, apply=True)
    with pytest.raises(
        InputError, match=r"3 of 8 records .* the folders of Text, Genome are missing; .* nothing was repaired"
    ):
        check_conversations(check)
    report = json.loads((check.out / "report.json").read_text())
    coco, text, genome = report["sources"]
    assert (coco["records"], coco["records_without_picture"], coco["files"]) == (3, 1, {"coco": 5})
    assert (text["records"], text["records_without_picture"], text["missing_folders"]) == (2, 2, ["text/train"])
    assert (genome["records"], genome["missing_folders"]) == (1, ["vg/one"])
    assert report["layout"] == {
        "name": "small", "records": 8, "expected_records": 8, "text_only": 1, "expected_text_only": 1,
        "records_of_other_folders": 1,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "Text: 2 records (of 2), 2 of them without their picture; text/train 0 files (of 2)" in printed
    assert "text/train is missing: get it from http://text" in printed
    assert not (check.out / "conversations.json").exists()


def test_the_shipped_layouts_parts_make_its_whole() -> None:
    layout = conversation_check._read_layout("mix665k")
    assert [source.name for source in layout.sources] == [
        "COCO train2017",
        "GQA",
        "OCR-VQA",
        "TextVQA",
        "Visual Genome",
    ]
    assert sum(source.records or 0 for source in layout.sources) + (layout.text_only or 0) == layout.records == 665_298
    # The number that a user counted who had downloaded it all.
    assert sum(count or 0 for source in layout.sources for count in source.folders.values()) == 608_081
    folders = [folder for source in layout.sources for folder in source.folders]
    assert folders == [
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    ]


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"json": "absent.json"}, "absent.json: no such file"),
        ({"images": "absent"}, "absent: no such folder of pictures"),
        ({"layout": "mix666k"}, "no layout 'mix666k': give a .yaml file or one of mix665k"),
        ({"template": "chatml"}, "say nothing without a tokenizer: set llm too"),
        ({"llm": "smollm2", "template": "chatlm"}, "no chat template 'chatlm': take one of chatml"),
        ({"llm": "absent"}, "language model 'absent': no such folder"),
        ({"out": "pictures"}, "pictures: is there already and holds something else"),
        ({"max_dropped_share": 0.01}, r"\d+ of \d+ records cannot be used, more than max_dropped_share=0.01 allows"),
    ],
)
def test_bad_settings(data: Path, changes: dict[str, Any], message: str) -> None:
    paths = {key: data / value if key in ("json", "images", "out") else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        check_conversations(config(data, **paths))


def test_an_array_that_is_cut_off_is_placed(data: Path) -> None:
    file = data / "line.json"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"line\.json, line 1: not JSON \(the file is cut off\), at byte \d+, in sample 32"
    ):
        check_conversations(config(data))


def test_settings_come_from_a_command_line() -> None:
    loaded = load_config(ConversationCheckConfig, None, ["json=a.json", "images=i", "out=o", "apply=true", "workers=3"])
    assert (loaded.json, loaded.apply, loaded.workers, loaded.image_tokens) == (Path("a.json"), True, 3, 576)
    with pytest.raises(InputError, match="unknown key 'max_lenght'"):
        load_config(ConversationCheckConfig, None, ["json=a", "images=i", "out=o", "max_lenght=3"])
