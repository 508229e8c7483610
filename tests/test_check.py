"""Shards with each fault there is, looked through; what is reported is compared with what was put in, and with training."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from clips_core.captions import split_caption
from clips_core.check import CheckConfig, check_data
from clips_core.config import DataConfig, PretrainConfig, load_config
from clips_core.data import PretrainDataset
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from clips_core.repair import excluded, read_repair_list
from clips_core.tokenizer import BERT_VOCAB, ClipsTokenizer

Files = dict[str, bytes]


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(number: int, synthetic: str | None = "A picture. It shows a thing!", **more: bytes) -> Files:
    description = {"re_caption": synthetic} if synthetic is not None else {}
    files = {
        "jpg": encoded(picture(number)),
        "txt": f"web caption {number}".encode(),
        "json": json.dumps(description).encode(),
    }
    return {name: data for name, data in {**files, **more}.items() if data != b"-"}


def put_tar(path: Path, samples: list[tuple[str, Files]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def faulty_samples() -> dict[str, tuple[str, Files]]:
    """One of each fault by key: its cause, its files."""
    jpg, png = encoded(picture(0)), encoded(picture(0), "PNG")
    return {
        "cut_jpg": ("damaged picture", sample(0, jpg=jpg[: len(jpg) // 2])),
        "cut_png": ("damaged picture", sample(0, jpg=b"-", png=png[: len(png) // 2])),
        "bomb": ("too many pixels", sample(0, jpg=encoded(Image.new("1", (9000, 9000)), "PNG"))),
        "html": ("not a picture", sample(0, jpg=b"<html>404</html>")),
        "no_picture": ("no picture", sample(0, jpg=b"-")),
        "no_caption": ("no caption", sample(0, txt=b"-")),
        "blank_caption": ("empty caption", sample(0, txt=b" \n")),
        "latin": ("caption is not UTF-8", sample(0, txt="Ein Bär".encode("latin-1"))),
        "bad_json": ("caption is not JSON", sample(0, json=b'{"re_caption": ')),
    }


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Two sound shards of 20 (the second half without synthetic captions), one with all faults, a cut one, a web page."""
    folder = tmp_path / "train"
    put_tar(folder / "00000.tar", [(f"a{n}", sample(n)) for n in range(20)])
    put_tar(folder / "00001.tar", [(f"b{n}", sample(n, None)) for n in range(20, 40)])
    faulty = [(key, files) for key, (_, files) in faulty_samples().items()]
    put_tar(folder / "00002.tar", [*faulty, ("twin", sample(41)), ("twin", sample(42))])
    put_tar(folder / "00003.tar", [(f"c{n}", sample(n)) for n in range(50, 60)])
    whole = (folder / "00003.tar").read_bytes()
    (folder / "00003.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "00004.tar").write_bytes(b"<html>" * 1000)
    return folder


def config(train: Path | str, out: Path, **values: Any) -> CheckConfig:
    data = DataConfig(train=str(train), max_bad_share=values.pop("max_bad_share", 1.0))
    return CheckConfig(**{"data": data, "out": out, "workers": 1, **values})


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def test_each_fault_is_found_and_named(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = check_data(config(train, tmp_path / "out"))
    found = report(out)
    causes = {key: cause for key, (cause, _) in faulty_samples().items()}
    findings = list(read_repair_list(out / "repair.jsonl"))
    named = {(Path(f.shard).name, f.key): f.cause for f in findings if f.key}
    assert named == {("00002.tar", key): cause for key, cause in causes.items()} | {
        ("00002.tar", "twin"): "key occurs twice"
    }
    assert found["skipped"] == dict(Counter(causes.values()))
    whole = {Path(f.shard).name: (f.cause, f.repair) for f in findings if not f.key}
    assert whole == {
        "00003.tar": ("cut-off tar", "replace the file"),
        "00004.tar": ("not a tar", "replace the file"),
    }
    kept = found["samples"] - 40 - len(causes) - 2  # of the cut shard
    assert 3 <= kept <= 6 and found["usable"] == 42 + kept
    assert found["bad_share"] == len(causes) / found["samples"]
    assert (found["files"], found["faulty_files"]) == (5, 2)
    assert found["synthetic_captions"] == 22 + kept
    assert read_manifest(out, "check")["outputs"] == found
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "repair.jsonl", "report.json"]
    assert "damaged picture" in capsys.readouterr().out


def test_what_is_reported_is_what_training_skips(train: Path, tmp_path: Path) -> None:
    """Every sample once through the loader: the same shards, keys and causes."""
    (train / "00004.tar").unlink()
    settings = config(train, tmp_path / "out")
    check_data(settings)
    tower = "{width: 16, layers: 1, heads: 2}"
    sizes = [f"model.{part}={tower}" for part in ("vision", "text", "decoder")]
    sizes += ["model.image_size=16", "model.patch_size=8", "model.embed_dim=8", "model.learnable_tokens=32"]
    run = [f"out={tmp_path / 'run'}", "samples=4", "batch_size=4", "learning_rate=1e-3", "data.max_bad_share=1"]
    run.append(f"data.train={train}")
    data = PretrainDataset(load_config(PretrainConfig, None, [*run, *sizes]), ClipsTokenizer())
    skipped: set[tuple[str, str, str]] = set()
    used: set[str] = set()
    for position in range(len(data)):
        item = data[position]
        assert isinstance(item, dict)
        skipped |= {(s.shard, s.key, s.cause) for s in item["skipped"]}
        used.add(item["key"])
    leave_out = {f for f in read_repair_list(tmp_path / "out" / "repair.jsonl") if f.repair == "leave out"}
    assert {(f.shard, f.key, f.cause) for f in leave_out} == skipped
    assert len(skipped) == len(faulty_samples())
    assert excluded(tmp_path / "out" / "repair.jsonl") == {(shard, key) for shard, key, _ in skipped}
    assert not {f"{shard}:{key}" for shard, key, _ in skipped} & used


def test_caption_lengths_are_the_tokenizers(tmp_path: Path) -> None:
    captions = [" ".join(["word"] * n) + ". Unbelievably, end!" for n in (1, 5, 50, 90, 140)]
    put_tar(
        tmp_path / "train" / "0.tar", [(f"{i}", sample(i, text, txt=text.encode())) for i, text in enumerate(captions)]
    )
    found = report(check_data(config(tmp_path / "train", tmp_path / "out", context_length=70)))["tokens"]
    bert = BertWordPieceTokenizer(str(BERT_VOCAB), lowercase=True)

    def lengths(texts: list[str]) -> list[int]:
        return sorted(len(bert.encode(text, add_special_tokens=False).ids) for text in texts)

    whole = lengths(captions)
    assert [found["web"][name] for name in ("n", "min", "p50", "max")] == [5, whole[0], whole[2], whole[4]]
    assert found["web"]["mean"] == round(sum(whole) / 5, 2) and found["web"]["room"] == 67
    assert found["web"]["cut"] == sum(length > 67 for length in whole) == 2
    assert found["synthetic"]["room"] == 127 and found["synthetic"]["cut"] == 1
    pieces = lengths([piece for caption in captions for piece in split_caption(caption)])
    assert found["sub-caption"]["n"] == 10 == len(pieces)
    assert (found["sub-caption"]["p25"], found["sub-caption"]["max"]) == (pieces[2], pieces[-1])


def test_picture_sizes(tmp_path: Path) -> None:
    sizes = [(30 + 10 * n, 20 + n) for n in range(20)]
    samples = [(f"{i}", sample(i, jpg=encoded(picture(i, size)))) for i, size in enumerate(sizes)]
    put_tar(tmp_path / "train" / "0.tar", samples)
    found = report(check_data(config(tmp_path / "train", tmp_path / "out")))["pixels"]
    assert (found["shortest"]["min"], found["shortest"]["p50"], found["shortest"]["max"]) == (20, 29, 39)
    assert (found["longest"]["min"], found["longest"]["p5"], found["longest"]["max"]) == (30, 30, 220)


def test_copies_of_evaluation_pictures_are_found(tmp_path: Path) -> None:
    """The same bytes, and others of the same look; not other pictures, and not blank ones among one another."""
    blank = [encoded(Image.new("RGB", (40, 40), (shade, shade, shade))) for shade in (255, 254, 0)]
    evaluation = [(f"e{n}", {"jpg": encoded(picture(n)), "cls": b"0"}) for n in range(30)]
    put_tar(tmp_path / "eval" / "0.tar", [*evaluation, ("white", {"jpg": blank[0]}), ("broken", {"jpg": b"x"})])
    samples = [(f"other{n}", sample(n)) for n in range(100, 140)]
    samples += [("same", sample(0, jpg=encoded(picture(3)))), ("white", sample(0, jpg=blank[0]))]
    samples += [("grey", sample(0, jpg=blank[1])), ("black", sample(0, jpg=blank[2]))]
    samples += [(f"small{n}", sample(0, jpg=encoded(picture(n).resize((40, 40)), quality=50))) for n in (5, 6)]
    samples += [("png", sample(0, jpg=b"-", png=encoded(picture(6).resize((200, 160)), "PNG")))]
    samples += [("mirrored", sample(0, jpg=encoded(picture(7).transpose(Image.Transpose.FLIP_LEFT_RIGHT))))]
    put_tar(tmp_path / "train" / "0.tar", samples)
    out = check_data(config(tmp_path / "train", tmp_path / "out", evaluation=[str(tmp_path / "eval")]))
    findings = {
        f.key: (f.cause, f.detail.partition(",")[0].rpartition(":")[2]) for f in read_repair_list(out / "repair.jsonl")
    }
    bytes_, look = "copy of an evaluation picture", "looks like an evaluation picture"
    assert findings == {
        "same": (bytes_, "e3"),
        "white": (bytes_, "white"),
        "small5": (look, "e5"),
        "small6": (look, "e6"),
        "png": (look, "e6"),
    }
    found = report(out)
    assert found["evaluation"] == {"pictures": 31, "copied_into_training": 4, "blank": 1, "training_blank": 3}
    assert found["skipped"] == {} and found["other_findings"] == {bytes_: 2, look: 3}
    assert {key for _, key in excluded(out / "repair.jsonl")} == set(findings)
    exact = check_data(
        config(tmp_path / "train", tmp_path / "exact", evaluation=[str(tmp_path / "eval")], hash_distance=0)
    )
    assert {f.key for f in read_repair_list(exact / "repair.jsonl")} <= set(findings)


def result(out: Path) -> tuple[bytes, bytes]:
    return (out / "report.json").read_bytes(), (out / "repair.jsonl").read_bytes()


def test_workers_do_not_change_the_result(train: Path, tmp_path: Path) -> None:
    put_tar(tmp_path / "eval" / "0.tar", [(f"e{n}", {"jpg": encoded(picture(n))}) for n in range(5)])
    one = check_data(config(train, tmp_path / "one", evaluation=[str(tmp_path / "eval")]))
    two = check_data(config(train, tmp_path / "two", evaluation=[str(tmp_path / "eval")], workers=2))
    assert result(one) == result(two) and report(one)["evaluation"]["copied_into_training"] == 5


def test_a_killed_check_goes_on(train: Path, tmp_path: Path) -> None:
    """kill -9 when the second chunk's file has just appeared: the chunks before it are not looked through again."""
    cut = tmp_path / "cut"
    child = os.fork()
    if child == 0:  # it ends by its own hand, before pytest's teardown
        replace = os.replace

        def dying(source: Any, target: Any) -> None:
            replace(source, target)
            if str(target).endswith("000-00000001.json"):
                os.kill(os.getpid(), 9)

        os.replace = dying
        try:
            check_data(config(train, cut))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    kept = sorted((cut / ".check" / "training").glob("*.json"))
    assert len(kept) == 2 and not (cut / "report.json").exists()
    (cut / ".check" / "training" / ".000-00000002.json.1.tmp").write_bytes(b"half")
    sound, stat = (train / "00000.tar").read_bytes(), os.stat(train / "00000.tar")
    (train / "00000.tar").write_bytes(sound.replace(b"\xff\xd8\xff", bytes(3)))  # no picture in it is one any more
    os.utime(train / "00000.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check_data(config(train, cut))
    (train / "00000.tar").write_bytes(sound)
    assert result(cut) == result(check_data(config(train, tmp_path / "clean")))


def test_too_many_bad_samples_are_an_error_behind_the_report(train: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"9 of \d+ samples cannot be used .*max_bad_share=0.1 .*repair.jsonl names each"
    ):
        check_data(config(train, tmp_path / "out", max_bad_share=0.1))
    assert report(tmp_path / "out")["skipped"]["damaged picture"] == 2
    with pytest.raises(InputError, match=r"2 of 5 files cannot be used"):
        check_data(config(train, tmp_path / "out", max_bad_share=0.3))
    check_data(config(train, tmp_path / "out", max_bad_share=0.5))  # the same data: it is not looked through again


def test_a_finished_check_is_left_as_it_is(train: Path, tmp_path: Path) -> None:
    out = check_data(config(train, tmp_path / "out"))
    before = (out / "report.json").stat().st_mtime_ns
    check_data(config(train, out))
    assert (out / "report.json").stat().st_mtime_ns == before and not (out / ".check").exists()
    with pytest.raises(InputError, match="holds another result"):
        check_data(config(train, out, context_length=64))
    put_tar(train / "00005.tar", [("d", sample(0))])
    with pytest.raises(InputError, match=r"holds another result \(inputs.training"):
        check_data(config(train, out))


def test_parquet_and_listings(tmp_path: Path) -> None:
    rows = [
        {"key": f"k{n}", "jpg": encoded(picture(n)), "caption": f"c {n}", "synthetic_caption": "It is."}
        for n in range(6)
    ]
    rows[2]["caption"], rows[4]["jpg"] = " ", b"x"
    (tmp_path / "a").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / "0.parquet", row_group_size=4)
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(picture(10 + n)))
    lines = [{"image": f"{n}.jpg", "caption": "c"} for n in range(5)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataConfig(train=[str(tmp_path / "a"), str(tmp_path / "list.jsonl")], max_bad_share=1)
    out = check_data(CheckConfig(data=data, out=tmp_path / "out", evaluation=[str(tmp_path / "a")], workers=1))
    findings = [(Path(f.shard).name, f.key, f.cause) for f in read_repair_list(out / "repair.jsonl")]
    assert [f for f in findings if "evaluation" not in f[2]] == [
        ("0.parquet", "k2", "empty caption"),
        ("0.parquet", "k4", "not a picture"),
        ("list.jsonl", "sample 4", "no picture"),
    ]
    assert report(out)["usable"] == 8 and report(out)["synthetic_captions"] == 4
    assert report(out)["evaluation"]["copied_into_training"] == 4


def test_bad_settings_and_folders(train: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        check_data(config(train, tmp_path / "out"))
    with pytest.raises(InputError, match="no such folder"):
        check_data(config(tmp_path / "gone", tmp_path / "new"))
    with pytest.raises(InputError, match="unknown key 'hash_distanze'"):
        load_config(CheckConfig, None, ["data.train=a", "out=b", "hash_distanze=3"])
    assert load_config(CheckConfig, None, ["data.train=a", "out=b", "evaluation=c"]).evaluation == ["c"]


def test_a_bad_repair_list_is_one_clear_error(tmp_path: Path) -> None:
    good = '{"shard": "a.tar", "key": "k", "cause": "c", "detail": "", "repair": "leave out"}\n'
    for line in ("{", "[]", good.replace("leave out", "burn"), good.replace('"k"', "3"), '{"shard": "a"}'):
        (tmp_path / "repair.jsonl").write_text(good + line + "\n")
        with pytest.raises(InputError, match=r"repair.jsonl, line 2: not a finding"):
            excluded(tmp_path / "repair.jsonl")
    with pytest.raises(InputError, match="no such file"):
        excluded(tmp_path / "gone.jsonl")
