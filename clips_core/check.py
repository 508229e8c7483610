"""Training data looked through before a run: what training would skip and why, what the captions and pictures are like, and which
training pictures are copies of evaluation pictures.

It reads with training's own readers, so that what it counts is what training will do. A task is a chunk (a tar, a row group,
1,000 lines of a listing) and leaves one file, atomically: a kill costs the chunks that are under way, and any number of workers
gives the same report.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.captions import split_caption
from clips_core.config import FORBID, DataConfig, Names, SourceConfig, to_dict
from clips_core.data import read_caption, read_image
from clips_core.errors import BadSample, InputError
from clips_core.folders import (
    first_difference,
    is_finished,
    read_json,
    read_manifest,
    replacing,
    sha256_file,
    write_bytes,
    write_json,
    write_manifest,
)
from clips_core.phash import NearHashes, perceptual_hash
from clips_core.processes import ordered_map
from clips_core.repair import Finding, repair_lines
from clips_core.sources import Sources
from clips_core.tokenizer import BERT_VOCAB, ClipsTokenizer

REPORT, REPAIR, WORK = "report.json", "repair.jsonl", ".check"
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SAME_BYTES, SAME_LOOK, SAME_KEY = (
    "copy of an evaluation picture",
    "looks like an evaluation picture",
    "key occurs twice",
)
FRAME = 3  # tokens of a text beside its body: bos, eos, CLS


@dataclass(config=FORBID)
class CheckConfig:
    """What to look through."""

    data: DataConfig  # as for pretraining: train, the names of pictures and captions, vocab, max_bad_share
    out: Path  # folder for report.json and repair.jsonl
    evaluation: Names = dataclasses.field(default_factory=list)  # shards, parquet or listings of evaluation pictures
    hash_distance: int = Field(default=4, ge=0, le=15)  # bits of 63 in which two pictures' hashes may differ
    context_length: int = Field(default=80, ge=4)  # tokens of the text encoder, bos, eos and CLS included
    learnable_tokens: int = Field(
        default=128, ge=2
    )  # of the caption decoder: the longest caption that it learns to write
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)  # processes; the result is the same for any


class _Pictures(NamedTuple):
    """What is known of a chunk's, or all, evaluation pictures."""

    names: list[str]  # "shard:key"
    digests: list[str]  # SHA-256 of the files
    hashes: list[int | None]  # None: blank


class _Task(NamedTuple):
    """What every task needs to know."""

    config: CheckConfig
    sources: Sources
    folder: Path  # for the tasks' files
    evaluation: Path | None  # the evaluation pictures


def check_data(config: CheckConfig) -> Path:
    """Write `report.json`, `repair.jsonl` (see `clips_core.repair`) and the manifest, and print a summary.

    Returns:
        `config.out`. An interrupted check goes on; a finished one of the same data and settings is not made again.

    Raises:
        InputError: if a file is missing or of no known kind, `out` holds something else, or, when all is written, if more than
            `data.max_bad_share` of the samples cannot be used.
    """
    # Beyond these shares the loader refuses to start; here is where one learns about it.
    data = dataclasses.replace(config.data, max_bad_share=1.0)
    work = config.out / WORK
    ours = {REPORT, REPAIR, "manifest.json"}  # beside hidden ones
    if config.out.exists() and not (
        config.out.is_dir() and all(p.name in ours or p.name[0] == "." for p in config.out.iterdir())
    ):
        raise InputError(f"{config.out}: is there already and holds something else; choose another folder")
    training = Sources(data, work / "training.jsonl")
    evaluation = None
    if config.evaluation:
        # Captions are not read here, and there may be none: a classification set has labels.
        paths = [SourceConfig(path=config.evaluation, weight=1.0)]
        evaluation = Sources(dataclasses.replace(data, train=paths, web_caption=data.image), work / "evaluation.jsonl")
    settings = _settings(config)
    inputs = {"training": _fingerprint(training), "evaluation": _fingerprint(evaluation) if evaluation else ""}
    if is_finished(config.out, "check", settings, inputs):
        report = read_manifest(config.out)["outputs"]
    else:
        _open_work(work, {"settings": settings, "inputs": inputs})
        known = None
        if evaluation is not None:
            rows = _run(_Task(config, evaluation, work / "evaluation", None), _look_at_evaluation)
            known = work / "evaluation.json"
            write_bytes(known, json.dumps(_all_pictures(rows)._asdict()).encode())
        rows = _run(_Task(config, training, work / "training", known), _look_through)
        report = _report(rows, training, known, config)
        write_json(config.out / REPORT, report)
        write_manifest(config.out, "check", settings, inputs, report)
    shutil.rmtree(work, ignore_errors=True)
    print(_summary(report, config))
    _stop_if_too_many_bad(report, config)
    return config.out


