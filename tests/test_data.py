"""Training batches: the same whatever the number of workers and processes; bad samples replaced, logged, and too many of them."""

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clips_core.config import PretrainConfig, load_config
from clips_core.data import Batch, PretrainDataset, batches, read_caption
from clips_core.errors import BadSample, InputError
from clips_core.folders import MetricsLog
from clips_core.shards import Shards, write_shards
from clips_core.sources import Sources
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from tests.web_server import serve

BOMB = io.BytesIO()
Image.new("1", (9000, 9000)).save(BOMB, "PNG")


def samples(count: int, start: int = 0) -> list[dict[str, Any]]:
    """The first pixel of picture i is i."""
    rows = []
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pixels[0, 0, 0] = i % 256
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        text = f"One {i} apple. Two {i} pears! Three {i} nuts."
        rows.append(
            {"__key__": f"{i:04d}", "png": buffer.getvalue(), "txt": f"fruit {i}", "json": {"re_caption": text}}
        )
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 good samples in 12 shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(samples(96), folder, per_shard=8)
    train_vocab([f"one two three fruit apple pears nuts {i}" for i in range(200)], folder / "vocab.txt")
    return folder


def make_config(shards: Path, out: Path, *overrides: str) -> PretrainConfig:
    transformer = "{width: 8, layers: 1, heads: 1}"
    settings = [
        f"out={out}", f"data.train={shards}", "data.shuffle_chunks=3", "samples=960", "batch_size=16", "learning_rate=1e-3",
        f"model={{image_size: 16, patch_size: 8, embed_dim: 8, context_length: 12, learnable_tokens: 24, vocab_size: 400, "
        f"vision: {transformer}, text: {transformer}, decoder: {transformer}}}",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*settings, *overrides])


@pytest.fixture
def dataset(shards: Path, tmp_path: Path) -> Any:
    tokenizer = ClipsTokenizer(shards / "vocab.txt")
    return lambda *overrides: PretrainDataset(make_config(shards, tmp_path / "run", *overrides), tokenizer)


