"""The same samples from tars, parquet and listings, here and remote; their numbers; and what is wrong with a file."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import braceexpand
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clips_core import files, sources
from clips_core.config import DataConfig
from clips_core.errors import BadSample, InputError
from clips_core.files import LocalCopies, expand_braces, find_files
from clips_core.folders import write_manifest
from clips_core.shards import write_shards
from clips_core.sources import Sources
from tests.web_server import serve

ROWS = [
    {
        "image": os.urandom(50 + i),
        "caption": f"Web “{i}”,\nsecond line",
        "re_caption": f"Synthetic {i}." if i % 5 else "",
    }
    for i in range(23)
]


def write_tars(folder: Path, rows: list[dict[str, Any]] = ROWS, per_shard: int = 10) -> Path:
    write_shards(
        (
            {
                "__key__": f"{i:05d}",
                "jpg": row["image"],
                "txt": row["caption"],
                "json": {"re_caption": row["re_caption"]},
            }
            for i, row in enumerate(rows)
        ),
        folder,
        per_shard,
    )
    return folder


def write_parquet(path: Path, struct: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    if struct:  # as Hugging Face's datasets write an Image column
        columns["image"] = [{"bytes": data, "path": None} for data in columns["image"]]
    table = pa.table({**columns, "key": [f"{i:05d}" for i in range(len(ROWS))], "unused": [b"x" * 1000] * len(ROWS)})
    pq.write_table(table, path, row_group_size=7)
    return path


def write_listing(path: Path) -> Path:
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, row in enumerate(ROWS):
        (path.parent / "pictures" / f"{i}.jpg").write_bytes(row["image"])
        rows.append({"image": f"pictures/{i}.jpg", "caption": row["caption"], "synthetic_caption": row["re_caption"]})
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def config(train: Any, **values: Any) -> DataConfig:
    return DataConfig(train=train, **values)


def read_all(found: Sources) -> list[dict[str, Any]]:
    samples = []
    for number, source in enumerate(found.sources):
        for chunk, count in enumerate(source.counts):
            reader = found.open(number, chunk)
            assert len(reader) == count
            samples += [reader[i] for i in range(count)]
            reader.close()
            found.drop(number, chunk)
    return samples


def content(sample: dict[str, Any]) -> tuple[bytes, str, str]:
    """Picture, web caption, synthetic caption, by what the settings are for."""
    from clips_core.data import read_caption

    image = next(sample[name] for name in ("jpg", "image") if name in sample)
    synthetic = read_caption(sample, ["json.re_caption", "re_caption", "synthetic_caption"], optional=True)
    return image, read_caption(sample, ["txt", "caption"]), synthetic


WANTED = [(row["image"], row["caption"], row["re_caption"]) for row in ROWS]
WRITERS = {
    "tar": lambda folder: write_tars(folder / "tars"),
    "parquet": lambda folder: write_parquet(folder / "x.parquet"),
    "struct": lambda folder: write_parquet(folder / "x.parquet", struct=True),
    "jsonl": lambda folder: write_listing(folder / "x.jsonl"),
    "csv": lambda folder: write_listing(folder / "x.csv"),
}
SYNTHETIC = ["json.re_caption", "re_caption", "synthetic_caption"]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_same_samples(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LISTING_CHUNK", 5)
    found = Sources(config(WRITERS[kind](tmp_path), synthetic_caption=SYNTHETIC, cache=tmp_path / "cache"))
    samples = read_all(found)
    assert [content(sample) for sample in samples] == WANTED and len(found) == 23
    chunks = {"tar": [10, 10, 3], "parquet": [7, 7, 7, 2], "struct": [7, 7, 7, 2]}.get(kind, [5, 5, 5, 5, 3])
    assert found.sources[0].counts.tolist() == chunks
    assert len({(sample["__shard__"], sample["__key__"]) for sample in samples}) == 23
    assert not any("unused" in sample for sample in samples)  # a column that nobody asked for is not read


@pytest.mark.parametrize("kind", WRITERS)
def test_remote_files_give_what_local_ones_do(tmp_path: Path, kind: str) -> None:
    """memory:// is fsspec's own storage: the same calls as for s3:// and the others."""
    path = WRITERS[kind](tmp_path / "here")
    root = f"memory://{tmp_path.name}-{kind}"
    storage = fsspec.filesystem("memory")
    storage.put(str(tmp_path / "here"), f"/{tmp_path.name}-{kind}", recursive=True)
    url = f"{root}/{path.name}"
    try:
        found = Sources(config(url, synthetic_caption=SYNTHETIC, cache=tmp_path / "cache"))
        assert [content(sample) for sample in read_all(found)] == WANTED
        assert {sample["__shard__"].split("://")[0] for sample in read_all(found)} == {"memory"}
        if kind == "tar":
            brace, many = f"{url}/shard-{{000000..000002}}.tar", [f"{url}/*0.tar", f"{url}/shard-00000[12].tar"]
            for pattern in (brace, many):
                assert [content(sample) for sample in read_all(Sources(config(pattern, cache=tmp_path)))] == WANTED
        assert Sources(config(url, cache=tmp_path)).fingerprint() == Sources(config(path, cache=tmp_path)).fingerprint()
    finally:
        storage.rm(f"/{tmp_path.name}-{kind}", recursive=True)
    with pytest.raises(InputError, match=rf"{url}.*no such remote file"):
        Sources(config(url))


