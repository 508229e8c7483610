"""Our shards read by webdataset, and what is wrong with a tar named."""

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from clips_core.errors import InputError
from clips_core.shards import Shards, Tar, write_shards

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


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_all_kinds_are_read_as_tarfile_reads_them(tmp_path: Path, kind: int) -> None:
    """Long names, names that are not ASCII, links and folders; files of a sample that are not neighbours."""
    long = "d" * 60 + "/" + "e" * 60
    names = ["a.jpg", f"{long}/b.jpg", "c/ü.jpg", "a.txt", f"{long}/b.txt", "c/ü.seg.PNG", "no_extension", "c/.hidden"]
    if kind != tarfile.USTAR_FORMAT:
        names += [f"{'x' * 300}.jpg", f"{'x' * 300}.txt"]
    path = tmp_path / "x.tar"
    with tarfile.open(
        path, "w", format=kind, pax_headers={"comment": "global"} if kind == tarfile.PAX_FORMAT else None
    ) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * number, 0.5 if kind == tarfile.PAX_FORMAT else 0
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
            link = tarfile.TarInfo(f"link{number}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(link)
            folder = tarfile.TarInfo(f"folder{number}.d")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    ours = Tar(path, "x")
    with tarfile.open(path) as tar:
        want: dict[str, dict[str, bytes]] = {}
        for info in tar:
            stem, dot, extension = info.name.rpartition("/")[2].partition(".")
            if info.isfile() and stem and dot:
                key = "/".join([*info.name.split("/")[:-1], stem])
                want.setdefault(key, {})[extension.lower()] = tar.extractfile(info).read()  # type: ignore[union-attr]
    assert ours.fault is None and len(ours) == len(want) >= 3
    assert {ours[i]["__key__"]: {n: v for n, v in ours[i].items() if n[0] != "_"} for i in range(len(ours))} == want


def test_a_tar_cut_anywhere_gives_whole_samples_and_says_so(tmp_path: Path) -> None:
    (path,) = write_shards(SAMPLES, tmp_path)
    data, whole = path.read_bytes(), Shards(path)
    end = 512 * 2 * 3 * 7  # a header and a block for each file; then zeros
    for size in [*range(512, end, 300), end]:
        path.write_bytes(data[:size])
        cut = Tar(path, "x")
        assert cut.fault is not None and cut.fault[0] == "cut-off tar"
        complete = min(size // (512 * 6), 6)  # without the tar's end, more files of the last one could have followed
        assert len(cut) in (complete - 1, complete)
        for i in range(len(cut)):
            assert {**cut[i], "__shard__": ""} == {**whole[i], "__shard__": ""}
    path.write_bytes(data[: 512 * 6 * 3] + b"\1" * 512 + data[512 * 6 * 3 + 512 :])
    damaged = Tar(path, "x")
    assert damaged.fault is not None and damaged.fault[0] == "damaged tar" and len(damaged) == 2
    path.write_bytes(b"")
    assert Tar(path, "x").fault == ("not a tar", "0 bytes, and no end of the archive")


def test_a_key_that_comes_twice_is_two_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, value in [("k.jpg", b"1"), ("k.txt", b"2"), ("k.jpg", b"3"), ("k.txt", b"4")]:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(value))
    tar = Tar(tmp_path / "twice.tar", "x")
    assert [(tar[i]["jpg"], tar[i]["txt"]) for i in range(len(tar))] == [(b"1", b"2"), (b"3", b"4")]