def keys(found: list[Batch]) -> list[str]:
    return [key.rpartition(":")[2] for batch in found for key in batch.keys]


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys == y.keys and x.skipped == y.skipped and x.tensors.keys() == y.tensors.keys()
        assert all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The global batches out of those of all processes. Targets are cut per process, so they are padded again."""
    whole = []
    for step in zip(*parts, strict=True):
        longest = max(batch.tensors["target"].shape[1] for batch in step)
        for batch in step:
            target = batch.tensors["target"]
            batch.tensors["target"] = torch.nn.functional.pad(target, (0, longest - target.shape[1]))
        tensors = {name: torch.cat([batch.tensors[name] for batch in step]) for name in step[0].tensors}
        keys = [key for batch in step for key in batch.keys]
        whole.append(Batch(tensors, keys, [item for batch in step for item in batch.skipped]))
    return whole


AUGMENTED = ("data.crop_area=0.4", "data.colour_jitter=0.4")


@pytest.mark.parametrize("lanes", [1, 4])
def test_workers_processes_and_restarts_change_nothing(dataset: Any, lanes: int) -> None:
    settings = (*AUGMENTED, f"data.lanes={lanes}")
    whole = list(batches(dataset(*settings), 0, 9, 16, workers=0))
    assert_equal(whole, list(batches(dataset(*settings), 0, 9, 16, workers=2)))
    assert_equal(whole[4:], list(batches(dataset(*settings), 4, 9, 16, workers=0)))
    for world_size in (2, 4):
        parts = [list(batches(dataset(*settings), 0, 9, 16, 0, rank, world_size)) for rank in range(world_size)]
        assert all(len(batch.keys) == 16 // world_size for part in parts for batch in part)
        if lanes == 4:  # no two processes read from the same shard
            used = [{key.rpartition(":")[0] for batch in part for key in batch.keys} for part in parts]
            assert all(not a & b for a, b in itertools.combinations(used, 2))
        assert_equal(whole, joined(parts))
    other = list(batches(dataset(*settings, "seed=1"), 0, 9, 16, 0))
    assert keys(other) != keys(whole)


def test_an_epoch_has_every_sample_once_with_other_draws_than_the_last(dataset: Any) -> None:
    found = list(batches(dataset(*AUGMENTED), 0, 12, 16, workers=0))
    epochs = [keys(found[:6]), keys(found[6:])]
    assert [sorted(epoch) for epoch in epochs] == [[f"{i:04d}" for i in range(96)]] * 2 and epochs[0] != epochs[1]
    images = [{key: image for b in half for key, image in zip(b.keys, b.tensors["image"], strict=True)}
              for half in (found[:6], found[6:])]  # fmt: skip
    assert sum(torch.equal(images[0][key], images[1][key]) for key in images[0]) < 5


def test_a_repair_list_leaves_samples_out(dataset: Any, shards: Path, tmp_path: Path) -> None:
    """Two in each shard are replaced, and are nobody's fault; the others come as without the list."""
    out = [(shards / f"shard-{i // 8:06d}.tar", f"{i:04d}") for i in range(96) if i % 8 in (0, 5)]
    finding = {"cause": "damaged picture", "detail": "", "repair": "leave out"}
    lines = [json.dumps({"shard": str(shard), "key": key, **finding}) for shard, key in out]
    (tmp_path / "repair.jsonl").write_text("\n".join(lines) + "\n")
    whole = list(batches(dataset(), 0, 6, 16, workers=0))
    found = list(batches(dataset(f"data.exclude={tmp_path / 'repair.jsonl'}", "data.max_bad_share=0"), 0, 6, 16, 0))
    left_out = {key for _, key in out}
    assert not any(batch.skipped for batch in found) and not left_out & set(keys(found))
    pairs = list(zip(keys(whole), keys(found), strict=True))
    assert all(before == after for before, after in pairs if before not in left_out)
    (tmp_path / "repair.jsonl").write_text(lines[0].replace("shard-000000", "elsewhere") + "\n")
    with pytest.raises(InputError, match="names none of this run's shards"):
        dataset(f"data.exclude={tmp_path / 'repair.jsonl'}")


def test_keys_name_the_rows(dataset: Any, shards: Path) -> None:
    (batch,) = batches(dataset(), 0, 1, 16, 0)
    for key, image in zip(batch.keys, batch.tensors["image"], strict=True):
        shard, _, name = key.rpartition(":")
        assert (
            Path(shard).parent == shards and int(image[0, 0, 0]) == int(name) and int(name) // 8 == int(shard[-10:-4])
        )


def test_sources_are_mixed(dataset: Any, shards: Path, tmp_path: Path) -> None:
    write_shards(samples(16, 1000), tmp_path / "b", per_shard=8)
    sources = f"data.train=[{{path: {shards}, weight: 3}}, {{path: {tmp_path / 'b'}, weight: 1}}]"
    mixed = dataset(sources)
    found = keys(list(batches(mixed, 0, 125, 16, workers=0)))
    for start in (0, 1000):
        assert Counter(int(key) >= 1000 for key in found[start : start + 1000]) == {False: 750, True: 250}
    own = [key for key in found if int(key) < 1000]
    assert sorted(own[:96]) == sorted(own[96:192]) == [f"{i:04d}" for i in range(96)]  # epochs of its own
    assert mixed.sources.fingerprint().startswith("112 samples, 14 shards, ")