def test_captioners_are_read_beside_the_shards(tmp_path: Path) -> None:
    plain, joined, recaptioned = (write_tars(tmp_path / name) for name in ("plain", "joined", "recaptioned"))
    drawn = write_tars(tmp_path / "world" / "pretrain")
    write_manifest(tmp_path / "joined", "join", {"captions": "recap/*.parquet"}, {}, {})
    write_manifest(tmp_path / "recaptioned", "recaption", {"model": "org/vlm", "endpoint_model": None}, {}, {})
    write_manifest(tmp_path / "world", "world", {}, {}, {})
    paths = [str(path) for path in (drawn, plain, recaptioned, joined, drawn)]
    sources = Sources(config([{"path": [path], "weight": 1.0} for path in paths]))
    assert sources.captioners() == ["the sample world", "unknown", "org/vlm", "whoever wrote recap/*.parquet"]
    for foreign in (
        "not JSON",
        "[1]",
        '{"stage": 3}',
        '{"stage": "join", "config": []}',
    ):  # other programs use the name too
        (tmp_path / "plain" / "manifest.json").write_text(foreign)
        assert Sources(config(str(plain))).captioners() == ["unknown"]
    write_manifest(tmp_path / "plain", "recaption", {"model": None, "endpoint_model": "served"}, {}, {})
    assert Sources(config(str(plain))).captioners() == ["served"]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["a{0..12}b", "{00008..00011}.tar", "{a,b}/{1..2}.tar", "s3://b/{train,val}-{000..002}", "x"]
)
def test_braces_as_in_a_shell(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


def test_files_are_found(tmp_path: Path) -> None:
    write_tars(tmp_path / "a")
    for name in ("00000.parquet", "notes.txt", ".hidden.tar"):  # img2dataset writes its table beside the tars
        (tmp_path / "a" / name).write_bytes(b"")
    (tmp_path / "[odd]").mkdir()
    write_tars(tmp_path / "[odd]" / "{name}", per_shard=23)

    def names(pattern: str) -> list[str]:
        return [Path(file.path).name for file in find_files(pattern, sources.KINDS)]

    whole = [f"shard-{i:06d}.tar" for i in range(3)]
    assert names(str(tmp_path / "a")) == names(f"{tmp_path}/a/*.tar") == whole
    assert sorted(names(f"{tmp_path}/**/shard-00000?.tar")) == sorted(whole + whole[:1])
    assert names(f"{tmp_path}/a/shard-{{000002,000000}}.tar") == [whole[2], whole[0]]
    assert (
        names(str(tmp_path / "[odd]" / "{name}")) == names(f"{tmp_path}/[odd]/{{name}}/shard-000000.tar") == whole[:1]
    )
    for pattern, message in [
        ("nowhere", "nowhere: no such folder"),
        (f"{tmp_path}/a/shard-{{000001..000003}}.tar", r"shard-000003\.tar: no such"),
        (f"{tmp_path}/[odd]", r"no \*\.tar or"),
        ("x{1..a}", "neither a range"),
        ("x{3..1}", "downwards"),
    ]:
        with pytest.raises(InputError, match=message):
            names(pattern)
    with pytest.raises(InputError, match=r"notes\.txt: is of no known kind"):
        Sources(config(tmp_path / "a" / "notes.txt"))
    with pytest.raises(InputError, match="is named 2 times"):
        Sources(config([f"{tmp_path}/a", f"{tmp_path}/a/*2.tar"]))


@pytest.mark.parametrize(
    ("url", "message"), [("oss://b/x.tar", "pip install ossfs"), ("nope://x.tar", "no storage that")]
)
def test_a_missing_package_is_named(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sources(config(url))


# --- numbers of samples ---------------------------------------------------------------------------------------------


def test_counts_come_from_the_stats_beside_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tars(tmp_path)
    for i, count in enumerate((10, 10, 3)):
        (folder / f"shard-{i:06d}_stats.json").write_text(json.dumps({"count": 20, "successes": count}))
    monkeypatch.setattr(sources, "scan_tar", None)  # no tar is opened to count
    assert Sources(config(folder)).sources[0].counts.tolist() == [10, 10, 3]
    monkeypatch.undo()
    (folder / "shard-000001_stats.json").write_text('{"successes": 9}')
    with pytest.raises(InputError, match=r"shard-000001\.tar: holds 10 samples, but 9 were counted.*_stats\.json"):
        Sources(config(folder)).open(0, 1)
    (folder / "shard-000001_stats.json").write_text('["no stats"]')
    assert Sources(config(folder)).sources[0].counts.tolist() == [10, 10, 3]


def test_counts_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FEW_FILES", 0)
    counted: list[str] = []
    count = sources._count
    monkeypatch.setattr(sources, "_count", lambda file: (counted.append(Path(file.path).name), count(file))[1])
    folder, index = write_tars(tmp_path / "tars"), tmp_path / "run" / "index.jsonl"
    first = Sources(config(folder), index)
    assert len(counted) == 3
    with open(index, "a") as file:
        file.write('{"path": "cut off by a ki')
    again = Sources(config(folder), index)
    assert len(counted) == 3 and [s.counts.tolist() for s in again.sources] == [
        s.counts.tolist() for s in first.sources
    ]
    write_shards([{"__key__": "a", "jpg": b"1", "txt": "1"}], tmp_path / "new")
    os.replace(tmp_path / "new" / "shard-000000.tar", folder / "shard-000001.tar")
    assert Sources(config(folder), index).sources[0].counts.tolist() == [10, 1, 3]
    assert counted[3:] == ["shard-000001.tar"]
    assert Sources(config(folder), index).sources[0].counts.tolist() == [10, 1, 3] and len(counted) == 4


# --- bad files ------------------------------------------------------------------------------------------------------


def test_a_cut_off_tar_gives_its_whole_samples(tmp_path: Path) -> None:
    folder = write_tars(tmp_path)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: 3 * 512 * 2 * 5 + 700])  # inside the second file of the sixth sample
    found = Sources(config(folder))
    assert found.sources[0].counts.tolist() == [10, 5, 3]
    assert [content(sample) for sample in read_all(found)] == WANTED[:15] + WANTED[20:]
    (fault,) = found.faults
    assert (fault.shard, fault.key, fault.cause) == (str(path), "", "cut-off tar")
    assert "whole up to '00014'" in fault.detail
    # Counted from the stats, the tar is only found out when it is opened: what is missing are bad samples.
    for i, count in enumerate((10, 10, 3)):
        (folder / f"shard-{i:06d}_stats.json").write_text(json.dumps({"successes": count}))
    reader = Sources(config(folder)).open(0, 1)
    assert len(reader) == 5 and reader.fault is not None and reader.fault[0] == "cut-off tar"


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "tars")
    (folder / "shard-000001.tar").write_text("<html>404</html>" * 100)
    with pytest.raises(InputError, match=r"shard-000001\.tar: not a tar.*1 of 3 files are bad.*max_bad_share=0\.01"):
        Sources(config(folder))
    found = Sources(config(folder, max_bad_share=0.5))
    assert [content(sample) for sample in read_all(found)] == WANTED[:10] + WANTED[20:]
    assert [(Path(fault.shard).name, fault.cause) for fault in found.faults] == [("shard-000001.tar", "not a tar")]
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"x\.parquet: not a parquet file"):
        Sources(config(tmp_path / "x.parquet"))
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    with pytest.raises(InputError, match="hold no sample"):
        Sources(config(tmp_path / "empty.tar"))
    (tmp_path / "x.csv").write_text('image,caption\n1.jpg,good\n2.jpg,"bad" quote\n')
    with pytest.raises(InputError, match=r"x\.csv, line 3: not CSV"):
        Sources(config(tmp_path / "x.csv"))


