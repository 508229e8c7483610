"""Recap-DataComp-1B's captions joined to DataComp's tars, in miniature, against a join in a dict."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from clips_core.config import load_config
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from clips_core.join import JoinConfig, _hashes, _one_row_per_key, join_captions

Row = dict[str, Any]


def sample(number: int, **json_fields: Any) -> dict[str, bytes]:
    """A sample as img2dataset leaves it; its picture is never decoded here."""
    picture = hashlib.sha512(str(number).encode()).digest() * 4
    description = {
        "url": f"https://example.org/{number}.jpg",
        "key": f"{number:09d}",
        "sha256": hashlib.sha256(picture).hexdigest(),
        "width": 256,
        **json_fields,
    }
    return {"jpg": picture, "json": json.dumps(description).encode(), "txt": f"web caption {number}".encode()}


def put_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def recap_row(number: int, caption: str | None = "") -> Row:
    """A row of Recap-DataComp-1B for the sample of this number."""
    description = json.loads(sample(number)["json"])
    caption = f"A synthetic caption of picture {number}. It is long!" if caption == "" else caption
    return {
        "url": description["url"],
        "re_caption": caption,
        "org_caption": f"web caption {number}",
        "sha256": description["sha256"],
        "key": description["key"],
    }


def put_parquet(path: Path, rows: list[Row], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    """5 tars of 40 samples; 3 parquet files with 3 of 4 of their captions and as many of other pictures, shuffled."""
    for shard in range(5):
        numbers = range(shard * 40, shard * 40 + 40)
        put_tar(tmp_path / "dc" / f"{shard:05d}.tar", {f"{n:09d}": sample(n) for n in numbers})
    rows = [recap_row(n) for n in range(200) if n % 4] + [recap_row(n) for n in range(1000, 1150)]
    order = np.random.default_rng(0).permutation(len(rows))
    for i in range(3):
        put_parquet(tmp_path / "recap" / f"train-{i}.parquet", [rows[j] for j in order[i::3]], row_group_size=30)
    return tmp_path


def config(sides: Path, out: str = "joined", **values: Any) -> JoinConfig:
    given = {
        "shards": str(sides / "dc"),
        "captions": str(sides / "recap" / "*.parquet"),
        "out": sides / out,
        "workers": 1,
    }
    return JoinConfig(**{**given, **values})


def stock_read(folder: Path) -> dict[str, dict[str, Any]]:
    """The samples by key, as the webdataset library reads them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}


