"""Our shards read by webdataset, and what is wrong with a tar named."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from clips_core.errors import InputError
from clips_core.shards import Shards, write_shards

SAMPLES = [{"__key__": f"{i:04d}", "png": bytes([i]) * 9, "txt": f"caption {i}", "json": {"n": i}} for i in range(7)]


def test_webdataset_reads_what_we_write_and_we_read_the_same(tmp_path: Path) -> None:
    paths = write_shards(SAMPLES, tmp_path, per_shard=3)
    assert [path.name for path in paths] == [f"shard-{i:06d}.tar" for i in range(3)]
    ours = Shards(tmp_path)
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert len(ours) == len(theirs) == 7
    for i, sample in enumerate(theirs):
        for name in ("png", "txt", "json", "__key__"):
            assert ours[i][name] == sample[name]
    assert len(Shards(str(tmp_path / "shard-00000[01].tar"))) == 6


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "deep/er/x", "jpg": b"1", "txt": "one"})
        writer.write({"__key__": "deep/er/z", "jpg": b"2", "txt": "two"})
    shards = Shards(tmp_path / "a.tar")
    assert [(s["__key__"], s["txt"]) for s in (shards[0], shards[1])][1] == ("deep/er/z", b"two")


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    a, b = write_shards(SAMPLES, tmp_path / "a", 4), write_shards(iter(SAMPLES), tmp_path / "b", 4)
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


def test_bad_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no \*\.tar"):
        Shards(tmp_path)
    (tmp_path / "text.tar").write_text("this is no tar" * 100)
    with pytest.raises(InputError, match=r"text\.tar: not a tar"):
        Shards(tmp_path)
    (path,) = write_shards(SAMPLES, tmp_path / "cut")
    path.write_bytes(path.read_bytes()[: 512 * 8 + 700])
    with pytest.raises(InputError, match=r"shard-000000\.tar: (cut off|not a tar file, or damaged)"):
        Shards(tmp_path / "cut")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("k.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(InputError, match="'k' occurs twice"):
        Shards(tmp_path / "twice.tar")