def test_a_damaged_row_group_is_one_chunk_of_bad_samples(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = os.urandom(60)
    path.write_bytes(data)
    found = Sources(config(path, cache=tmp_path / "cache"))
    reader = found.open(0, 1)
    assert len(reader) == 0 and reader.fault is not None and reader.fault[0] == "damaged parquet"
    assert len(found.open(0, 2)) == 7


def test_missing_columns_are_a_wrong_setting(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"no column alt; its columns are image, caption.*data\.web_caption"):
        Sources(config(path, web_caption="alt"))
    with pytest.raises(InputError, match=r"no column photo.*data\.image"):
        Sources(config(path, image=["photo"]))
    Sources(config(path, web_caption=["alt", "caption"], cache=tmp_path))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"image": "../secret.jpg", "caption": "x"}', "no picture"),
        ('{"image": "/etc/passwd", "caption": "x"}', "no picture"),
        ('{"image": "gone.jpg", "caption": "x"}', "no picture"),
        ('{"caption": "x"}', "no picture"),
        ('["no object"]', "no picture"),
        ('{"image": "a.j', "not JSON"),
    ],
)
def test_a_bad_row_of_a_listing_is_a_bad_sample(tmp_path: Path, line: str, cause: str) -> None:
    path = write_listing(tmp_path / "in" / "x.jsonl")
    (tmp_path / "secret.jpg").write_bytes(b"1")
    path.write_text(path.read_text() + line + "\n")
    reader = Sources(config(path)).open(0, 0)
    assert len(reader) == 24 and content(reader[22]) == WANTED[22]
    with pytest.raises(BadSample, match=r"x\.jsonl") as caught:
        reader[23]
    assert caught.value.cause == cause and pickle.loads(pickle.dumps(caught.value)).cause == cause