def files(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest, which holds the time."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("on", ["sha256", "url", "key"])
def test_every_sample_gets_its_caption(sides: Path, on: str) -> None:
    out = join_captions(config(sides, on=on, shards=str(sides / "dc" / "{00000..00004}.tar")))
    captions = {
        row[on]: row["re_caption"]
        for path in (sides / "recap").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    before, after = stock_read(sides / "dc"), stock_read(out)
    assert list(after) == list(before) and len(after) == 200
    for key, old in before.items():
        description = json.loads(old["json"])
        expected = captions.get(description[on])
        assert json.loads(after[key]["json"]) == description | ({"re_caption": expected} if expected else {})
        assert (after[key]["jpg"], after[key]["txt"]) == (old["jpg"], old["txt"])
    report = json.loads((out / "report.json").read_text())
    assert (report["samples"], report["matched"], report["written"], report["match_rate"]) == (200, 150, 200, 0.75)
    assert report["unmatched"] == {"no caption for it": 50}
    assert report["captions"]["rows"] == 300
    assert read_manifest(out, "join")["outputs"] == report
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{i:05d}{end}" for i in range(5) for end in (".tar", "_stats.json")]
        + ["manifest.json", "report.json", "shards.jsonl"]
    )


def test_unmatched_samples_can_be_left_out(sides: Path) -> None:
    after = stock_read(join_captions(config(sides, keep_unmatched=False)))
    assert len(after) == 150 and all(json.loads(s["json"])["re_caption"] for s in after.values())


def test_workers_and_memory_do_not_change_the_result(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = files(join_captions(config(sides, "one")))
    two = files(join_captions(config(sides, "two", workers=2, scratch=sides / "scratch")))
    assert not list((sides / "scratch").iterdir())
    monkeypatch.setattr("clips_core.join._partitions", lambda *_: 7)
    many = files(join_captions(config(sides, "many")))
    assert one == two == many
    assert "150  75.00%  have a caption in json.re_caption" in capsys.readouterr().out


def put_losses(folder: Path) -> dict[str, str]:
    """Shards with every loss there is, and good samples among them; returns the cause by key."""
    good = {f"good{n}": sample(n) for n in range(20)}
    tar = {
        "no_json": {"jpg": b"x", "txt": b"y"},
        "bad_json": {"jpg": b"x", "json": b'{"sha256": '},
        "latin_json": {"jpg": b"x", "json": '{"sha256": "ä"}'.encode("latin-1")},
        "list_json": {"jpg": b"x", "json": b"[1]"},
        "no_key": {"jpg": b"x", "json": b'{"url": "u"}'},
        "null_key": {"jpg": b"x", "json": b'{"sha256": null}'},
        "blank_key": {"jpg": b"x", "json": b'{"sha256": "  "}'},
        **good,
        **{name: sample(n) for n, name in enumerate(("unknown", "empty", "null", "differ", "latin"), start=100)},
    }
    put_tar(folder / "dc" / "00000.tar", tar)
    put_tar(folder / "dc" / "00001.tar", {f"cut{n}": sample(n) for n in range(30, 40)})
    whole = (folder / "dc" / "00001.tar").read_bytes()
    (folder / "dc" / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "dc" / "00002.tar").write_bytes(b"<html>404</html>" * 100)
    rows = [recap_row(n) for n in (*range(20), *range(30, 40))]
    rows += [recap_row(n) for n in range(5)]  # the same caption twice is one caption
    rows += [recap_row(101, " \n "), recap_row(102, None), recap_row(103, "One."), recap_row(103, "Two.")]
    rows += [recap_row(6, " "), recap_row(6, None)]  # an empty caption yields to the good one
    rows += [recap_row(0) | {"sha256": None}, recap_row(0) | {"sha256": ""}]
    rows[0]["sha256"] = f"  {rows[0]['sha256'].upper()} "
    for row in rows:
        row["re_caption"] = None if row["re_caption"] is None else row["re_caption"].encode()
    rows.append(recap_row(104) | {"re_caption": "Ein Bär".encode("latin-1")})
    put_parquet(folder / "recap" / "a.parquet", rows[:7])
    put_parquet(folder / "recap" / "b.parquet", rows[7:])
    return {
        "no_json": "no .json file",
        "bad_json": "the .json is not JSON",
        "latin_json": "the .json is not JSON",
        "list_json": "the .json is not an object",
        "no_key": "no sha256 in the .json",
        "null_key": "no sha256 in the .json",
        "blank_key": "no sha256 in the .json",
        "unknown": "no caption for it",
        "empty": "the caption is empty",
        "null": "the caption is empty",
        "differ": "several captions that differ",
        "latin": "the caption is not UTF-8",
    }


def test_losses_are_counted_by_cause(tmp_path: Path) -> None:
    causes = put_losses(tmp_path)
    out = join_captions(config(tmp_path))
    report = json.loads((out / "report.json").read_text())
    expected = {cause: sum(c == cause for c in causes.values()) for cause in causes.values()}
    assert report["unmatched"] == expected
    named = {row["key"]: cause for cause, rows in report["examples"].items() for row in rows}
    assert named == causes
    damaged = {row["shard"]: row["cause"] for row in report["damaged_shards"]}
    assert damaged == {"00001.tar": "cut-off tar", "00002.tar": "not a tar"}
    after = stock_read(out)
    assert all("re_caption" in json.loads(after[f"good{n}"]["json"]) for n in range(20))
    cut = [key for key in after if key.startswith("cut")]
    assert cut == [f"cut{n}" for n in range(30, 30 + len(cut))] and 4 <= len(cut) <= 6
    assert report["samples"] == 32 + len(cut) and report["matched"] == 20 + len(cut)
    rows = [json.loads(line) for line in (out / "shards.jsonl").read_text().splitlines()]
    assert [row["shard"] for row in rows] == ["00000.tar", "00001.tar", "00002.tar"]
    assert rows[0]["unmatched"] == expected and rows[2]["samples"] == 0 and not (out / "00002.tar").exists()


def test_the_first_of_several_captions_can_be_taken(tmp_path: Path) -> None:
    put_losses(tmp_path)
    out = join_captions(config(tmp_path, differing="first"))
    assert json.loads(stock_read(out)["differ"]["json"])["re_caption"] == "One."


def test_pictures_can_be_verified(tmp_path: Path) -> None:
    samples = {f"{n:09d}": sample(n) for n in range(10)}
    samples["000000003"]["jpg"] = b"another picture"
    put_tar(tmp_path / "dc" / "00000.tar", samples)
    put_parquet(tmp_path / "recap" / "a.parquet", [recap_row(n) for n in range(10)])
    out = join_captions(config(tmp_path, verify_pictures=True))
    report = json.loads((out / "report.json").read_text())
    assert report["examples"] == {"the picture has another sha256": [{"shard": "00000.tar", "key": "000000003"}]}
    assert report["matched"] == 9


def test_other_columns_and_fields(tmp_path: Path) -> None:
    put_tar(tmp_path / "dc" / "00000.tar", {f"a/{n}": sample(n, uid=n, llava=["x"]) for n in range(10)})
    rows = [{"uid": n, "text": f"Caption {n}."} for n in range(10)]
    put_parquet(tmp_path / "recap" / "a.parquet", rows, use_dictionary=True)
    out = join_captions(
        config(tmp_path, on="uid", caption_column="text", field="llava", captions=str(tmp_path / "recap"))
    )
    assert json.loads(stock_read(out)["a/7"]["json"])["llava"] == "Caption 7."


def run_in_a_process(settings: JoinConfig, more: str = "") -> subprocess.Popen[bytes]:
    arguments = [
        f"{key}={json.dumps(value if isinstance(value, int | float) else str(value))}"
        for key, value in vars(settings).items()
        if value is not None and not key.startswith("__")
    ]
    code = (
        f"import sys; sys.argv = {['join', *arguments]!r}\n"
        "from clips_core.join import JoinConfig, join_captions\nfrom clips_core.config import load_config\n"
        f"{more}\njoin_captions(load_config(JoinConfig, None, sys.argv[1:]))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "reached", ["scan/000000.arrow", "captions/000001.arrow", "match/000002.arrow", "written/000001.json"]
)
def test_killed_anywhere_it_goes_on(sides: Path, reached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 when a file of each step has just appeared: the next run keeps it and gives the same bytes."""
    die = (
        "import os, clips_core.join as join, clips_core.folders as folders\n"
        "join.GROUP = 2\njoin._partitions = lambda *_: 5\n"
        "replace = os.replace\n"
        "def dying(source, target):\n"
        f"    replace(source, target)\n    if str(target).endswith({reached!r}): os.kill(os.getpid(), 9)\n"
        "os.replace = dying"
    )
    process = run_in_a_process(config(sides, "cut"), die)
    assert process.wait(60) == -9
    kept = sides / "cut" / ".join" / reached
    before = kept.stat().st_mtime_ns
    (kept.parent / ".000009.arrow.1.tmp").write_bytes(b"half")  # as a kill in the middle of a write leaves it
    monkeypatch.setattr("clips_core.join.GROUP", 2)
    monkeypatch.setattr("clips_core.join._partitions", lambda *_: 5)
    kept_until_the_end = []

    def remove(path: Path, **options: Any) -> None:
        kept_until_the_end.append(kept.exists() and kept.stat().st_mtime_ns == before)
        shutil.rmtree(path, **options)

    monkeypatch.setattr("clips_core.join.shutil", type("shutil", (), {"rmtree": staticmethod(remove)}))
    join_captions(config(sides, "cut"))
    assert kept_until_the_end[0]
    assert files(sides / "cut") == files(join_captions(config(sides, "clean")))


def test_workers_end_with_a_killed_parent(sides: Path) -> None:
    process = run_in_a_process(config(sides, "cut", workers=2))
    deadline = time.monotonic() + 60
    while not (sides / "cut" / ".join" / "scan").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert files(join_captions(config(sides, "cut"))) == files(join_captions(config(sides, "clean")))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """60 MB of captions are joined within 8 MB a worker."""
    generator = np.random.default_rng(0)
    rows, length = 6_000, 10_000
    letters = generator.integers(97, 123, rows * length, dtype=np.uint8).tobytes()
    captions = [letters[i * length : (i + 1) * length] for i in range(rows)]
    urls = [f"https://example.org/{i}.jpg" for i in range(rows)]
    table = pa.table({"url": urls, "re_caption": pa.array(captions, pa.string())})
    (tmp_path / "recap").mkdir()
    pq.write_table(table, tmp_path / "recap" / "a.parquet", row_group_size=1000, use_dictionary=False)
    numbers = generator.permutation(rows)
    per_shard = 500
    for shard in range(rows // per_shard):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for n in numbers[shard * per_shard : (shard + 1) * per_shard]:
                info = tarfile.TarInfo(f"{n:09d}.json")
                data = json.dumps({"url": urls[n]}).encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    del captions, table, letters
    settings = config(tmp_path, shards=str(tmp_path / "*.tar"), on="url", memory_mb=8)
    measure = (
        "import pyarrow, clips_core.join as join\njoin.GROUP = 1\n"
        # not ru_maxrss: a child starts with its parent's
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) // 1024\n"
        "start = peak()\n"
        "arrow_peak = lambda: pyarrow.default_memory_pool().max_memory() // 2**20\n"
        "join.write_manifest = lambda *_: print(peak() - start, arrow_peak())"  # it asks torch for the device
    )
    process = run_in_a_process(settings, measure)
    output = process.communicate(timeout=100)[0].decode().split()
    assert process.returncode == 0
    report = json.loads((tmp_path / "joined" / "report.json").read_text())
    assert report["matched"] == rows
    process_peak, arrow_peak = map(int, output[:2])
    assert arrow_peak < 60 and process_peak < 220  # MiB; with memory_mb=4000 they are 250 and 320
    read = stock_read_one(tmp_path / "joined" / "00007.tar")
    assert len(read) == per_shard


def stock_read_one(path: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset([str(path)], shardshuffle=False))


def test_captions_that_nobody_wants_are_not_kept(sides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    monkeypatch.setattr("clips_core.join._stop_if_too_few", lambda found, _: counts.update(found))
    join_captions(config(sides))
    assert counts["rows"] == 300 and counts["matched"] == 150 <= counts["kept"] <= 155


def test_hashes_that_differ_in_their_last_zeros_differ() -> None:
    """NumPy's fixed-width bytes do not show trailing zeros; comparing and sorting must see them."""
    keys = [b"a" * 15 + b"\0", b"a" * 16, b"a" * 14 + b"\0\0", b"\0" * 16, b"\0" * 15 + b"a", b"a" * 15 + b"\0"]
    table = pa.table({"hash": pa.array(keys, pa.binary(16)), "caption": pa.array([b"x"] * 6, pa.large_binary())})
    unique, row, outcome = _one_row_per_key(_hashes(table), table.column("caption"), "none")
    assert [key.ljust(16, b"\0") for key in unique.tolist()] == sorted(set(keys))
    assert row.tolist() == [keys.index(key) for key in sorted(set(keys))] and not outcome.any()


def test_a_finished_join_is_left_as_it_is(sides: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = join_captions(config(sides))
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / ".join").mkdir()  # as a kill in the last moment leaves it
    join_captions(config(sides, workers=2, memory_mb=7, min_match_rate=0.1))
    assert "already holds this join" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(InputError, match=r"holds another result \(config.on"):
        join_captions(config(sides, on="url"))


def test_too_few_matches_stop_before_anything_is_written(sides: Path) -> None:
    with pytest.raises(InputError, match=r"only 150 of 200 samples find a caption by on=sha256 .*nothing was written"):
        join_captions(config(sides, min_match_rate=0.8))
    assert [path.name for path in (sides / "joined").iterdir()] == [".join"]
    with pytest.raises(InputError, match=r"unfinished join of other inputs or settings \(settings.on"):
        join_captions(config(sides, on="url"))
    join_captions(config(sides, min_match_rate=0.7))  # what was matched is not matched again


def test_bad_inputs_are_one_clear_error(sides: Path) -> None:
    with pytest.raises(InputError, match="no such folder, and no file matches"):
        join_captions(config(sides, captions=str(sides / "gone" / "*.parquet")))
    with pytest.raises(InputError, match="copy it to a disk of yours"):
        join_captions(config(sides, shards="s3://bucket/{00000..00099}.tar"))
    with pytest.raises(InputError, match=r"train-0.parquet: no column 'uid'; its columns are url, re_caption"):
        join_captions(config(sides, on="uid"))
    (sides / "recap" / "x.parquet").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"x.parquet: not a parquet file"):
        join_captions(config(sides))
    (sides / "recap" / "x.parquet").unlink()
    put_tar(sides / "dc2" / "00000.tar", {"a": sample(0)})
    with pytest.raises(InputError, match=r"several shards are named 00000.tar"):
        join_captions(config(sides, shards=str(sides / "dc*" / "*.tar")))
    (sides / "joined").mkdir()
    (sides / "joined" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        join_captions(config(sides))
    with pytest.raises(InputError, match="unknown key 'capitons'"):
        load_config(JoinConfig, None, ["shards=a", "captions=b", "out=c", "capitons=d"])
    assert os.listdir(sides / "joined") == ["thesis.tex"]


def test_a_parquet_file_damaged_inside_is_named(sides: Path) -> None:
    path = sides / "recap" / "train-1.parquet"
    data = bytearray(path.read_bytes())
    data[10:400] = bytes(390)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"train-1.parquet: damaged"):
        join_captions(config(sides))