def _settings(config: CheckConfig) -> dict[str, Any]:
    """What the report depends on, beside the files."""
    data = to_dict(config.data)
    vocab = sha256_file(config.data.vocab or BERT_VOCAB)
    names = {key: data[key] for key in ("image", "web_caption", "synthetic_caption")}
    lengths = {"context_length": config.context_length, "learnable_tokens": config.learnable_tokens}
    return {**names, "vocab": vocab, **lengths, "hash_distance": config.hash_distance}


def _fingerprint(sources: Sources) -> str:
    """Hash of all names, sizes and times: enough to notice other files, without reading terabytes."""
    digest = hashlib.sha256()
    for source in sources.sources:
        for file in source.files:
            digest.update(json.dumps(file).encode() + b"\n")
    return digest.hexdigest()


def _open_work(work: Path, job: dict[str, Any]) -> None:
    """The folder of intermediate files: as an interrupted check of the same data left it, or new."""
    if (work / "job.json").exists() and first_difference(read_json(work / "job.json"), job) is None:
        return
    for name in ("training", "evaluation"):  # the numbers of samples beside them hold for any settings
        shutil.rmtree(work / name, ignore_errors=True)
    write_json(work / "job.json", job)


def _run(task: _Task, function: Any) -> Iterator[dict[str, Any]]:
    """Look through all chunks that have no file yet; then what each file says, in order."""
    chunks = [(s, c) for s, source in enumerate(task.sources.sources) for c in range(len(source.counts))]
    paths = [task.folder / f"{source:03d}-{chunk:08d}.json" for source, chunk in chunks]
    task.folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(task.folder))
    missing = [item for item in zip(chunks, paths, strict=True) if item[1].name not in there]
    results = ordered_map(task.config.workers, _do, (function, task), missing)
    done = len(chunks) - len(missing)
    for _ in tqdm(results, task.folder.name, total=len(chunks), initial=done, unit="chunk", mininterval=0.5):
        pass
    return (read_json(path) for path in paths)


def _do(what: tuple[Any, _Task], item: tuple[tuple[int, int], Path]) -> None:
    function, task = what
    chunk, path = item
    write_bytes(path, json.dumps(function(task, *chunk)).encode())  # as ASCII: a key need not be UTF-8


# --- one chunk ------------------------------------------------------------------------------------------------------


