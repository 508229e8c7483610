"""Synthetic captions for one's own shards, by a real model and by a real server that misbehaves in every way it can."""

import fcntl
import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset
from caption_samples import TEST_PICTURE, Server, caption_of, completion, failure, numbered_picture, save_talker
from PIL import Image

from clips_core.captioners import LocalModel, Request, judge
from clips_core.config import PretrainConfig, load_config
from clips_core.data import PretrainDataset
from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest
from clips_core.recaption import RecaptionConfig, parse_part, recaption, sample_seed
from clips_core.shards import write_shard
from clips_core.tokenizer import ClipsTokenizer

KEY = "sk-secret-0123456789"


def as_bytes(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A sample as img2dataset writes it, its picture numbered; a file of None is left out."""
    files = {
        "png": as_bytes(numbered_picture(number)),
        "txt": f"grey {number}",
        "json": {"url": f"https://example.org/{number}", "caption": f"grey {number}", "width": 12},
        **changes,
    }
    return {"__key__": f"{number:09d}", **{name: value for name, value in files.items() if value is not None}}


def put_shards(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        write_shard(samples, folder / f"{number:05d}.tar")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four samples: numbers 0 to 11."""
    return put_shards(tmp_path / "in", *([sample(4 * shard + i) for i in range(4)] for shard in range(3)))


def config(shards: Path | str, out: Path, server: Server | None = None, **values: Any) -> RecaptionConfig:
    if server is not None:
        values = {"endpoint": server.url, "endpoint_model": "grey-7b", "concurrency": 4, "retry_wait": 0.01} | values
    return RecaptionConfig(**{"shards": shards, "out": out, **values})


def stock_read(folder: Path) -> dict[str, dict[str, Any]]:
    """The samples as the webdataset library reads them, by key, their json parsed."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = {each["__key__"]: each for each in webdataset.WebDataset(urls, shardshuffle=False)} if urls else {}
    return {key: each | ({"json": json.loads(each["json"])} if "json" in each else {}) for key, each in read.items()}


def captions(folder: Path) -> dict[int, str | None]:
    return {int(key): each["json"].get("re_caption") for key, each in stock_read(folder).items()}


def stats(folder: Path, name: str = "00000") -> dict[str, Any]:
    return dict(read_json(folder / f"{name}.stats.json"))


def results(folder: Path) -> dict[str, bytes]:
    """All files but those that hold times, addresses or settings of the run."""
    paths = sorted(path for path in folder.iterdir() if path.name not in ("manifest.json", "recaption.json"))
    return {path.name: path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------------------------------ what comes out


def test_every_sample_gets_the_caption_of_its_own_picture(shards: Path, tmp_path: Path, capsys: Any) -> None:
    with Server(delay=0.05) as server:
        out = recaption(config(shards, tmp_path / "out", server))
        assert sorted(server.asked) == list(range(12)) and 1 < server.most_at_once <= 4
    before, after = stock_read(shards), stock_read(out)
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    assert list(after) == list(before)
    for key, new in after.items():
        assert new["json"] == before[key]["json"] | {"re_caption": caption_of(int(key))}
        assert (new["png"], new["txt"]) == (before[key]["png"], before[key]["txt"])
    totals = read_manifest(out, "recaption")["outputs"]
    assert (totals["shards"], totals["samples"], totals["captioned"]) == (3, 12, 12)
    assert (totals["mean_words"], totals["median_sentences"]) == (20.0, 3)
    assert sorted(results(out)) == [f"0000{i}.{kind}" for i in range(3) for kind in ("stats.json", "tar")]
    said = capsys.readouterr().out
    assert said.count(f"pictures are sent to {server.host}") == 1 and "12 captions of 20.0 words" in said


def test_pretraining_reads_the_result(shards: Path, tmp_path: Path) -> None:
    with Server() as server:
        out = recaption(config(shards, tmp_path / "out", server))
    settings = [
        f"out={tmp_path / 'run'}", f"data.train={out}", "data.synthetic_caption=json.re_caption", "data.workers=0",
        "model={image_size: 8, patch_size: 8, embed_dim: 16, learnable_tokens: 48, vision: {width: 32, layers: 1, heads: 2},"
        " text: {width: 32, layers: 1, heads: 2}, decoder: {width: 32, layers: 1, heads: 2}}",
        "samples=12", "batch_size=4", "learning_rate=1e-3",
    ]  # fmt: skip
    tokenizer = ClipsTokenizer()
    dataset = PretrainDataset(load_config(PretrainConfig, None, settings), tokenizer)
    samples = [dataset[position] for position in range(12)]
    assert not any(isinstance(each, InputError) or each["skipped"] for each in samples)
    wanted = {tuple(tokenizer.encode_target(caption_of(number), 48)) for number in range(12)}
    assert {tuple(each["target"]) for each in samples if isinstance(each, dict)} == wanted


def test_a_request_is_as_the_protocol_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    numbered_picture(3, size=(400, 100)).save(buffer, "JPEG", exif=turned)
    folder = put_shards(tmp_path / "in", [sample(3, png=None, jpg=buffer.getvalue(), txt="  a {grey}\nthing ")])
    monkeypatch.setenv("MY_KEY", KEY)
    settings = {
        "api_key_env": "MY_KEY", "max_side": 40, "max_new_tokens": 77, "prompt": "Web: {caption}. Describe it.",
        "extra": {"max_tokens": None, "max_completion_tokens": 78, "chat_template_kwargs": {"enable_thinking": False}},
    }  # fmt: skip
    with Server() as server:
        recaption(config(folder, tmp_path / "out", server, **settings))
    [body], [headers], [picture] = server.bodies, server.headers, server.pictures
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert picture.format == "JPEG" and picture.size == (10, 40)  # upright, and no side longer than 40
    [message] = body.pop("messages")
    assert message["content"][0]["type"] == "image_url"
    assert message["content"][1] == {"type": "text", "text": "Web: a {grey} thing. Describe it."}
    assert body == {
        "model": "grey-7b", "max_completion_tokens": 78, "temperature": 0.0,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_a_draw_has_a_seed_of_its_own(shards: Path, tmp_path: Path) -> None:
    seeds = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        with Server() as server:
            recaption(config(shards, tmp_path / run, server, temperature=0.5, seed=seed))
        seeds.append({number: body["seed"] for number, body in zip(server.asked, server.bodies, strict=True)})
        assert {body["temperature"] for body in server.bodies} == {0.5}
    assert seeds[0] == seeds[1] and len(set(seeds[0].values()) | set(seeds[2].values())) == 24


def test_captions_that_are_none_are_asked_for_once_more(tmp_path: Path) -> None:
    """Second answers help 1 and 2; 3 and 4 stay without; 5 is trimmed and needs no second."""
    answers: dict[int, list[tuple[int, dict[str, str], bytes]]] = {
        1: [completion("I'm sorry, I can't help with that."), completion("A thing. It is grey.")],
        2: [completion(None), completion("Grey. Very grey. And no mo", "length")],
        3: [completion("grey " * 60, "length"), completion("grey " * 60 + ".")],
        4: [completion("", "content_filter")] * 2,
        5: [completion("A grey thing. It has no", "length")],
    }
    folder = put_shards(tmp_path / "in", [sample(number) for number in range(10)])
    with Server(lambda number, before: answers[number][before] if number in answers else None) as server:
        out = recaption(config(folder, tmp_path / "out", server, max_bad_share=0.2))
    assert Counter(server.asked) == {number: 2 if number in (1, 2, 3, 4) else 1 for number in range(10)}
    again = [body for i, body in enumerate(server.bodies) if server.asked[i] in server.asked[:i]]
    assert all(body["temperature"] == 0.7 and "seed" in body for body in again)
    there = captions(out)
    assert [there[number] for number in range(1, 6)] == [
        "A thing. It is grey.", "Grey. Very grey.", None, None, "A grey thing.",
    ]  # fmt: skip
    counts = stats(out)
    assert counts["asked_twice"] == {"refusal": 2, "empty": 1, "cut off": 1}
    assert (counts["captioned"], counts["trimmed"]) == (8, 2)
    assert counts["uncaptioned"] == {"repetition": 1, "refusal": 1}
    rows = [json.loads(line) for line in (out / "00000.without.jsonl").read_text().splitlines()]
    assert {(row["key"], row["cause"], row["retried"]) for row in rows} == {
        ("000000003", "repetition", "cut off"), ("000000004", "refusal", "refusal"),
    }  # fmt: skip


def test_single_sentences_are_warned_about(shards: Path, tmp_path: Path, capsys: Any) -> None:
    with Server(lambda number, before: completion("A grey picture")) as server:
        recaption(config(shards, tmp_path / "out", server))
    assert "warning: most captions are a single sentence" in capsys.readouterr().out


def test_captions_that_are_there_are_kept(tmp_path: Path) -> None:
    """So a second model can fill the gaps that the first one has left."""
    old = {"re_caption": "An old one. It stays."}
    folder = put_shards(
        tmp_path / "in", [sample(0), sample(1, json=old), sample(2, json={"re_caption": " "}), sample(3, json=None)]
    )
    with Server() as server:
        out = recaption(config(folder, tmp_path / "out", server))
        assert sorted(server.asked) == [0, 2, 3]
        assert captions(out) == {0: caption_of(0), 1: "An old one. It stays.", 2: caption_of(2), 3: caption_of(3)}
        assert (stats(out)["kept"], stats(out)["captioned"]) == (1, 3)
        other = recaption(config(folder, tmp_path / "other", server, field="grey_caption"))
        assert stock_read(other)["000000001"]["json"] == old | {"grey_caption": caption_of(1)}


# ---------------------------------------------------------------------------------------------------------- bad samples


def bad_shard(folder: Path) -> Path:
    """Five bad samples among sixteen."""
    whole = as_bytes(Image.effect_noise((64, 64), 50))
    samples = [sample(number) for number in range(16)]
    samples[1]["png"] = whole[: len(whole) // 2]
    samples[4]["png"] = b"<html>404</html>"
    samples[7] = sample(7, png=None)
    samples[9]["json"] = b"{not json"
    samples[12]["json"] = ["a list"]
    return put_shards(folder, samples)


def test_bad_samples_are_left_out_counted_and_named(tmp_path: Path, capsys: Any) -> None:
    with Server() as server:
        out = recaption(config(bad_shard(tmp_path / "in"), tmp_path / "out", server, max_bad_share=5 / 16))
    good = sorted(set(range(16)) - {1, 4, 7, 9, 12})
    assert sorted(server.asked) == good == sorted(captions(out))
    assert stats(out)["skipped"] == {
        "json cannot be read": 2, "damaged picture": 1, "not a picture": 1, "no picture": 1,
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "00000.without.jsonl").read_text().splitlines()]
    assert [int(row["key"]) for row in rows] == [1, 4, 7, 9, 12]
    assert "5 left out (2 × json cannot be read" in capsys.readouterr().out


def test_too_many_bad_samples_stop_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    folder, out = bad_shard(tmp_path / "in"), tmp_path / "out"
    with Server() as server:
        with pytest.raises(InputError, match=r"5 of 16 samples have no caption .*max_bad_share=0\.3 .*key '0000000"):
            recaption(config(folder, out, server, max_bad_share=0.3))
        assert not list(out.glob("*.tar"))
        recaption(config(folder, out, server, max_bad_share=0.4))
        assert len(server.asked) <= 11 + 3  # those under way at the stop are asked again
    assert len(captions(out)) == 11


def test_of_a_cut_off_shard_the_whole_samples_are_captioned(shards: Path, tmp_path: Path, capsys: Any) -> None:
    data = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(data[: len(data) // 2])
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    with Server() as server:
        with pytest.raises(InputError, match=r"1 shards hold no whole sample: .*00002\.tar"):
            recaption(config(shards, tmp_path / "out", server))
        found = captions(tmp_path / "out")
        assert 4 < len(found) < 8 and all(text == caption_of(number) for number, text in found.items())
        assert stats(tmp_path / "out", "00001")["damage"].startswith("cut-off tar")
        assert "1 of 3 shards are not done" in capsys.readouterr().out
        write_shard([sample(20)], shards / "00002.tar")  # fetched again
        recaption(config(shards, tmp_path / "out", server))
    assert captions(tmp_path / "out")[20] == caption_of(20) and max(Counter(server.asked).values()) == 1
    assert read_manifest(tmp_path / "out")["outputs"]["damaged_shards"] == 1


# ------------------------------------------------------------------------------------------------------- a bad server


def test_what_passes_is_tried_again(shards: Path, tmp_path: Path) -> None:
    """Once each: 429, 500, 503, half a JSON, no choices, a list for a text, an answer that is too slow."""

    def behave(number: int, before: int) -> tuple[int, dict[str, str], bytes] | None:
        if before:
            return None
        if number == 6:
            time.sleep(1.0)
        return {
            0: failure(429, "slow down"), 1: failure(500, "oh"), 2: failure(503, "loading"), 3: (200, {}, b'{"choices": ['),
            4: (200, {}, b'{"choices": []}'), 5: (200, {}, b'{"choices": [{"message": {"content": [1]}}]}'),
        }.get(number)  # fmt: skip

    with Server(behave) as server:
        out = recaption(config(shards, tmp_path / "out", server, timeout=0.6))
    assert captions(out) == {number: caption_of(number) for number in range(12)}
    assert Counter(server.asked) == {number: 2 if number < 7 else 1 for number in range(12)}


def test_retry_after_holds_all_requests_back(shards: Path, tmp_path: Path) -> None:
    refused: list[float] = []

    def behave(number: int, before: int) -> tuple[int, dict[str, str], bytes] | None:
        if number == 0 and not before:
            refused.append(time.monotonic())
            return failure(429, "slow down", Retry_After="0.5")
        return None

    with Server(behave) as server:
        recaption(config(shards, tmp_path / "out", server, concurrency=2))
    pause = [moment - refused[0] for moment in server.times if moment > refused[0]]
    assert sum(gap < 0.45 for gap in pause) <= 1  # what was on its way already


def test_a_server_that_wants_to_rest_for_hours_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with (
        Server(lambda *_: failure(429, "Quota used up", Retry_After="86400")) as server,
        pytest.raises(InputError, match=r"HTTP 429: Quota used up; it asks to wait 86400 s; lower concurrency"),
    ):
        recaption(config(shards, tmp_path / "out", server))
    assert len(server.asked) <= 4


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Incorrect API key provided: [key]; is the key in the variable that api_key_env names"),
        (403, "Incorrect API key provided: [key]"),
        (404, "Incorrect API key provided: [key]; does the address end in /v1"),
    ],
)
def test_a_refusal_stops_at_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        Server(lambda *_: failure(status, f"Incorrect API key provided: {KEY}")) as server,
        pytest.raises(InputError) as raised,
    ):
        recaption(config(shards, tmp_path / "out", server, api_key_env="MY_KEY"))
    assert f"HTTP {status}: {message}" in str(raised.value) and KEY not in str(raised.value)
    assert len(server.asked) <= 4  # as many as were under way


def test_a_request_that_no_picture_passes_stops_soon(shards: Path, tmp_path: Path) -> None:
    with (
        Server(lambda *_: failure(400, "max_tokens is too large")) as server,
        pytest.raises(InputError, match="HTTP 400: max_tokens is too large; captions so far are kept"),
    ):
        recaption(config(shards, tmp_path / "out", server))
    assert server.asked.count(TEST_PICTURE) == 1 and len(server.asked) <= 8
    assert not any("captioned" in line for line in (tmp_path / "out" / "00000.captions.jsonl").read_text().splitlines())


@pytest.mark.parametrize("poison", [0, 11])
@pytest.mark.parametrize("answer", [failure(400, "cannot decode the image"), failure(500, "CUDA error")])
def test_a_picture_that_the_server_fails_on_spoils_no_other(
    shards: Path, tmp_path: Path, poison: int, answer: tuple[int, dict[str, str], bytes]
) -> None:
    with Server(lambda number, before: answer if number == poison else None) as server:
        out = recaption(config(shards, tmp_path / "out", server, retries=2, max_bad_share=1))
    assert captions(out) == {number: None if number == poison else caption_of(number) for number in range(12)}
    assert server.asked.count(poison) == (1 if answer[0] == 400 else 3)
    [row] = [json.loads(line) for line in (out / f"{poison // 4:05d}.without.jsonl").read_text().splitlines()]
    assert row["cause"] == f"HTTP {answer[0]}" and row["detail"] in ("cannot decode the image", "CUDA error")


def test_a_server_that_breaks_down_costs_no_picture_its_caption(shards: Path, tmp_path: Path) -> None:
    with Server(lambda number, before: failure(500, "out of memory") if number > 4 or number < 0 else None) as server:
        with pytest.raises(InputError, match="HTTP 500: out of memory"):
            recaption(config(shards, tmp_path / "out", server, retries=1))
        assert server.asked.count(TEST_PICTURE) == 2
    assert set(captions(tmp_path / "out")) >= {0, 1, 2, 3}
    with Server() as server:
        recaption(config(shards, tmp_path / "out", server))
        assert 0 < len(server.asked) < 9 and min(server.asked) >= 4
    assert captions(tmp_path / "out") == {number: caption_of(number) for number in range(12)}


def test_no_server_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with Server() as server:
        pass
    with pytest.raises(InputError, match=r"no connection: .*tried 3 times; is the server running\?"):
        recaption(config(shards, tmp_path / "out", server, retries=2))


def test_pictures_follow_no_redirect(shards: Path, tmp_path: Path) -> None:
    with (
        Server() as other,
        Server(lambda *_: (307, {"Location": f"{other.url}/chat/completions"}, b"")) as server,
        pytest.raises(InputError, match=f"it redirects to {other.url}"),
    ):
        recaption(config(shards, tmp_path / "out", server))
    assert other.asked == []


def test_the_key_is_nowhere(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Not even where the server says it back."""
    monkeypatch.setenv("MY_KEY", KEY)
    echo = f"The sign says {KEY}. It is grey."

    def behave(number: int, before: int) -> tuple[int, dict[str, str], bytes] | None:
        return {0: completion(echo), 1: failure(400, f"key {KEY}"), 2: None if before else (200, {}, KEY.encode())}.get(
            number
        )

    with Server(behave) as server:
        out = recaption(config(shards, tmp_path / "out", server, api_key_env="MY_KEY", max_bad_share=1))
    assert captions(out)[0] == "The sign says [key]. It is grey." and server.asked.count(2) == 2
    said = capsys.readouterr()
    everything = [path.read_bytes() for path in out.iterdir()] + [said.out.encode(), said.err.encode()]
    assert len(everything) > 8 and not any(KEY.encode() in data for data in everything)
    with Server() as server, pytest.raises(InputError, match="no environment variable NO_KEY, or it is empty"):
        recaption(config(shards, tmp_path / "other", server, api_key_env="NO_KEY"))


# ---------------------------------------------------------------------------------------- kills, parts, several processes

RUN = """
import sys, json
from clips_core.recaption import RecaptionConfig, recaption
recaption(RecaptionConfig(**json.loads(sys.argv[1])))
"""


def start(shards: Path, out: Path, server: Server, **values: Any) -> "subprocess.Popen[str]":
    settings = {
        "shards": str(shards), "out": str(out), "endpoint": server.url, "endpoint_model": "grey-7b", "concurrency": 3, **values,
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(settings)], text=True, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the process ended or did nothing"
        time.sleep(0.01)


def journalled(out: Path) -> set[int]:
    """The numbers whose outcome is on the disk, in journals and finished shards."""
    found = set(captions(out))
    for journal in out.glob("*.captions.jsonl"):
        whole = journal.read_text().split("\n")[1:-1]
        found |= {int(json.loads(line)["key"]) for line in whole}
    return found


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    folder = put_shards(tmp_path / "in", *([sample(12 * shard + i) for i in range(12)] for shard in range(3)))
    with Server(delay=0.05) as server:
        recaption(config(folder, tmp_path / "never killed", server))
    out = tmp_path / "out"
    with Server(delay=0.1) as server:
        process = start(folder, out, server)
        try:
            wait_for(lambda: (out / "00000.tar").exists() and len(server.asked) >= 20, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        there = journalled(out)
        first = len(server.asked)
        assert 12 <= len(there) < 36
        [journal] = out.glob("*.captions.jsonl")
        with open(journal, "a") as file:
            file.write('{"number": 11, "key": "0000')  # as a kill in the middle of a write leaves it
        recaption(config(folder, out, server))
        assert not there & set(server.asked[first:])
        assert len(server.asked) <= 36 + 3  # what was under way is asked again, and no more
    assert results(out) == results(tmp_path / "never killed")


def test_an_interrupt_does_not_wait_for_the_server(shards: Path, tmp_path: Path) -> None:
    with Server(delay=30) as server:
        process = start(shards, tmp_path / "out", server)
        try:
            wait_for(lambda: len(server.asked) == 3, process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=25)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors and "never retrieved" not in errors


def test_parts_make_one_whole_together(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with Server() as server:
        one = recaption(config(shards, tmp_path / "one", server))
        two = tmp_path / "two"
        recaption(config(shards, two, server, part="1/2"))
        assert sorted(captions(two)) == [4, 5, 6, 7] and not (two / "manifest.json").exists()
        assert "2 of 3 shards are not done" in capsys.readouterr().out
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        recaption(config(shards, two, server))
    assert results(one) == results(two)
    assert read_manifest(one)["outputs"] == read_manifest(two)["outputs"]
    assert Counter(server.asked) == dict.fromkeys(range(12), 2)


def test_processes_at_the_same_time_do_no_shard_twice(shards: Path, tmp_path: Path) -> None:
    """All with the same part, as when a run is started twice by mistake."""
    with Server(delay=0.1) as server:
        processes = [start(shards, tmp_path / "out", server) for _ in range(2)]
        try:
            errors = [process.communicate(timeout=30)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), errors
        recaption(config(shards, tmp_path / "out", server))
    assert sorted(server.asked) == list(range(12))
    assert captions(tmp_path / "out") == {number: caption_of(number) for number in range(12)}
    assert read_manifest(tmp_path / "out")["outputs"]["captioned"] == 12


def test_a_shard_in_other_hands_is_left_alone(shards: Path, tmp_path: Path, capsys: Any) -> None:
    with Server() as server:
        recaption(config(shards, tmp_path / "out", server, part="0/3"))
        with open(tmp_path / "out" / ".00001.tar.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            recaption(config(shards, tmp_path / "out", server))
            assert sorted(captions(tmp_path / "out")) == [0, 1, 2, 3, 8, 9, 10, 11]
            assert "1 of 3 shards are not done, 1 of them in another process" in capsys.readouterr().out
        recaption(config(shards, tmp_path / "out", server))
    assert sorted(server.asked) == list(range(12)) == sorted(captions(tmp_path / "out"))


def test_a_finished_folder_is_left_as_it_is_and_new_shards_are_added(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Server() as server:
        recaption(config(shards, out, server))
        before = (out / "manifest.json").read_bytes()
        recaption(config(shards, out, server, concurrency=2))
        assert (out / "manifest.json").read_bytes() == before and len(server.asked) == 12
        write_shard([sample(12)], shards / "00003.tar")
        recaption(config(shards, out, server))
        assert server.asked[12:] == [12]
    assert read_manifest(out)["outputs"]["shards"] == 4


def test_what_does_not_fit_a_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Server() as server:
        recaption(config(shards, out, server, part="0/3"))
        with pytest.raises(InputError, match=r"captions made otherwise \(prompt: "):
            recaption(config(shards, out, server, prompt="Say it."))
        with pytest.raises(InputError, match=r"captions made otherwise .*other-7b"):
            recaption(config(shards, out, server, endpoint_model="other-7b"))
        with open(shards / "00000.tar", "ab") as file:
            file.write(bytes(10240))
        with pytest.raises(InputError, match=r"00000\.tar: has \d+ bytes, but .*00000\.stats\.json"):
            recaption(config(shards, out, server))
        with pytest.raises(InputError, match="is the folder of the shards themselves"):
            recaption(config(shards, shards, server))
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(InputError, match=r"holds thesis\.tex; choose another folder"):
            recaption(config(shards, tmp_path / "mine", server))
        put_shards(tmp_path / "b", [sample(5)])
        with pytest.raises(InputError, match="have the same name"):
            recaption(config(f"{tmp_path}/{{in,b}}/*.tar", tmp_path / "new", server))
    assert sorted(server.asked) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give model=FOLDER_OR_NAME or endpoint=URL"),
        (["model=m", "endpoint=http://h/v1"], "one of them"),
        (["endpoint=localhost:8000", "endpoint_model=m"], "must be an address like http://localhost:8000/v1"),
        (["endpoint=http://me:pw@h/v1", "endpoint_model=m"], "name that in api_key_env"),
        (["endpoint=http://h/v1"], "endpoint_model: is required"),
        (["model=m", "api_key_env=K"], "belong to an endpoint"),
        (["model=m", "part=8/8"], "write it as i/n"),
        (["model=m", "promt=x"], "did you mean 'prompt'"),
    ],
)
def test_settings_that_cannot_be(settings: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(RecaptionConfig, None, ["shards=a", "out=b", *settings])
    assert message in str(raised.value) and "pw" not in str(raised.value)


def test_parts() -> None:
    assert parse_part("0/8") == (0, 8) and parse_part("7/8") == (7, 8)
    for text in ("8/8", "1", "a/b", "-1/2", "0/0", "0/"):
        with pytest.raises(InputError, match="write it as i/n"):
            parse_part(text)


# -------------------------------------------------------------------------------------------------------- a local model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield save_talker(tmp_path_factory.mktemp("llava"))


def noise_shards(folder: Path) -> Path:
    pictures = [as_bytes(Image.effect_noise((40 + 4 * number, 60), 80)) for number in range(10)]
    return put_shards(
        folder, [sample(i, png=pictures[i]) for i in range(6)], [sample(i, png=pictures[i]) for i in range(6, 10)]
    )


def test_a_local_model_captions_shards(llava: Path, tmp_path: Path) -> None:
    """Whatever the batches; against each picture alone, judged by the rules."""
    folder = noise_shards(tmp_path / "in")
    settings: dict[str, Any] = {
        "model": str(llava),
        "max_new_tokens": 20,
        "prompt": "Describe it: {caption}",
        "max_bad_share": 1,
    }
    outs = [recaption(config(folder, tmp_path / f"batch {n}", batch_size=n, **settings)) for n in (1, 4)]
    assert results(outs[0]) == results(outs[1])
    model = LocalModel(str(llava), 20)
    expected: dict[int, str | None] = {}
    for key, files in stock_read(folder).items():
        picture = Image.open(io.BytesIO(files["png"])).convert("RGB")
        number = int(key)
        seed = sample_seed(0, "00000.tar" if number < 6 else "00001.tar", number % 6)
        for temperature in (0.0, 0.7):
            request = Request(picture, f"Describe it: grey {number}", seed + (temperature > 0))
            [reply] = model.generate(model.encode([request]), [request.seed], temperature)
            outcome = judge(reply)
            expected[number] = outcome.caption or None
            if outcome.kind == "captioned":
                break
    assert captions(outs[0]) == expected and sum(text is not None for text in expected.values()) > 4
    assert read_manifest(outs[0])["inputs"]["model"] != "hub model"
    with pytest.raises(InputError, match="captions made otherwise"):
        recaption(config(folder, outs[0], **settings | {"dtype": "bfloat16"}))


def test_a_stopped_local_run_goes_on(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = noise_shards(tmp_path / "in")
    settings: dict[str, Any] = {
        "model": str(llava),
        "max_new_tokens": 12,
        "max_bad_share": 1,
        "batch_size": 2,
        "temperature": 0.5,
    }
    whole = recaption(config(folder, tmp_path / "whole", **settings))
    rows: list[int] = []
    generate = LocalModel.generate

    def interrupted(self: LocalModel, inputs: Any, seeds: Any, temperature: float) -> Any:
        rows.append(len(seeds))
        if len(rows) == 5:
            raise KeyboardInterrupt
        return generate(self, inputs, seeds, temperature)

    monkeypatch.setattr(LocalModel, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recaption(config(folder, tmp_path / "out", **settings))
    there = journalled(tmp_path / "out")
    assert there
    rows[:] = [0] * 5
    recaption(config(folder, tmp_path / "out", **settings))
    assert results(tmp_path / "out") == results(whole)