# --- remote storage that fails, local copies ------------------------------------------------------------------------


def test_a_storage_that_fails_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
    write_tars(tmp_path / "tars")
    with serve(tmp_path) as (url, failures):
        _read_over_failures(tmp_path, url, failures)


def _read_over_failures(tmp_path: Path, url: str, failures: dict[str, int]) -> None:
    found = Sources(config(f"{url}/tars/shard-{{000000..000002}}.tar", cache=tmp_path / "cache"))
    failures["/tars/shard-000001.tar"] = 3
    assert [content(sample) for sample in read_all(found)] == WANTED and failures["/tars/shard-000001.tar"] == 0
    failures["/tars/shard-000001.tar"] = 1000
    with pytest.raises(InputError, match=rf"{url}/tars/shard-000001\.tar: cannot be read, in 6 attempts .*503"):
        found.open(0, 1)
    os.unlink(tmp_path / "tars" / "shard-000002.tar")
    with pytest.raises(InputError, match=rf"{url}/tars/shard-000002\.tar: no such file"):
        found.open(0, 2)


def test_local_copies_are_shared_dropped_and_removed(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path)
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("whole")

    def cut(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError), copies.file("a", cut):
        pass
    with copies.file("a", make) as path:
        opened = open(path)  # noqa: SIM115
    with pickle.loads(pickle.dumps(copies)).file("a", make) as path:  # in another process
        assert path.read_text() == "whole"
    assert len(made) == 1
    copies.drop("a")
    copies.drop("a")
    assert opened.read() == "whole" and not path.exists()  # who has it open goes on reading
    opened.close()
    with copies.file("a", make):
        pass
    assert len(made) == 2
    folder = copies.folder
    del copies
    assert not folder.exists() and list(tmp_path.iterdir()) == []


def test_copies_of_a_killed_run_are_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom clips_core.files import LocalCopies\n"
        "copies = LocalCopies(Path(sys.argv[1]))\n(copies.folder / 'x').write_text('x')\nos._exit(9)"
    )
    living = LocalCopies(tmp_path)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent.parent)
    assert len(list(tmp_path.glob("*/x"))) == 1
    LocalCopies(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [living.folder]
