"""Building shards from real picture files, good and bad."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from clips_core.build import BuildConfig, Sample, build_shards, split
from clips_core.config import load_config
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from clips_core.tokenizer import ClipsTokenizer

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def put_picture(
    path: Path, caption: str | None, seed: int = 0, size: tuple[int, int] = (12, 8), **options: Any
) -> None:
    """A picture of random pixels; `caption` goes into the .txt beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Ein Bild.\n", encoding="utf-8")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 good pictures, PNG and JPEG, in two folders."""
    folder = tmp_path / "pictures"
    for i in range(40):
        name = f"{'a' if i % 2 else 'b/c'}/picture{i}.{'png' if i % 3 else 'jpg'}"
        put_picture(folder / name, f"A {COLOURS[i % 6]} thing, number {i}.", seed=i)
    return folder


def config(source: Path, out: Path, **values: Any) -> BuildConfig:
    return BuildConfig(**{"source": source, "out": out, "size": 8, "workers": 1, **values})


def stock_read(folder: Path) -> list[dict[str, Any]]:
    """The samples as the webdataset library reads them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False)) if urls else []


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a build but its manifest, which holds the time."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_webdataset_reads_what_was_built(pictures: Path, tmp_path: Path) -> None:
    out = build_shards(config(pictures, tmp_path / "out", held_out=0.3, per_shard=10))
    train, held_out = stock_read(out / "pretrain"), stock_read(out / "retrieval")
    outputs = read_manifest(out, "build")["outputs"]
    assert (outputs["pretrain"], outputs["retrieval"]) == (len(train), len(held_out))
    assert len(train) + len(held_out) == outputs["listed"] == 40 and outputs["skipped"] == {}
    assert len(held_out) > 4 and len(list((out / "pretrain").glob("shard-*.tar"))) == -(-len(train) // 10)
    for sample in train + held_out:
        description = json.loads(sample["json"])
        assert set(description) == {"source"}  # there is no synthetic caption
        source = pictures / description["source"]
        assert sample["txt"].decode() == source.with_suffix(".txt").read_text().splitlines()[0]
        want = Image.open(source).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), np.asarray(want))


def test_any_number_of_workers_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    (pictures / "a" / "picture1.png").write_bytes(b"no picture")
    one, two = tmp_path / "one", tmp_path / "two"
    for out, workers in ((one, 1), (two, 2)):
        build_shards(config(pictures, out, workers=workers, per_shard=7, held_out=0.2))
    assert files(one) == files(two) and len(files(one)) > 6
    assert read_manifest(one)["outputs"] == read_manifest(two)["outputs"]


def test_no_held_out_picture_has_a_twin(pictures: Path, tmp_path: Path) -> None:
    """Neither by bytes nor by the words of the caption, on either side."""
    for i in range(8):
        name = pictures / "twins" / f"caption{i}.png"
        put_picture(name, ("A RED thing, number 12", "a red thing: number 12!")[i % 2], seed=100 + i)
        twin = pictures / "twins" / f"bytes{i}.png"
        put_picture(twin, f"Something else {i}.", seed=i // 4 * 7)  # seed 7 is also a/picture7.png
    out = build_shards(config(pictures, tmp_path / "out", held_out=0.8))
    train, held_out = stock_read(out / "pretrain"), stock_read(out / "retrieval")

    def digests(samples: list[dict[str, Any]]) -> list[str]:
        sources = [pictures / json.loads(sample["json"])["source"] for sample in samples]
        return [hashlib.md5(source.read_bytes()).hexdigest() for source in sources]

    def words(samples: list[dict[str, Any]]) -> list[str]:
        return ["".join(c for c in sample["txt"].decode().lower() if c.isalnum()) for sample in samples]

    assert len(held_out) > 20
    assert len(set(digests(held_out))) == len(set(words(held_out))) == len(held_out)
    assert not set(digests(held_out)) & set(digests(train)) and not set(words(held_out)) & set(words(train))


def test_split_is_a_share_and_stays_when_pictures_join() -> None:
    samples = [Sample(f"{i}.png", f"caption {i}", "", str(i)) for i in range(4000)]
    held_out = set(split(samples, 0.1)[1])
    assert abs(len(held_out) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5  # four standard errors
    assert set(split(samples[:1000], 0.1)[1]) == held_out & set(samples[:1000])
    assert split(samples, 0.0) == (samples, [])


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (200, 0, 100, 51))  # a fifth opaque
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in" / "x.png")
    (tmp_path / "in" / "x.txt").write_text("A glass.")
    out = build_shards(config(tmp_path / "in", tmp_path / "out", held_out=0))
    pixel = Image.open(io.BytesIO(stock_read(out / "pretrain")[0]["png"])).getpixel((3, 3))
    assert pixel == (244, 204, 224)  # 255 + (colour − 255) / 5


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    put_picture(tmp_path / "in" / "x.jpg", "Lying down.", size=(12, 8), exif=_orientation(6))
    out = build_shards(config(tmp_path / "in", tmp_path / "out", held_out=0, resize="keep"))
    stored = Image.open(io.BytesIO(stock_read(out / "pretrain")[0]["png"]))
    raw = np.asarray(Image.open(tmp_path / "in" / "x.jpg"))
    assert np.array_equal(np.asarray(stored), np.rot90(raw, -1)) and not stored.getexif()


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    ("resize", "size", "want"),
    [
        ("squash", 20, (20, 20)),
        ("shortest", 20, (40, 20)),
        ("longest", 20, (20, 10)),
        ("keep", 20, (60, 30)),
        ("shortest", 50, (60, 30)),  # only ever smaller
        ("squash", 80, (80, 80)),
    ],
)
def test_sizes(tmp_path: Path, resize: str, size: int, want: tuple[int, int]) -> None:
    put_picture(tmp_path / "in" / "x.png", "Wide.", size=(60, 30))
    out = build_shards(config(tmp_path / "in", tmp_path / "out", held_out=0, resize=resize, size=size, format="jpg"))
    stored = Image.open(io.BytesIO(stock_read(out / "pretrain")[0]["jpg"]))
    assert stored.size == want and stored.format == "JPEG"


def put_bad_pictures(folder: Path) -> dict[str, str]:
    """One of each fault; returns the cause by path."""
    folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, data: bytes, caption: bytes = b"A fault.") -> None:
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_bytes(caption)

    def encoded(kind: str, picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpg = encoded("PNG", noise), encoded("JPEG", noise)
    put("cut.png", png[: len(png) // 2])
    put("cut.jpg", jpg[: len(jpg) // 2])
    put("bomb.png", encoded("PNG", Image.new("1", (9000, 9000))))  # 10 kB that unpack to 81 Mpx
    put("bigger_bomb.png", encoded("PNG", Image.new("1", (20000, 10000))))  # PIL's own limit, too
    put("nothing.png", b"")
    put("text.png", b"<html>404</html>")
    put("blank.png", png, b" \t\nSecond line.")
    put("no_line.png", png, b"")
    put("latin.png", png, "Ein Bär.".encode("latin-1"))
    put("folder_caption.png", png)
    (folder / "folder_caption.txt").unlink()
    (folder / "folder_caption.txt").mkdir()
    put("alone.png", png)
    (folder / "alone.txt").unlink()
    put("dangling.png", png)
    (folder / "dangling.png").unlink()
    (folder / "dangling.png").symlink_to("gone.png")
    return {
        "cut.png": "damaged picture",
        "cut.jpg": "damaged picture",
        "bomb.png": "too many pixels",
        "bigger_bomb.png": "too many pixels",
        "nothing.png": "not a picture",
        "text.png": "not a picture",
        "blank.png": "empty caption",
        "no_line.png": "empty caption",
        "latin.png": "caption is not UTF-8",
        "folder_caption.png": "caption file cannot be read",
        "alone.png": "no caption file",
        "dangling.png": "picture cannot be read",
    }


def test_bad_samples_are_left_out_counted_and_named(pictures: Path, tmp_path: Path) -> None:
    want = {f"bad/{name}": cause for name, cause in put_bad_pictures(pictures / "bad").items()}
    odd = os.fsencode(pictures) + b"/bad/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"")
    out = build_shards(config(pictures, tmp_path / "out", max_bad_share=0.5, held_out=0.2))
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {row["path"]: row["cause"] for row in rows} == want | {"bad/\udcff.png": "file name is not UTF-8"}
    outputs = read_manifest(out)["outputs"]
    assert outputs["skipped"]["damaged picture"] == outputs["skipped"]["too many pixels"] == 2
    assert sum(outputs["skipped"].values()) == 13 and outputs["pretrain"] + outputs["retrieval"] == 40
    stored = stock_read(out / "pretrain") + stock_read(out / "retrieval")
    assert not any("bad/" in json.loads(sample["json"])["source"] for sample in stored)


def test_too_many_bad_samples_stop_the_build(pictures: Path, tmp_path: Path) -> None:
    put_bad_pictures(pictures / "bad")
    out = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"of 52 samples are bad \(.*2 × empty caption.*max_bad_share=0\.05.*skipped\.jsonl"
    ):
        build_shards(config(pictures, out))
    assert "bad/latin.png" in (out / "skipped.jsonl").read_text() and not (out / "manifest.json").exists()
    with pytest.raises(InputError, match=r"too many pixels.*max_bad_share=0\.15"):  # seen only when decoding
        build_shards(config(pictures, out, max_bad_share=0.15))
    for bad in (pictures / "bad").iterdir():
        bad.rmdir() if bad.is_dir() else bad.unlink()
    build_shards(config(pictures, out))  # mended, the same folder can be used
    assert (out / "skipped.jsonl").read_text() == ""


def test_a_killed_build_goes_on_and_its_workers_end(pictures: Path, tmp_path: Path) -> None:
    (pictures / "a" / "picture1.png").write_bytes(b"no picture")  # in the first shard: its cause must survive the kill
    clean, cut = tmp_path / "clean", tmp_path / "cut"
    values = {"size": 400, "per_shard": 8, "held_out": 0.2, "workers": 2}  # large, so that there is time to kill it
    arguments = [f"{key}={value}" for key, value in values.items()]
    code = f"import sys; sys.argv = {['build', f'source={pictures}', f'out={cut}', *arguments]!r}\n" + (
        "from clips_core.build import BuildConfig, build_shards\nfrom clips_core.config import load_config\n"
        "build_shards(load_config(BuildConfig, None, sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    journal = cut / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and '"part"' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=20)[1]  # none is alive
    assert not (cut / "manifest.json").exists(), "it had finished before it could be killed"
    before = (cut / "pretrain" / "shard-000000.tar").stat().st_mtime_ns

    with open(journal, "a") as file:
        file.write('{"part": "pretr')  # as a kill in the middle of a line leaves it
    build_shards(config(pictures, cut, **values))
    build_shards(config(pictures, clean, **values))
    assert files(cut) == files(clean)
    assert read_manifest(cut)["outputs"] == read_manifest(clean)["outputs"]
    assert read_manifest(cut)["outputs"]["skipped"] == {"not a picture": 1}
    assert (cut / "pretrain" / "shard-000000.tar").stat().st_mtime_ns == before  # kept, not made again


def test_an_unfinished_build_of_other_settings_starts_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (pictures / "bad.png").write_bytes(b"")
    (pictures / "bad.txt").write_text("Bad.")
    with pytest.raises(InputError):
        build_shards(config(pictures, out, max_bad_share=0, per_shard=4))
    assert list((out / "pretrain").glob("*.tar"))
    (pictures / "bad.png").unlink()
    build_shards(config(pictures, out, size=16))
    assert files(out) == files(build_shards(config(pictures, tmp_path / "clean", size=16)))


def test_a_finished_build_is_left_as_it_is(pictures: Path, tmp_path: Path) -> None:
    out = build_shards(config(pictures, tmp_path / "out"))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    build_shards(config(pictures, out, workers=2))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    with pytest.raises(InputError, match=r"config\.size: 8 → 16"):
        build_shards(config(pictures, out, size=16))
    put_picture(pictures / "new.png", "One more.", seed=999)
    with pytest.raises(InputError, match="pictures and captions"):
        build_shards(config(pictures, out))


def test_a_folder_with_something_else_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        build_shards(config(pictures, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_vocabulary_is_made_from_the_training_captions(pictures: Path, tmp_path: Path) -> None:
    out = build_shards(config(pictures, tmp_path / "out", held_out=0.3))
    tokenizer = ClipsTokenizer(out / "vocab.txt")
    train = [sample["txt"].decode() for sample in stock_read(out / "pretrain")]
    held_out = [sample["txt"].decode() for sample in stock_read(out / "retrieval")]
    for caption in train:
        decoded = tokenizer.decode(tokenizer.encode([caption], 40)[0][1:])
        assert decoded == caption.lower()
    numbers = {caption.rstrip(".").split()[-1] for caption in held_out if len(caption.rstrip(".").split()[-1]) > 1}
    assert numbers and not numbers & set(tokenizer.tokens)
    assert not (build_shards(config(pictures, tmp_path / "none", vocab_size=0)) / "vocab.txt").exists()


def test_another_caption_line(pictures: Path, tmp_path: Path) -> None:
    out = build_shards(config(pictures, tmp_path / "out", caption_line=2))
    assert {sample["txt"] for sample in stock_read(out / "pretrain")} == {b"de.utf8=Ein Bild."}
    assert not (out / "retrieval").exists()  # one caption for all: no picture could be told from another


def test_captions_whose_picture_cannot_be_read_are_counted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "drawing.svg").write_text("<svg/>")
    (pictures / "drawing.txt").write_text("A drawing.")
    (pictures / "._picture.png").write_bytes(b"what macOS leaves on foreign disks")
    outputs = read_manifest(build_shards(config(pictures, tmp_path / "out")))["outputs"]
    assert (outputs["captions_without_picture"], outputs["listed"]) == (1, 40)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_listings(pictures: Path, tmp_path: Path, kind: str) -> None:
    rows = [
        {"image": "a/picture1.png", "caption": 'A "green", \n thing', "synthetic_caption": "A bear. It naps."},
        {"image": "b/c/picture0.jpg", "caption": "Ein Bär", "synthetic_caption": ""},
        {"image": "b/c/picture0.jpg", "caption": "Un ours", "synthetic_caption": ""},
        {"image": "a/gone.png", "caption": "Gone.", "synthetic_caption": ""},
        {"image": "a/picture3.png", "caption": "", "synthetic_caption": "Never seen."},
        {"image": "a/picture5.png", "caption": "B@r", "synthetic_caption": ""},
    ]
    listing = pictures / f"list.{kind}"
    if kind == "csv":
        quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
        text = "\r\n".join([",".join(rows[0]), *quoted])
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    listing.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"B@r", b"B\xe4r"))
    out = build_shards(config(listing, tmp_path / "out", held_out=0, max_bad_share=0.5))
    stored = {sample["txt"].decode(): json.loads(sample["json"]) for sample in stock_read(out / "pretrain")}
    assert stored == {
        'A "green", thing': {"source": "a/picture1.png", "re_caption": "A bear. It naps."},
        "Ein Bär": {"source": "b/c/picture0.jpg"},
        "Un ours": {"source": "b/c/picture0.jpg"},
    }
    outputs = read_manifest(out)["outputs"]
    assert outputs["skipped"] == {"caption is not UTF-8": 1, "empty caption": 1, "picture cannot be read": 1}
    assert outputs["synthetic_captions"] == 1
    assert "naps" in (out / "vocab.txt").read_text().split()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "picture,caption\na.png,x\n", "line 1: no column image"),
        ("list.csv", "image,caption\n,x\n", "line 2: no image"),
        ("list.csv", 'image,caption\na.png,"x\n', "line 2: not CSV"),
        ("list.csv", "image,caption\n../a.png,x\n", "line 2: image '../a.png' must be relative"),
        ("list.csv", "image,caption\n/etc/a.png,x\n", "must be relative"),
        ("list.csv", "image,caption\n", "lists no picture"),
        ("list.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": \n', "line 2: not JSON"),
        ("list.jsonl", '["a.png"]\n', "line 1: not an object"),
        ("list.jsonl", '{"image": "a.png", "caption": 3}\n', "line 1: a caption must be a text"),
        ("list.jsonl", '{"image": "a\\u0000.png", "caption": "x"}\n', "must be relative"),
        ("list.txt", "", "ends in .csv or .jsonl"),
    ],
)
def test_a_bad_listing_is_one_clear_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        build_shards(config(tmp_path / name, tmp_path / "out"))
    assert message in str(error.value) and name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_source_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        build_shards(config(tmp_path / "gone", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no picture in it \(png, jpg"):
        build_shards(config(tmp_path / "empty", tmp_path / "out"))
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    (tmp_path / "empty" / "x.txt").write_text("Nothing.")
    with pytest.raises(InputError, match="none of its 1 pictures is left to train on"):
        build_shards(config(tmp_path / "empty", tmp_path / "out", max_bad_share=1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sise=8", "unknown key 'sise' (did you mean 'size'?)"),
        ("size=0", "'size'"),
        ("held_out=1", "'held_out'"),
        ("resize=crop", "'resize'"),
        ("vocab_size=50", "leaves no room"),
    ],
)
def test_bad_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(BuildConfig, None, ["source=a", "out=b", override])
    assert message in str(error.value)
