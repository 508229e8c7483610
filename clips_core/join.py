"""Synthetic captions from parquet → the samples of webdataset tars: Recap-DataComp-1B's captions to DataComp's pictures.

Neither side fits into memory, and they are in different orders. So both are split into partitions by a hash of the join key,
and a partition is matched at a time:

    scan      the shards' JSON → join keys by partition, and a bit map of all keys that are wanted
    captions  the parquet files → captions by partition, those that no sample wants left out
    match     partition by partition → captions by group of shards
    write     the shards, each with its captions

A task of a step (a group of shards, a parquet file, a partition, a shard) leaves one file, atomically: what a kill interrupts
goes on after the last whole task. Tasks know nothing of each other, so any number of workers gives the same bytes.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.files import find_files, is_remote
from clips_core.folders import first_difference, is_finished, read_json, write_bytes, write_json, write_manifest
from clips_core.processes import ordered_map
from clips_core.shards import Tar, add_sample, scan_tar

REPORT, PER_SHARD, WORK, BITS = "report.json", "shards.jsonl", ".join", "wanted.bits"
GROUP = 16  # shards whose captions are in memory at a time
PICTURES = ("jpg", "jpeg", "png", "webp")
EXAMPLES = 5  # samples named in the report for each cause
MAX_PARTITIONS = 4096
NOT_IN_THE_RESULT = (
    "out",
    "scratch",
    "workers",
    "memory_mb",
    "min_match_rate",
)  # settings that do not change the shards

# What a caption's partition file says of a wanted key.
MATCHED, EMPTY, DIFFER = 0, 1, 2
CAUSES = {EMPTY: "the caption is empty", DIFFER: "several captions that differ"}

KEYS = pa.schema([("hash", pa.binary(16)), ("shard", pa.int32()), ("place", pa.int32())])
CAPTIONS = pa.schema([("hash", pa.binary(16)), ("caption", pa.large_binary())])
MATCHES = pa.schema(
    [("shard", pa.int32()), ("place", pa.int32()), ("outcome", pa.int8()), ("caption", pa.large_binary())]
)


@dataclass(config=FORBID)
class JoinConfig:
    """What to join, by what, and where to."""

    shards: str  # folder, glob or brace pattern: webdataset tars, each sample with a .json
    captions: str  # folder, glob or brace pattern: parquet files
    out: Path  # folder for the shards with captions
    on: str = "sha256"  # column of the captions and field of the .json: sha256, url, uid; key: or the sample's own
    caption_column: str = "re_caption"  # the captions' column that is brought over
    field: str = "re_caption"  # its name in the samples' .json
    keep_unmatched: bool = True  # a sample without a synthetic caption trains on its web caption; false: leave it out
    differing: Literal["none", "first"] = "none"  # several captions of one key: take none, or the first in file order
    verify_pictures: bool = False  # a picture must have its .json's sha256; only for pictures stored as downloaded
    min_match_rate: float = Field(default=0.5, ge=0, le=1)  # fewer stop the join before it writes
    memory_mb: int = Field(default=2048, ge=1)  # of each worker, beyond Python and its libraries
    scratch: Path | None = None  # folder for intermediate files; null: in `out`
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)  # processes; the result is the same for any

    def __post_init__(self) -> None:
        if not self.field or not self.on or not self.caption_column:
            raise ValueError("on, caption_column and field must not be empty")


class _Join(NamedTuple):
    """What every task needs to know."""

    config: JoinConfig
    shards: list[Path]
    files: list[Path]  # parquet
    work: Path
    partitions: int
    row_bytes: float  # of a caption and its key, on average

    def groups(self) -> list[range]:
        """Numbers of the shards, a group at a time."""
        return [range(i, min(i + GROUP, len(self.shards))) for i in range(0, len(self.shards), GROUP)]


def join_captions(config: JoinConfig) -> Path:
    """Write the shards again with `json.FIELD` filled in, `report.json`, `shards.jsonl` (a line per shard) and the manifest.

    A sample keeps its place, its key and all its files but the .json. Each worker needs at most about `memory_mb`, whatever the
    size of either side: the number of partitions follows from it. `scratch` holds the wanted captions once or twice meanwhile.

    Returns:
        `config.out`. An interrupted join goes on; a finished one of the same inputs and settings is left as it is.

    Raises:
        InputError: if an input is missing or damaged as a whole, a column is missing, fewer than `min_match_rate` of
            the samples find a caption (said before anything is written), or `out` holds something else.
    """
    shards, files = _find(config.shards, ".tar"), _find(config.captions, ".parquet")
    _refuse_twins(shards, config.shards)
    rows, row_bytes = _measure(files, config)
    settings = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_THE_RESULT}
    inputs = {"shards": _fingerprint(shards), "captions": _fingerprint(files)}
    work = _work_folder(config)
    if is_finished(config.out, "join", settings, inputs):
        shutil.rmtree(work, ignore_errors=True)  # a kill may have come between the manifest and this
        print(f"{config.out} already holds this join")
        return config.out
    partitions = _partitions(shards, rows, row_bytes, config.memory_mb)
    _open_work(work, config.out, {"settings": settings, "inputs": inputs, "partitions": partitions})
    join = _Join(config, shards, files, work, partitions, row_bytes)
    try:
        matched = _match_all(join)
        _stop_if_too_few(matched, config)
        written = _write_all(join)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(
            f"the disk of {work} or {config.out} is full; make room and run the same command to go on"
        ) from None
    report = _report(written, matched, rows)
    write_json(config.out / REPORT, report)
    write_manifest(config.out, "join", settings, inputs, report)
    shutil.rmtree(work)
    print(_summary(report, config))
    return config.out


# --- inputs ---------------------------------------------------------------------------------------------------------


def _find(pattern: str, suffix: str) -> list[Path]:
    if is_remote(pattern):
        raise InputError(f"{pattern}: a join reads its input several times; copy it to a disk of yours first")
    return [Path(file.path) for file in find_files(pattern, [suffix])]


def _refuse_twins(shards: list[Path], pattern: str) -> None:
    twice = [name for name, count in Counter(path.name for path in shards).items() if count > 1]
    if twice:
        raise InputError(f"{pattern}: several shards are named {twice[0]}; join each folder in a run of its own")


def _measure(files: list[Path], config: JoinConfig) -> tuple[int, float]:
    """Number of rows of all files, and bytes of a row's key and caption on average; from the files' footers."""
    rows = size = 0
    for path in files:
        with _parquet(path) as file:
            names = file.schema_arrow.names
            for column in (config.on, config.caption_column):
                if column not in names:
                    raise InputError(f"{path}: no column {column!r}; its columns are {', '.join(names)}")
            wanted = {config.on, config.caption_column}
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                columns = [group.column(i) for i in range(group.num_columns)]
                size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema in wanted)
            rows += file.metadata.num_rows
    return rows, size / max(rows, 1)


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=2**20)  # read in pieces: a row group may be larger than the memory
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file, or damaged ({error}); fetch it again") from None


def _partitions(shards: list[Path], rows: int, row_bytes: float, memory_mb: int) -> int:
    """So many that what matching one partition needs fits into `memory_mb`.

    At most all rows are kept, and hardly more than there are samples, each of which, a picture and a .json, takes 2 KiB of a
    tar or more. Matching needs the captions of a partition, copies of those that match, and 100 bytes of keys and sorting
    for either side.
    """
    samples = sum(path.stat().st_size for path in shards) // 2048
    kept = min(rows, 2 * samples)
    need = kept * (2 * row_bytes + 100) + samples * 100
    partitions = max(1, math.ceil(need / (memory_mb * 2**20)))
    if partitions > MAX_PARTITIONS:
        least = math.ceil(need / MAX_PARTITIONS / 2**20)
        raise InputError(f"memory_mb={memory_mb} is too little for {kept} captions; give each worker at least {least}")
    return partitions


def _fingerprint(paths: list[Path]) -> str:
    """Hash of names, sizes and times: enough to notice other files, without reading terabytes."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _work_folder(config: JoinConfig) -> Path:
    """In `out`, or in a scratch folder that other joins may use too."""
    if config.scratch is None:
        return config.out / WORK
    return config.scratch / f"{WORK}-{hashlib.sha256(os.fsencode(config.out.resolve())).hexdigest()[:12]}"