def _look_through(task: _Task, source: int, chunk: int) -> dict[str, Any]:
    """Everything that the report needs of one chunk of training data."""
    config, data = task.config, task.config.data
    tokenizer = _tokenizer(data.vocab or BERT_VOCAB)
    findings: list[Finding] = []
    keys: Counter[str] = Counter()
    count, synthetic_captions, good, blank = 0, 0, 0, 0
    tokens: dict[str, Counter[int]] = {"web": Counter(), "synthetic": Counter(), "sub-caption": Counter()}
    sides: dict[str, Counter[int]] = {"shortest": Counter(), "longest": Counter()}
    pictures = _Pictures([], [], [])
    for key, sample in _samples(task.sources, source, chunk, findings):
        count += 1
        if isinstance(sample, dict):
            keys[key] += 1
            sample = _parts(sample, data)
        if isinstance(sample, BadSample):
            findings.append(Finding(task.sources.path(source, chunk), key, sample.cause, str(sample), "leave out"))
            continue
        good += 1
        web, synthetic, image, encoded = sample
        synthetic_captions += bool(synthetic)
        tokens["web"][len(tokenizer.body(web))] += 1
        if synthetic:
            tokens["synthetic"][len(tokenizer.body(synthetic))] += 1
            tokens["sub-caption"].update(len(tokenizer.body(piece)) for piece in split_caption(synthetic))
        sides["shortest"][min(image.size)] += 1
        sides["longest"][max(image.size)] += 1
        if task.evaluation is not None:
            pictures.names.append(key)
            pictures.digests.append(hashlib.sha256(encoded).hexdigest())
            pictures.hashes.append(perceptual_hash(image))
            blank += pictures.hashes[-1] is None
    name = task.sources.path(source, chunk)
    twice = [Finding(name, k, SAME_KEY, f"{n} samples have it", "rename") for k, n in keys.items() if n > 1]
    copies = _copies(pictures, task.evaluation, name, config.hash_distance) if task.evaluation is not None else []
    return {
        "samples": count,
        "good": good,
        "synthetic_captions": synthetic_captions,
        "blank": blank,
        "tokens": tokens,
        "sides": sides,
        "findings": findings + twice + [finding for finding, _ in copies],
        "copied": sorted({number for _, number in copies}),
    }


def _samples(
    sources: Sources, source: int, chunk: int, findings: list[Finding]
) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Key and content of each sample that was counted in a chunk, or why it has none; a file's fault is added to `findings`."""
    path, count = sources.path(source, chunk), int(sources.sources[source].counts[chunk])
    try:
        reader = sources.open(source, chunk)
    except InputError as error:  # it is gone, or holds another number of samples than was counted
        findings.append(Finding(path, "", "other content than counted", str(error), "replace the file"))
        yield from ((f"sample {i}", BadSample("other content than counted", str(error))) for i in range(count))
        return
    try:
        if reader.fault is not None:
            findings.append(Finding(path, "", *reader.fault, "replace the file"))
        for index in range(count):
            if index >= len(reader):
                assert reader.fault is not None  # or it would not have been opened
                yield f"sample {index}", BadSample(*reader.fault)
                continue
            try:
                sample = reader[index]
            except BadSample as error:
                yield f"sample {index}", error
            else:
                yield str(sample["__key__"]), sample
    finally:
        reader.close()
        sources.drop(source, chunk)


def _parts(sample: dict[str, Any], data: DataConfig) -> Any:
    """Web caption, synthetic caption or "", picture, and the picture's bytes; or the fault that training would find first."""
    try:
        web = read_caption(sample, data.web_caption)
        synthetic = read_caption(sample, data.synthetic_caption, optional=True)
        return web, synthetic, read_image(sample, data.image), _encoded(sample, data)
    except BadSample as error:
        return error


def _encoded(sample: dict[str, Any], data: DataConfig) -> bytes:
    return next(sample[name] for name in data.image if isinstance(sample.get(name), bytes))


@functools.cache
def _tokenizer(vocab: Path) -> ClipsTokenizer:
    return ClipsTokenizer(vocab)


# --- copies of evaluation pictures ----------------------------------------------------------------------------------


def _look_at_evaluation(task: _Task, source: int, chunk: int) -> dict[str, Any]:
    pictures = _Pictures([], [], [])
    for key, sample in _samples(task.sources, source, chunk, []):
        if isinstance(sample, BadSample):
            continue  # it is not evaluated either
        try:
            image = read_image(sample, task.config.data.image)
        except BadSample:
            continue
        pictures.names.append(f"{task.sources.path(source, chunk)}:{key}")
        pictures.digests.append(hashlib.sha256(_encoded(sample, task.config.data)).hexdigest())
        pictures.hashes.append(perceptual_hash(image))
    return pictures._asdict()