def test_remote_tars_and_parquet_through_workers(
    dataset: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made by several workers, some of them ahead of time, and are gone at the end."""
    rows = samples(96)
    for i in range(4):
        part = rows[24 * i : 24 * i + 24]
        names = {"key": "__key__", "image": "png", "caption": "txt"}
        columns: dict[str, list[Any]] = {column: [row[name] for row in part] for column, name in names.items()}
        columns["json"] = [json.dumps(row["json"]) for row in part]
        pq.write_table(pa.table(columns), tmp_path / f"{i}.parquet", row_group_size=8)  # as the tars
    settings = ("data.crop_area=0.4", "data.colour_jitter=0.4", f"data.cache={tmp_path / 'cache'}", "data.lanes=2",
                "data.shuffle_chunks=1")  # fmt: skip
    want = list(batches(dataset(*settings), 0, 18, 16, 0))
    asked: list[int] = []
    fetch_ahead = Sources.fetch_ahead
    monkeypatch.setattr(Sources, "fetch_ahead", lambda self, *args: (asked.append(1), fetch_ahead(self, *args))[1])
    with serve(shards) as (url, _):
        tars = f"data.train={url}/shard-{{000000..000011}}.tar"
        for train in (tars, f"data.train={tmp_path}"):
            for workers in (0, 2):
                data = dataset(*settings, train)
                found = list(batches(data, 0, 18, 16, workers))
                assert keys(found) == keys(want)
                for x, y in zip(found, want, strict=True):
                    assert all(torch.equal(x.tensors[name], y.tensors[name]) for name in y.tensors)
                copies = [path for path in (tmp_path / "cache").glob("*/*") if not path.name.startswith("lock-")]
                assert 1 <= len(copies) <= 8  # of 12 chunks: of either lane and worker this one and the next
                del data
                assert list((tmp_path / "cache").iterdir()) == []
    assert not asked  # in this process, which forks, nothing was fetched by a thread


# --- bad samples ----------------------------------------------------------------------------------------------------

FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("damaged picture", {"png": samples(1)[0]["png"][:200]}, "not a readable picture"),
    ("not a picture", {"png": b"<html>"}, "not a readable picture"),
    ("too many pixels", {"png": BOMB.getvalue()}, "over the limit of 64 Mpx"),
    ("no picture", {"png": None}, "looked for jpg, jpeg, png"),
    ("no caption", {"txt": None}, "no file or column for the caption 'txt' or 'caption'"),
    ("empty caption", {"txt": " \n"}, "the caption 'txt' or 'caption' is empty"),
    ("caption is not UTF-8", {"txt": b"\xff\xfe"}, "utf-8"),
    ("caption is not JSON", {"json": b"{"}, "caption 'json.re_caption' cannot be read"),
    ("caption is not JSON", {"json": b"[1]"}, "caption 'json.re_caption' cannot be read"),
]


def write_faulty(folder: Path, faults: dict[int, dict[str, Any]], count: int = 96) -> Path:
    rows = samples(count)
    for i, fault in faults.items():
        rows[i] = {name: value for name, value in (rows[i] | fault).items() if value is not None}
    write_shards(rows, folder, per_shard=8)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_counted_and_logged(dataset: Any, tmp_path: Path, workers: int) -> None:
    folder = write_faulty(tmp_path / "bad", {10 * i: fault for i, (_, fault, _) in enumerate(FAULTS)})
    settings = (f"data.train={folder}", "data.max_bad_share=0.2", *AUGMENTED)
    log = tmp_path / "run" / "skipped.jsonl"
    whole = list(batches(dataset(*settings), 0, 6, 16, workers, log=log))
    rows = MetricsLog(log).rows()
    assert {(int(row["key"]) // 10, row["cause"]) for row in rows} == {
        (i, cause) for i, (cause, *_) in enumerate(FAULTS)
    }
    for row in rows:
        shard = folder / f"shard-{int(row['key']) // 8:06d}.tar"
        assert row["shard"] == str(shard) and row["detail"].startswith(f"{shard}, key '{row['key']}'")
        assert FAULTS[int(row["key"]) // 10][2] in row["detail"] and 1 <= row["step"] <= 6
    bad = {f"{10 * i:04d}" for i in range(len(FAULTS))}
    # A replacement comes from the same three shards; all the others are there.
    seen = Counter(keys(whole))
    assert seen.total() == 96 and not set(seen) & bad and set(seen) | bad == {f"{i:04d}" for i in range(96)}
    clean = list(batches(dataset(), 0, 6, 16, 0))
    assert sum(a != b for a, b in zip(keys(whole), keys(clean), strict=True)) == len(bad)
    # Neither a restart nor the number of processes changes what replaces what.
    assert_equal(whole[3:], list(batches(dataset(*settings), 3, 6, 16, 0)))
    assert_equal(whole, joined([list(batches(dataset(*settings), 0, 6, 16, 0, rank, 2)) for rank in range(2)]))
    # Going on from step 3 cuts the log back to it, and then repeats it.
    list(itertools.islice(batches(dataset(*settings), 3, 6, 16, 0, log=log), 1))
    assert MetricsLog(log).rows() == [row for row in rows if row["step"] <= 4]
    list(batches(dataset(*settings), 3, 6, 16, 0, log=log))
    assert MetricsLog(log).rows() == rows
    list(batches(dataset(*settings), 0, 6, 16, 0, 1, 2, log=log))
    own = MetricsLog(log.with_name("skipped-00001.jsonl")).rows()
    assert own and all(row in rows for row in own) and MetricsLog(log).rows() == rows


def test_too_many_bad_samples_stop_the_run(dataset: Any, tmp_path: Path) -> None:
    folder = write_faulty(
        tmp_path / "bad", {i: {"txt": ""} if i % 2 else {"png": b"x"} for i in range(0, 96, 7)}
    )  # 14 of 96
    log = tmp_path / "skipped.jsonl"
    with pytest.raises(InputError) as caught:
        list(batches(dataset(f"data.train={folder}"), 0, 60, 16, 0, log=log))
    message = str(caught.value)
    rows = MetricsLog(log).rows()
    assert 6 <= len(rows) < 30  # five of the first hundred could be chance
    assert f"{len(rows)} of the {len(rows) + 16 * rows[-1]['step']} samples" in message
    for cause, count in Counter(row["cause"] for row in rows).items():
        assert f"{count} × {cause}" in message
    assert message.endswith("; ".join(row["detail"] for row in rows[:3])) and "data.max_bad_share=0.01" in message
    list(batches(dataset(f"data.train={folder}", "data.max_bad_share=0.2"), 0, 60, 16, 0))
    with pytest.raises(InputError, match=r"max_bad_share=0\.1 "):
        list(batches(dataset(f"data.train={folder}", "data.max_bad_share=0.1"), 0, 60, 16, 0))


def test_a_few_bad_samples_by_chance_stop_no_run(dataset: Any, tmp_path: Path) -> None:
    folder = write_faulty(
        tmp_path / "bad", {40: {"txt": ""}, 41: {"txt": ""}}
    )  # 2 % as it happens, among the first 100
    first = list(itertools.islice(batches(dataset(f"data.train={folder}"), 0, 1000, 16, 0), 6))
    assert sum(len(batch.skipped) for batch in first) >= 2


def test_one_bad_sample_is_too_many_where_the_share_cannot_be_kept(dataset: Any, tmp_path: Path) -> None:
    folder = write_faulty(tmp_path / "bad", {3: {"txt": ""}}, count=32)
    for settings in (("samples=48",), ("data.max_bad_share=0",)):
        with pytest.raises(InputError, match=r"1 of the .*1 × empty caption.*key '0003': the caption"):
            list(batches(dataset(f"data.train={folder}", *settings), 0, 3, 16, 0))
    assert len(list(batches(dataset(f"data.train={folder}", "data.max_bad_share=0.04"), 0, 60, 16, 0))) == 60


@pytest.mark.parametrize("share", [0.01, 1.0])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_of_bad_samples_alone_ends(dataset: Any, tmp_path: Path, share: float, workers: int) -> None:
    folder = write_faulty(tmp_path / "bad", {i: {"txt": None} for i in range(96)})
    data = dataset(f"data.train={folder}", f"data.max_bad_share={share}", "data.shuffle_chunks=12")
    with pytest.raises(
        InputError, match=r"96 samples in a row cannot be used \(96 × no caption\); the first: .*shard-0"
    ):
        list(batches(data, 0, 60, 16, workers))


def test_cut_off_and_broken_tars(dataset: Any, tmp_path: Path) -> None:
    folder = write_faulty(tmp_path / "bad", {})
    cut = folder / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    whole = len(Shards(folder / "shard-000001.tar"))
    log = tmp_path / "skipped.jsonl"
    data = dataset(f"data.train={folder}")
    left = int(data.sources.sources[0].counts[2])
    assert 0 < left < whole and len(data) == 96 - 8 + left
    for _ in range(2):  # starting again does not report it twice
        list(batches(data, 0, 5, 16, 0, log=log))
        (row,) = MetricsLog(log).rows()
        assert (row["step"], row["shard"], row["key"], row["cause"]) == (0, str(cut), "", "cut-off tar")
    # Counted from img2dataset's stats, it is found out on the way: the samples behind the cut are bad ones.
    for path in folder.glob("*.tar"):
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": 8}))
    data = dataset(f"data.train={folder}", "data.max_bad_share=0.2")
    found = list(batches(data, 0, 6, 16, 0))
    assert Counter(item.cause for batch in found for item in batch.skipped)["cut-off tar"] >= 8 - left
    assert {int(key) for key in keys(found)} == set(range(96)) - set(range(16 + left, 24))
    (folder / "shard-000004_stats.json").write_text(json.dumps({"successes": 7}))
    with pytest.raises(InputError, match=r"shard-000004\.tar: holds 8 samples, but 7 were counted"):
        list(batches(dataset(f"data.train={folder}"), 0, 6, 16, 0))


# --- before the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lanes", "batch_size", "world_size", "message"),
    [
        (1, 16, 3, "batch_size 16 cannot be split evenly among 3"),
        (3, 16, 1, "batch_size 16 is not a multiple of data.lanes=3"),
        (4, 12, 6, "neither a multiple nor a divisor of the 6 processes"),
        (1, 112, 1, "holds 96 samples, fewer than one batch of 112"),
    ],
)
def test_what_would_leave_a_process_waiting(
    dataset: Any, lanes: int, batch_size: int, world_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        dataset(f"data.lanes={lanes}").check(batch_size, world_size)


def test_what_fits_passes(dataset: Any) -> None:
    for lanes, world_size in [(1, 1), (1, 8), (4, 2), (2, 8), (8, 8)]:
        dataset(f"data.lanes={lanes}").check(16, world_size)
    with pytest.raises(InputError, match=r"data\.lanes=16, but a source has only 12 chunks"):
        dataset("data.lanes=16")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_bad_share=2", "max_bad_share must be between 0 and 1"),
        ("data.crop_area=0", "crop_area must be greater than 0"),
        ("data.colour_jitter=1.5", "colour_jitter must be between"),
        ("data.lanes=0", "lanes at least 1"),
        ("data.train=[]", "at least one path"),
        ("data.train=[{path: a, weight: 0}]", "weight must be greater than 0"),
        ("data.train=[{path: a}]", "'data.train.0.weight' is required"),
    ],
)
def test_settings_are_checked(shards: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(shards, Path("unused"), override)


# --- captions -------------------------------------------------------------------------------------------------------


def test_the_first_caption_that_is_there_is_taken() -> None:
    sample = {"__shard__": "s", "__key__": "k", "txt": b" ", "caption": "column", "json": b'{"a": "A", "b": null, "c": 3}',
              "struct": {"a": "B"}, "json.x": "dotted"}  # fmt: skip
    assert read_caption(sample, "caption") == "column"
    assert read_caption(sample, ["alt", "txt", "json.b", "caption"]) == "column"
    assert read_caption(sample, ["json.nothing", "json.c", "json.a"]) == "A"
    assert read_caption(sample, "struct.a") == "B" and read_caption(sample, "json.x") == "dotted"
    assert read_caption(sample, ["txt", "json.b"], optional=True) == read_caption(sample, "alt", optional=True) == ""
    for names, cause in [
        (["alt", "json.b"], "empty caption"),
        (["alt"], "no caption"),
        (["caption.x"], "caption is not JSON"),
    ]:
        with pytest.raises(BadSample, match="s, key 'k'") as caught:
            read_caption(sample, names)
        assert caught.value.cause == cause
    with pytest.raises(BadSample) as caught:
        read_caption({**sample, "caption": "\udcff"}, "caption")  # as a listing gives bytes that are not UTF-8
    assert caught.value.cause == "caption is not UTF-8"