def _open_work(work: Path, out: Path, job: dict[str, Any]) -> None:
    """The folder of intermediate files: as an interrupted join of the same inputs left it, or new."""
    if (work / "job.json").exists():
        difference = first_difference(read_json(work / "job.json"), job)
        if difference is not None:
            raise InputError(f"{work}: holds an unfinished join of other inputs or settings ({difference}); finish that one, "
                             "or delete this folder")  # fmt: skip
        return
    if out.exists() and (not out.is_dir() or any(path.name != WORK for path in out.iterdir())):
        raise InputError(f"{out}: is there already and holds something else; choose another folder")
    write_json(work / "job.json", job)


# --- the first three steps ------------------------------------------------------------------------------------------


def _match_all(join: _Join) -> dict[str, int]:
    """Everything up to one file of matches per partition, in `work/match`. Returns the counts."""
    scanned = _run_step(join, "scan", _scan_group, len(join.groups()), "group")
    _write_wanted_bits(join, scanned["samples"])
    captions = _run_step(join, "captions", _partition_captions, len(join.files), "file")
    matched = _run_step(join, "match", _match_partition, join.partitions, "partition")
    shutil.rmtree(join.work / "captions", ignore_errors=True)
    return scanned | captions | matched


def _run_step(join: _Join, name: str, task: Any, count: int, unit: str) -> dict[str, int]:
    """Do the tasks 0 … count - 1 that have no file yet; the sum of the counts that each file carries."""
    done = join.work / f"{name}.json"
    if done.exists():
        return dict(read_json(done))
    folder = join.work / name
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a kill
        leftover.unlink()
    paths = [folder / f"{number:06d}.arrow" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    results = ordered_map(join.config.workers, task, join, missing)
    for _ in tqdm(results, desc=name, total=count, initial=count - len(missing), unit=unit, mininterval=0.5):
        pass
    counts: Counter[str] = Counter()
    for path in paths:
        counts.update(_counts(path))
    write_json(done, dict(counts))
    return dict(counts)


def _scan_group(join: _Join, number: int) -> None:
    """The join keys of a group of shards, by partition."""
    hashes, shards, places = [], [], []
    samples = 0
    for shard in join.groups()[number]:
        for place, sample in enumerate(_descriptions(join.shards[shard])):
            samples += 1
            key, _ = _join_key(sample, join.config.on)
            if key is not None:
                hashes.append(_hash(key))
                shards.append(shard)
                places.append(place)
    batch = pa.record_batch(
        [pa.array(hashes, pa.binary(16)), pa.array(shards, pa.int32()), pa.array(places, pa.int32())], schema=KEYS
    )
    counts = {"samples": samples, "keys": len(hashes)}
    _write_buckets(join.work / "scan" / f"{number:06d}.arrow", KEYS, [(batch, _partition_of(_hashes(batch), join.partitions))],
                   join.partitions, counts)  # fmt: skip


def _write_wanted_bits(join: _Join, samples: int) -> None:
    """A bit map in which the bit of every wanted key is set: 256 to 512 bits a sample, at most 2^31 (256 MiB) in all.

    It lets through all wanted captions and, of the others, 0.4 % at most; with more samples more, 2 % at 50 million: then there
    is little that is not wanted. So the captions of a few shards take little room, however many captions there are.
    """
    path = join.work / BITS
    if path.exists() or (join.work / "captions.json").exists():
        return
    bits = np.zeros(2 ** min(max(samples * 256, 2**10).bit_length(), 31) // 8, np.uint8)
    for number in range(len(join.groups())):
        for batch in _read(join.work / "scan" / f"{number:06d}.arrow"):
            place = _bit(_hashes(batch), len(bits) * 8)
            np.bitwise_or.at(bits, place >> 3, np.left_shift(1, place & 7).astype(np.uint8))
    temporary = path.with_suffix(".tmp")
    bits.tofile(temporary)
    os.replace(temporary, path)


def _partition_captions(join: _Join, number: int) -> None:
    """The wanted captions of a parquet file, by partition; a sixteenth of the memory's worth at a time."""
    config, path = join.config, join.files[number]
    wanted = np.memmap(join.work / BITS, np.uint8, "r")
    counts = Counter(rows=0, without_key=0, kept=0)
    # Of a chunk there are several copies at a time: read, filtered, joined, sorted, and those that Arrow keeps for later.
    limit = config.memory_mb * 2**20 // 16
    batch_rows = int(min(max(limit / 4 / max(join.row_bytes, 1), 16), 4096))

    def chunks() -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        pending: list[pa.RecordBatch] = []
        size = 0
        with _parquet(path) as file:
            for batch in _batches(file, batch_rows, [config.on, config.caption_column]):
                keys = _normal(_bytes_of(batch.column(config.on)).to_pylist(), config.on)
                counts.update(rows=len(keys), without_key=sum(not key for key in keys))
                hashes = np.frombuffer(b"".join(_hash(key) for key in keys), "S16")
                place = _bit(hashes, len(wanted) * 8)
                keep = (wanted[place >> 3] >> (place & 7).astype(np.uint8) & 1).astype(bool)
                keep &= np.array([bool(key) for key in keys])
                if not keep.any():
                    continue
                captions = _bytes_of(batch.column(config.caption_column).filter(pa.array(keep)))
                pending.append(pa.record_batch([_hash_column(hashes[keep]), captions], schema=CAPTIONS))
                counts["kept"] += len(captions)
                size += pending[-1].nbytes
                if size > limit:
                    yield _joined(pending, join.partitions)
                    pending, size = [], 0
        if pending:
            yield _joined(pending, join.partitions)

    try:
        _write_buckets(join.work / "captions" / f"{number:06d}.arrow", CAPTIONS, chunks(), join.partitions, counts)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the disk; what pyarrow says of a file's content has no number
            raise
        raise InputError(f"{path}: damaged ({error}); fetch it again and run the same command to go on") from None


def _batches(file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # A row group at a time: one reader for all of them keeps what it has read until its end.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, [group], columns, use_threads=False)


def _joined(batches: list[pa.RecordBatch], partitions: int) -> tuple[pa.RecordBatch, np.ndarray]:
    batch = pa.concat_batches(batches)
    return batch, _partition_of(_hashes(batch), partitions)


def _match_partition(join: _Join, partition: int) -> None:
    """For each wanted key of a partition that some caption has: what became of it, by group of shards."""
    scans = [join.work / "scan" / f"{number:06d}.arrow" for number in range(len(join.groups()))]
    spills = [join.work / "captions" / f"{number:06d}.arrow" for number in range(len(join.files))]
    wanted = _table(scans, partition, join.partitions, KEYS)
    table = _table(spills, partition, join.partitions, CAPTIONS)
    captions = table.column("caption")
    unique, row, outcome = _one_row_per_key(_hashes(table), captions, join.config.differing)

    wanted_hashes = _hashes(wanted)
    at = np.searchsorted(unique, wanted_hashes)
    found = np.zeros(len(at), bool) if not len(unique) else unique[np.minimum(at, len(unique) - 1)] == wanted_hashes
    at = at[found]
    matches = pa.record_batch(
        [
            pa.array(wanted.column("shard").to_numpy()[found]),
            pa.array(wanted.column("place").to_numpy()[found]),
            pa.array(outcome[at]),
            captions.take(pa.array(row[at], mask=outcome[at] != MATCHED)).combine_chunks(),
        ],
        schema=MATCHES,
    )
    counts = {"matched": int((outcome[at] == MATCHED).sum())}
    buckets = matches.column("shard").to_numpy() // GROUP
    _write_buckets(join.work / "match" / f"{partition:06d}.arrow", MATCHES, [(matches, buckets)], len(scans), counts)


def _one_row_per_key(
    hashes: np.ndarray, captions: pa.ChunkedArray, differing: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct hashes, sorted; for each the row of its caption and the outcome. An empty caption yields to any other."""
    order = np.argsort(hashes, kind="stable")  # rows of one key stay in file order
    ordered = hashes[order]
    start = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(ordered) else np.zeros(0, np.int64)
    row = order[start].astype(np.int64)
    length = pc.binary_length(captions).to_numpy()
    outcome = np.where(length[row] == 0, EMPTY, MATCHED).astype(np.int8) if len(row) else np.zeros(0, np.int8)
    stop = np.append(start[1:], len(ordered))
    for i in np.flatnonzero(stop - start > 1):
        rows = [int(r) for r in order[start[i] : stop[i]] if length[r]]
        if not rows:
            continue
        texts = {captions[r].as_py() for r in rows}
        row[i], outcome[i] = rows[0], DIFFER if len(texts) > 1 and differing == "none" else MATCHED
    return ordered[start], row, outcome


def _stop_if_too_few(counts: dict[str, int], config: JoinConfig) -> None:
    samples, keys, matched = counts["samples"], counts["keys"], counts["matched"]
    if not samples:
        raise InputError(f"{config.shards}: no sample can be read from the shards")
    if matched < config.min_match_rate * samples:
        raise InputError(
            f"only {matched} of {samples} samples find a caption by on={config.on} ({keys} have that field, and the captions "
            f"have it in {counts['rows'] - counts['without_key']} of {counts['rows']} rows); nothing was written. Try another "
            f"`on`, or set min_match_rate below {config.min_match_rate} if so few are right"
        )


# --- writing --------------------------------------------------------------------------------------------------------


def _write_all(join: _Join) -> list[dict[str, Any]]:
    """The shards with captions. Returns a row per shard, as in `shards.jsonl`."""
    folder = join.work / "written"
    folder.mkdir(parents=True, exist_ok=True)
    join.config.out.mkdir(parents=True, exist_ok=True)
    for leftover in join.config.out.glob(".*.tmp"):
        leftover.unlink()
    missing = [group for group in join.groups() if any(not (folder / f"{n:06d}.json").exists() for n in group)]
    with tqdm(desc="write", total=len(join.shards), unit="shard", mininterval=0.5) as progress:
        progress.update(len(join.shards) - sum(map(len, missing)))
        for group, _ in zip(missing, ordered_map(join.config.workers, _write_group, join, missing), strict=True):
            progress.update(len(group))
    rows = [read_json(folder / f"{number:06d}.json") for number in range(len(join.shards))]
    lines = [json.dumps({k: v for k, v in row.items() if k != "examples"}, ensure_ascii=False) for row in rows]
    write_bytes(join.config.out / PER_SHARD, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    return rows


def _write_group(join: _Join, group: range) -> None:
    number = group[0] // GROUP
    spills = [join.work / "match" / f"{partition:06d}.arrow" for partition in range(join.partitions)]
    table = _table(spills, number, len(join.groups()), MATCHES)
    shard_of = table.column("shard").to_numpy()
    for shard in group:
        done = join.work / "written" / f"{shard:06d}.json"
        if done.exists():
            continue
        mine = table.take(pa.array(np.flatnonzero(shard_of == shard)))
        found = {
            place: (outcome, caption)
            for place, outcome, caption in zip(
                *(mine.column(name).to_pylist() for name in MATCHES.names[1:]), strict=True
            )
        }
        write_json(done, _write_shard(join.shards[shard], found, join.config))


def _write_shard(path: Path, found: dict[int, tuple[int, bytes]], config: JoinConfig) -> dict[str, Any]:
    """One shard with captions, atomically. Returns its row of `shards.jsonl`, and examples by cause."""
    unmatched: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    written = 0
    temporary = config.out / f".{path.name}.{os.getpid()}.tmp"
    source = Tar(path, path.name)
    with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for place in range(len(source)):
            sample = source[place]
            cause = _add_caption(sample, found.get(place), config)
            if cause:
                unmatched[cause] += 1
                if len(examples.setdefault(cause, [])) < EXAMPLES:
                    examples[cause].append(sample["__key__"])
            if not cause or config.keep_unmatched:
                written += 1
                add_sample(tar, sample)
    source.close()
    if written:
        os.replace(temporary, config.out / path.name)
        # As img2dataset has it: training takes the number from here and need not count.
        write_json(config.out / f"{path.stem}_stats.json", {"count": len(source), "successes": written})
    else:
        temporary.unlink()
    row: dict[str, Any] = {"shard": path.name, "samples": len(source), "written": written}
    row |= {"matched": len(source) - sum(unmatched.values()), "unmatched": dict(sorted(unmatched.items()))}
    return row | {"fault": list(source.fault) if source.fault else None, "examples": examples}


def _add_caption(sample: dict[str, Any], found: tuple[int, bytes] | None, config: JoinConfig) -> str | None:
    """Put the caption into the sample's .json, in place; or say why there is none."""
    key, cause = _join_key(sample, config.on)
    if key is None:
        return cause
    if found is None:
        return "no caption for it"
    outcome, caption = found
    if outcome != MATCHED:
        return CAUSES[outcome]
    try:
        text = caption.decode()
    except UnicodeDecodeError:
        return "the caption is not UTF-8"
    description = json.loads(sample["json"]) if "json" in sample else {}
    if config.verify_pictures and not _is_the_picture(sample, description.get("sha256")):
        return "the picture has another sha256"
    description[config.field] = text
    # As ASCII: a .json may hold lone surrogates, which no UTF-8 can.
    sample["json"] = json.dumps(description).encode()
    return None


def _is_the_picture(sample: dict[str, Any], sha256: Any) -> bool:
    pictures = [sample[extension] for extension in PICTURES if extension in sample]
    return any(hashlib.sha256(picture).hexdigest() == str(sha256).strip().lower() for picture in pictures)


# --- keys and hashes ------------------------------------------------------------------------------------------------


def _descriptions(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard with their .json alone: the pictures are not read. A fault is said when the shard is written."""
    with open(path, "rb") as file:
        index = scan_tar(lambda offset, size: os.pread(file.fileno(), size, offset), os.fstat(file.fileno()).st_size)
        json_number = index.extensions.index("json") if "json" in index.extensions else -1
        for i, key in enumerate(index.keys):
            sample: dict[str, Any] = {"__key__": key}
            for entry in range(index.first[i], index.first[i + 1]):
                if index.extension[entry] == json_number:
                    sample["json"] = os.pread(file.fileno(), int(index.size[entry]), int(index.offset[entry]))
            yield sample


def _join_key(sample: dict[str, Any], on: str) -> tuple[bytes | None, str | None]:
    """The join key as bytes, or why there is none. For `key`, the name in the tar stands in for a missing field."""
    value = None
    if "json" in sample:
        try:
            description = json.loads(sample["json"])
        except (ValueError, RecursionError):
            return None, "the .json is not JSON"
        if not isinstance(description, dict):
            return None, "the .json is not an object"
        value = description.get(on)
    elif on != "key":
        return None, "no .json file"
    if on == "key" and value is None:
        value = sample["__key__"].rpartition("/")[2]
    key = _normal([None if value is None else str(value).encode(errors="surrogatepass")], on)[0]
    return (key, None) if key else (None, f"no {on} in the .json")


def _normal(keys: Sequence[bytes | None], on: str) -> list[bytes]:
    """Keys without white space around, hex digests in lower case; a missing one becomes b""."""
    return [(key or b"").strip().lower() if on == "sha256" else (key or b"").strip() for key in keys]


def _hash(key: bytes) -> bytes:
    # 128 bits: among 10^10 keys two share their hash with a probability of 10^-19.
    return hashlib.blake2b(key, digest_size=16).digest()


def _hashes(table: pa.RecordBatch | pa.Table) -> np.ndarray:
    """The column `hash` as S16 [n]. NumPy ignores trailing zero bytes, which for a fixed width is still exact."""
    chunks = table.column("hash")
    chunks = chunks.chunks if isinstance(chunks, pa.ChunkedArray) else [chunks]
    views = [
        np.frombuffer(c.buffers()[1], "S16", len(c), c.offset * 16) if len(c) else np.zeros(0, "S16") for c in chunks
    ]
    return np.concatenate(views) if views else np.zeros(0, "S16")


def _hash_column(hashes: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(hashes.tobytes())])


def _words(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view("<u8").reshape(-1, 2)


def _bit(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Which bit of the bit map stands for each hash; `bits` is a power of two."""
    return (_words(hashes)[:, 0] & np.uint64(bits - 1)).astype(np.int64)


def _partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    return (_words(hashes)[:, 1] % np.uint64(partitions)).astype(np.int64)


def _bytes_of(column: pa.Array) -> pa.Array:
    """A column of text (or of numbers) as bytes, without white space around; a missing value becomes b""."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        # Bytes that are not UTF-8 are found, and said, when the caption is written.
        column = pc.cast(column, options=pc.CastOptions(pa.large_string(), allow_invalid_utf8=True))
    return pc.cast(pc.ascii_trim_whitespace(column.fill_null("")), pa.large_binary())


# --- files of record batches, by bucket -----------------------------------------------------------------------------


def _write_buckets(
    path: Path,
    schema: pa.Schema,
    chunks: Iterable[tuple[pa.RecordBatch, np.ndarray]],
    buckets: int,
    counts: dict[str, int],
) -> None:
    """Write chunks of rows so that each bucket's rows can be read alone: a batch per bucket, chunk after chunk.

    Args:
        chunks: rows, and the bucket of each row: int [rows]. The rows of a bucket keep their order.
        counts: kept beside the rows, for `_counts`; read after the last chunk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        for rows, bucket in chunks:
            order = np.argsort(bucket, kind="stable")
            edges = np.searchsorted(bucket[order], np.arange(buckets + 1))
            ordered = rows.take(pa.array(order))
            for start, stop in itertools.pairwise(edges.tolist()):
                writer.write_batch(ordered.slice(start, stop - start))
    write_json(path.with_suffix(".json"), dict(counts))
    os.replace(temporary, path)


def _counts(path: Path) -> dict[str, int]:
    return dict(read_json(path.with_suffix(".json")))


def _read(path: Path) -> list[pa.RecordBatch]:
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _table(paths: list[Path], bucket: int, buckets: int, schema: pa.Schema) -> pa.Table:
    """The rows of one bucket from all files, in the files' order."""
    batches = []
    for path in paths:
        with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
            found = [reader.get_batch(i) for i in range(bucket, reader.num_record_batches, buckets)]
        batches += [batch for batch in found if batch.num_rows]
    return pa.Table.from_batches(batches, schema)


# --- what was done --------------------------------------------------------------------------------------------------


def _report(rows: list[dict[str, Any]], counts: dict[str, int], caption_rows: int) -> dict[str, Any]:
    total = {name: sum(row[name] for row in rows) for name in ("samples", "matched", "written")}
    unmatched: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        unmatched.update(row["unmatched"])
        for cause, keys in row["examples"].items():
            named = examples.setdefault(cause, [])
            named += [{"shard": row["shard"], "key": key} for key in keys[: EXAMPLES - len(named)]]
    return {
        "shards": len(rows),
        **total,
        "match_rate": total["matched"] / max(total["samples"], 1),
        "unmatched": dict(unmatched.most_common()),
        "examples": examples,
        "damaged_shards": [
            {"shard": row["shard"], "cause": row["fault"][0], "detail": row["fault"][1]} for row in rows if row["fault"]
        ],
        "captions": {"rows": caption_rows, "without_key": counts["without_key"]},
    }


def _summary(report: dict[str, Any], config: JoinConfig) -> str:
    samples = max(report["samples"], 1)
    lines = [
        f"{config.out}: {report['written']} samples in {report['shards']} shards",
        f"  {report['matched']:>12} {report['match_rate']:7.2%}  have a caption in json.{config.field}",
    ]
    fate = "kept without" if config.keep_unmatched else "left out"
    for cause, count in report["unmatched"].items():
        example = report["examples"][cause][0]
        lines.append(
            f"  {count:>12} {count / samples:7.2%}  {fate}: {cause} ({example['shard']}, key {example['key']!r})"
        )
    lines += [f"  {row['shard']}: {row['cause']}, {row['detail']}" for row in report["damaged_shards"][:10]]
    if len(report["damaged_shards"]) > 10:
        lines.append(f"  … and {len(report['damaged_shards']) - 10} more damaged shards, see {REPORT}")
    return "\n".join(lines)