def _all_pictures(rows: Iterable[dict[str, Any]]) -> _Pictures:
    everything = _Pictures([], [], [])
    for row in rows:
        everything.names.extend(row["names"])
        everything.digests.extend(row["digests"])
        everything.hashes.extend(row["hashes"])
    return everything


class _Known(NamedTuple):
    """The evaluation pictures, made ready for the search."""

    names: list[str]
    by_digest: dict[str, int]
    near: NearHashes
    number: np.ndarray  # int64: which picture each stored hash belongs to; blank ones have none


@functools.cache
def _known(path: Path, distance: int) -> _Known:
    """Read once by each worker."""
    pictures = _Pictures(**read_json(path))
    number = np.array([i for i, value in enumerate(pictures.hashes) if value is not None], np.int64)
    hashes = np.array([value for value in pictures.hashes if value is not None], np.uint64)
    by_digest = {digest: i for i, digest in reversed(list(enumerate(pictures.digests)))}  # of equal ones the first
    return _Known(pictures.names, by_digest, NearHashes(hashes, distance), number)


def _copies(pictures: _Pictures, evaluation: Path, shard: str, distance: int) -> list[tuple[Finding, int]]:
    """A finding for each training picture that an evaluation picture equals or looks like, and the number of that one."""
    known = _known(evaluation, distance)
    hashes = np.array([value if value is not None else 0 for value in pictures.hashes], np.uint64)
    nearest, apart = known.near.nearest(hashes)
    found = []
    for i, (key, digest) in enumerate(zip(pictures.names, pictures.digests, strict=True)):
        if digest in known.by_digest:
            number, cause, detail = known.by_digest[digest], SAME_BYTES, ""
        elif pictures.hashes[i] is not None and nearest[i] >= 0:
            number, cause = int(known.number[nearest[i]]), SAME_LOOK
            detail = f", {apart[i]} of 63 bits differ"
        else:
            continue
        found.append((Finding(shard, key, cause, known.names[number] + detail, "leave out"), number))
    return found


# --- the report -----------------------------------------------------------------------------------------------------


def _report(
    rows: Iterable[dict[str, Any]], sources: Sources, evaluation: Path | None, config: CheckConfig
) -> dict[str, Any]:
    """The sums over all chunks; writes the repair list on the way."""
    total: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    other: Counter[str] = Counter()
    tokens = {name: Counter[int]() for name in ("web", "synthetic", "sub-caption")}
    sides = {name: Counter[int]() for name in ("shortest", "longest")}
    copied: set[int] = set()
    faulty: set[str] = set()

    def findings() -> Iterator[Finding]:
        for row in rows:
            total.update({name: row[name] for name in ("samples", "good", "synthetic_captions", "blank")})
            for collected, more in ((tokens, row["tokens"]), (sides, row["sides"])):
                for name, counts in more.items():
                    collected[name].update({int(value): count for value, count in counts.items()})
            copied.update(row["copied"])
            lost = row["samples"] - row["good"]
            for finding in (Finding(*values) for values in row["findings"]):
                if finding.repair == "replace the file":
                    faulty.add(finding.shard)
                is_fault = finding.key and finding.cause not in (SAME_BYTES, SAME_LOOK, SAME_KEY)
                (skipped if is_fault else other)[finding.cause] += 1
                lost -= bool(is_fault)
                yield finding
            assert lost == 0
        for fault in sources.faults:  # of files without a chunk, since nothing in them can be read
            if fault.shard not in faulty:
                faulty.add(fault.shard)
                other[fault.cause] += 1
                yield Finding(fault.shard, "", fault.cause, fault.detail, "replace the file")

    with replacing(config.out / REPAIR) as file:
        file.writelines(repair_lines(findings()))
    files = sum(len(source.files) for source in sources.sources)
    report: dict[str, Any] = {
        "files": files,
        "faulty_files": len(faulty),
        "samples": total["samples"],
        "usable": total["good"],
        "skipped": dict(sorted(skipped.items())),
        "bad_share": (total["samples"] - total["good"]) / max(total["samples"], 1),
        "other_findings": dict(sorted(other.items())),
        "synthetic_captions": total["synthetic_captions"],
        "synthetic_share": total["synthetic_captions"] / max(total["good"], 1),
        "tokens": {
            "web": _lengths(tokens["web"], config.context_length - FRAME),
            "synthetic": _lengths(tokens["synthetic"], config.learnable_tokens - 1),
            "sub-caption": _lengths(tokens["sub-caption"], config.context_length - FRAME),
        },
        "pixels": {name: _distribution(counts) for name, counts in sides.items()},
        "evaluation": None,
    }
    if evaluation is not None:
        known = _Pictures(**read_json(evaluation))
        report["evaluation"] = {
            "pictures": len(known.names),
            "copied_into_training": len(copied),
            "blank": sum(value is None for value in known.hashes),
            "training_blank": total["blank"],
        }
    return report


def _lengths(counts: Counter[int], room: int) -> dict[str, Any]:
    """How long captions are in tokens, and how many are cut because they have more than `room`."""
    cut = sum(count for length, count in counts.items() if length > room)
    return {**_distribution(counts), "room": room, "cut": cut, "cut_share": cut / max(counts.total(), 1)}


def _distribution(counts: Counter[int]) -> dict[str, Any]:
    """Number, mean, least, quantiles (nearest rank) and most of values that are counted."""
    if not counts:
        return {"n": 0}
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    n = int(ends[-1])
    quantiles = {f"p{q * 100:g}": int(values[np.searchsorted(ends, max(1, int(np.ceil(q * n))))]) for q in QUANTILES}
    mean = sum(value * count for value, count in counts.items()) / n
    return {"n": n, "mean": round(mean, 2), "min": int(values[0]), **quantiles, "max": int(values[-1])}


def _stop_if_too_many_bad(report: dict[str, Any], config: CheckConfig) -> None:
    limit = config.data.max_bad_share
    for share, what, bad, of in (
        (report["bad_share"], "samples", report["samples"] - report["usable"], report["samples"]),
        (report["faulty_files"] / report["files"], "files", report["faulty_files"], report["files"]),
    ):
        if share > limit:
            raise InputError(
                f"{bad} of {of} {what} cannot be used as they are, more than data.max_bad_share={limit} allows; "
                f"{config.out / REPAIR} names each and what to do"
            )


def _summary(report: dict[str, Any], config: CheckConfig) -> str:
    samples = report["samples"]
    lines = [f"{config.out}: {report['usable']} of {samples} samples in {report['files']} files can be used"]
    lines += [f"  {n:>12} {n / max(samples, 1):7.2%}  {cause}" for cause, n in report["skipped"].items()]
    lines += [f"  {n:>12}          {cause}" for cause, n in report["other_findings"].items()]
    lines.append(f"  {report['synthetic_captions']:>12} {report['synthetic_share']:7.2%}  have a synthetic caption")
    names = ("web caption", "synthetic caption", "sub-caption")
    for name, length in zip(names, report["tokens"].values(), strict=True):
        if length["n"]:
            lines.append(
                f"  tokens of a {name}: {length['p50']} in the median, 95 % at most {length['p95']}, longest "
                f"{length['max']}; {length['cut_share']:.2%} are cut at {length['room']}"
            )
    shortest = report["pixels"]["shortest"]
    if shortest["n"]:
        lines.append(f"  shortest side: {shortest['p50']} pixels in the median, 5 % at most {shortest['p5']}")
    found = report["evaluation"]
    if found is not None:
        lines.append(
            f"  {found['copied_into_training']} of {found['pictures']} evaluation pictures have a copy in the training data; "
            f"{found['blank']} of them, and {found['training_blank']} training pictures, are too blank to be compared by look"
        )
    return "\n".join(lines)
