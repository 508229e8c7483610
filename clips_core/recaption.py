"""Synthetic captions for your own pictures: shards → the same shards with `json.re_caption`.

A vision-language model writes them, in this process or behind an endpoint (`clips_core.captioners`). Each caption goes
into its shard's journal as soon as it is there; when all of a shard's samples are settled the new tar is written, and its
statistics last, so that whatever ends the run, captions are lost only if they were still being written. Any number of processes
can share one output folder: each takes every n-th shard, and a lock per shard keeps two from doing the same one.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import ImageOps
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.build import resized
from clips_core.captioners import (
    Captioner,
    DType,
    Endpoint,
    LocalModel,
    Outcome,
    Request,
    check_endpoint,
    model_folder,
    read_key,
)
from clips_core.captions import split_caption
from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.files import find_files, is_remote
from clips_core.folders import (
    MANIFEST,
    MetricsLog,
    claimed,
    first_difference,
    read_json,
    read_manifest,
    replacing,
    sha256_file,
    write_bytes,
    write_json,
    write_manifest,
)
from clips_core.images import open_image
from clips_core.shards import Tar, add_sample

PROMPT = (
    "Describe this picture in detail, in one paragraph of several plain sentences: what it shows, the objects with their "
    "colours, number and places, people and what they do, any text that can be read, and the background. Begin with what "
    "matters most. No list, no heading, and nothing that cannot be seen."
)
SETTINGS = "recaption.json"  # what the captions in a folder depend on: all its processes and reruns must agree
# Everything else may change from run to run without changing what a caption would be.
NOT_IN_THE_RESULT = (
    "shards", "out", "endpoint", "api_key_env", "part", "batch_size", "concurrency", "timeout", "retries", "retry_wait",
    "max_bad_share",
)  # fmt: skip


@dataclass(config=FORBID)
class RecaptionConfig:
    """Which shards, who captions them, and how."""

    shards: Path | str  # folder, file, glob or brace pattern (data/{00000..01023}.tar): shards in img2dataset's layout
    out: Path  # folder for the shards with captions; several processes may share it
    model: str | None = None  # local: a folder in HF layout, the folder of our stage 1 or 2, or a hub name
    endpoint: str | None = None  # or a server's address up to /v1; pictures are sent there
    endpoint_model: str | None = None  # the name that the server knows its model by
    api_key_env: str | None = None  # name of the environment variable that holds the server's key
    prompt: str = PROMPT  # {caption} stands for the web caption
    web_caption: str = "txt"  # extension, or json.FIELD: what {caption} stands for
    image: list[str] = dataclasses.field(
        default_factory=lambda: ["jpg", "jpeg", "png", "webp"]
    )  # extensions of the picture
    field: str = Field(
        default="re_caption", min_length=1
    )  # of the sample's json; a sample that has it is left as it is
    max_new_tokens: int = Field(default=256, ge=1)  # longest caption; a longer one is trimmed to whole sentences
    temperature: float = Field(default=0.0, ge=0)  # 0: greedy; else drawn from a seed per sample
    seed: int = 0
    max_side: int = Field(default=768, ge=28)  # pixels: a picture's longest side is brought down to this
    part: str | None = None  # i/n: only shards i, i + n, …; None: RANK/WORLD_SIZE as torchrun sets them, else 0/1
    dtype: DType = "auto"  # local: of the weights; auto: bfloat16 on a GPU, float32 on a CPU
    batch_size: int = Field(default=16, ge=1)  # local: pictures at once
    concurrency: int = Field(default=32, ge=1)  # endpoint: requests at once
    timeout: float = Field(default=300.0, gt=0)  # endpoint: seconds for one answer
    retries: int = Field(default=5, ge=0)  # endpoint: further tries after an error that may pass
    retry_wait: float = Field(default=1.0, gt=0)  # endpoint: seconds before the second try; doubles up to 60
    extra: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # endpoint: more keys of the request's JSON; null removes one
    max_bad_share: float = Field(default=0.1, ge=0, le=1)  # more samples without a caption than this share stop the run

    def __post_init__(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give model=FOLDER_OR_NAME or endpoint=URL, one of them")
        if self.endpoint is not None:
            check_endpoint(self.endpoint)
            if not self.endpoint_model:
                raise ValueError("endpoint_model: is required with an endpoint (its /v1/models lists the names)")
        elif self.endpoint_model or self.api_key_env or self.extra:
            raise ValueError("endpoint_model, api_key_env and extra belong to an endpoint; a local model has none")
        if self.part is not None:
            parse_part(self.part)


def recaption(config: RecaptionConfig) -> Path:
    """Write `out/NAME.tar` for every shard `NAME.tar` of this process's part, and the manifest once all parts are done.

    Beside it stands `NAME.stats.json` (counts) and, where samples have no caption or were left out, `NAME.without.jsonl`
    (each with its cause). While a shard is under way there is `NAME.captions.jsonl`, its captions so far.

    Returns:
        `config.out`. A rerun goes on where the last one stopped, and takes shards that have come since.

    Raises:
        InputError: if there are no shards, two share a name, `out` is their folder or holds captions by another model or
            prompt, the captioner cannot be had, or more than `max_bad_share` of the samples end without a caption.
    """
    paths = _find(config)
    part, parts = (0, 1) if config.part is None else parse_part(config.part)
    if config.part is None and "RANK" in os.environ:
        part, parts = parse_part(f"{os.environ['RANK']}/{os.environ.get('WORLD_SIZE', '')}")
    weights = _weights(config)
    _agree_on_settings(config, weights)
    run = _Run(config, [path for i, path in enumerate(paths) if i % parts == part])
    if run.todo:
        print(_announcement(config, run, part, parts), flush=True)
        captioner = _captioner(config)
        with run:
            for task, outcome in captioner.captions(run.tasks()):
                run.settle(task.shard, task.number, outcome)
    finished = [read_json(_beside(config, path, "stats.json")) for path in paths if is_done(config, path)]
    totals = add_up(finished)
    print(_summary(config, totals, len(paths), run), flush=True)
    if len(finished) == len(paths):
        _finish(config, paths, weights, totals)
    if run.damaged:
        raise InputError(
            f"{len(run.damaged)} shards hold no whole sample: {'; '.join(run.damaged[:5])}; fetch them again"
        )
    return config.out


def parse_part(text: str) -> tuple[int, int]:
    """`"3/8"` → (3, 8)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"part {text!r}: write it as i/n with i from 0 to n − 1, for example 0/8")
    return int(match[1]), int(match[2])


# --- the folder -----------------------------------------------------------------------------------------------------


def _find(config: RecaptionConfig) -> list[Path]:
    found = [file.path for file in find_files(str(config.shards), [".tar"])]
    if remote := [path for path in found if is_remote(path)]:
        raise InputError(f"{remote[0]}: captions are written for shards on this machine; copy or mount them")
    paths = [Path(path) for path in found]
    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(path.name, path)) != path:
            raise InputError(f"{other} and {path} have the same name: give each folder's shards an out of their own")
    if any(path.parent.resolve() == config.out.resolve() for path in paths):
        raise InputError(f"{config.out}: is the folder of the shards themselves; choose another out")
    return paths


def _beside(config: RecaptionConfig, path: Path, suffix: str) -> Path:
    return config.out / f"{path.name.removesuffix('.tar')}.{suffix}"


def is_done(config: RecaptionConfig, path: Path) -> bool:
    """Whether a shard's statistics, which are written last, are there.

    Raises:
        InputError: if the shard is not the one that they speak of.
    """
    stats = _beside(config, path, "stats.json")
    if not stats.exists():
        return False
    _check_size(path, read_json(stats)["bytes"], stats)
    return True


def _check_size(path: Path, expected: int, where: Path) -> None:
    size = path.stat().st_size
    if size != expected:
        raise InputError(
            f"{path}: has {size} bytes, but {where} was begun when it had {expected}; delete that file to caption it anew"
        )


def _weights(config: RecaptionConfig) -> str:
    """A hash of a local folder's weights; what names the model otherwise."""
    if config.model is None:
        return f"endpoint model {config.endpoint_model}"
    folder = model_folder(config.model)
    if folder is None:
        return f"hub model {config.model}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _agree_on_settings(config: RecaptionConfig, weights: str) -> None:
    """Write down what the captions depend on, or compare with what another process or an earlier run has written."""
    settings = {name: value for name, value in to_dict(config).items() if name not in NOT_IN_THE_RESULT}
    settings["weights"] = weights
    settings.pop("model")  # a folder may move; the weights tell
    target = config.out / SETTINGS
    if not target.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in config.out.iterdir() if not path.name.startswith(f".{SETTINGS}.")]
        if others and not target.exists():  # it may have come from another process just now
            raise InputError(f"{config.out}: is there already and holds {others[0]}; choose another folder")
        with tempfile.TemporaryDirectory(prefix=f".{SETTINGS}.", dir=config.out) as temporary:
            write_json(Path(temporary) / SETTINGS, settings)
            with contextlib.suppress(
                FileExistsError
            ):  # unlike a rename, a link leaves what a faster process has written
                os.link(Path(temporary) / SETTINGS, target)
    difference = first_difference(read_json(target), json.loads(json.dumps(settings)))
    if difference is not None:
        raise InputError(
            f"{config.out} holds captions made otherwise ({difference}); choose another folder or delete it"
        )


def _finish(config: RecaptionConfig, paths: list[Path], weights: str, totals: dict[str, Any]) -> None:
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    inputs = {"shards": hashlib.sha256(listing.encode()).hexdigest(), "model": weights}
    manifest = config.out / MANIFEST
    if not manifest.exists() or read_manifest(config.out).get("inputs") != inputs:
        write_manifest(config.out, "recaption", config, inputs, totals)


# --- one shard ------------------------------------------------------------------------------------------------------


class _Shard:
    """A shard under way: its journal, and what has become of its samples.

    Samples go by their number in the tar: a key may occur twice.
    """

    def __init__(self, config: RecaptionConfig, path: Path, tar: Tar):
        self.config, self.path, self.tar = config, path, tar
        self.journal = MetricsLog(_beside(config, path, "captions.jsonl"))
        self.journal.cut_after(0)  # rows have no step: this drops only a last line that a kill cut off
        rows = self.journal.rows()
        size = path.stat().st_size
        if rows:
            _check_size(path, rows[0]["bytes"], self.journal.path)
        else:
            self.journal.log(shard=path.name, bytes=size, samples=len(tar))
        self.bytes = size
        self.outcomes = {row.pop("number"): _from_row(row) for row in rows[1:]}

    @property
    def whole(self) -> bool:
        return len(self.outcomes) == len(self.tar)

    def settle(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        self.journal.log(number=number, key=self.tar.keys[number], **_to_row(outcome))

    def write(self) -> None:
        """The new tar, the list of samples without a caption, the statistics; then the journal has served."""
        _write_tar(_beside(self.config, self.path, "tar"), self._samples())
        without = [
            {"key": self.tar.keys[number], **_to_row(outcome)}
            for number, outcome in sorted(self.outcomes.items())
            if outcome.kind in ("uncaptioned", "skipped")
        ]
        if without:
            lines = "".join(json.dumps(row) + "\n" for row in without)
            write_bytes(_beside(self.config, self.path, "without.jsonl"), lines.encode())
        write_json(_beside(self.config, self.path, "stats.json"), self._stats())
        self.journal.path.unlink()
        self.tar.close()

    def _samples(self) -> Iterator[dict[str, Any]]:
        for number, outcome in sorted(self.outcomes.items()):
            if outcome.kind == "skipped":
                continue
            sample = self.tar[number]
            if outcome.kind == "captioned":
                description = read_description(sample) | {self.config.field: outcome.caption}
                sample["json"] = json.dumps(description, ensure_ascii=False).encode()
            yield sample

    def _stats(self) -> dict[str, Any]:
        outcomes = list(self.outcomes.values())
        captions = [outcome.caption for outcome in outcomes if outcome.kind == "captioned"]

        def causes(kind: str) -> dict[str, int]:
            return dict(Counter(outcome.cause for outcome in outcomes if outcome.kind == kind).most_common())

        return {
            "shard": self.path.name,
            "bytes": self.bytes,
            "damage": ": ".join(self.tar.fault or ()),
            "samples": len(outcomes),
            "captioned": len(captions),
            "kept": sum(outcome.kind == "kept" for outcome in outcomes),
            "uncaptioned": causes("uncaptioned"),
            "skipped": causes("skipped"),
            "asked_twice": dict(Counter(outcome.retried for outcome in outcomes if outcome.retried).most_common()),
            "trimmed": sum(outcome.trimmed for outcome in outcomes),
            "words": sum(len(caption.split()) for caption in captions),
            "sentences": dict(sorted(Counter(str(len(split_caption(caption))) for caption in captions).items())),
        }


def _to_row(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in outcome._asdict().items() if value}


def _from_row(row: dict[str, Any]) -> Outcome:
    return Outcome(**{name: value for name, value in row.items() if name in Outcome._fields})


def _write_tar(path: Path, samples: Iterator[dict[str, Any]]) -> None:
    """One sample in memory at a time; the tar is on the disk, whole, before it has its name."""
    with replacing(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:  # it has room for long keys
            for sample in samples:
                add_sample(tar, sample)
        file.flush()
        os.fsync(file.fileno())  # the journal is deleted next


def read_description(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample's .json, {} without one.

    Raises:
        ValueError: if it is not an object in UTF-8.
    """
    description = json.loads(sample.get("json", b"{}"))
    if not isinstance(description, dict):
        raise ValueError(f"not an object but a {type(description).__name__}")
    return description


class _Task:
    """One sample that has no caption yet."""

    def __init__(self, shard: _Shard, number: int):
        self.shard, self.number = shard, number

    @property
    def batch(self) -> tuple[Path, int]:
        """By number, so that a resumed run has the batches of one that was never stopped."""
        return self.shard.path, self.number // self.shard.config.batch_size

    def read(self) -> Request | Outcome:
        config, sample = self.shard.config, self.shard.tar[self.number]
        try:
            description = read_description(sample)
        except ValueError as error:
            return Outcome("skipped", cause="json cannot be read", detail=str(error)[:200])
        there = description.get(config.field)
        if isinstance(there, str) and there.strip():
            return Outcome("kept")
        data = next((sample[extension] for extension in config.image if extension in sample), None)
        if data is None:
            return Outcome("skipped", cause="no picture", detail=f"none of {', '.join(config.image)}")
        try:
            picture = ImageOps.exif_transpose(open_image(data, sample["__key__"], at_least=(config.max_side,) * 2))
        except InputError as error:
            return Outcome("skipped", cause=getattr(error, "cause", "not a readable picture"), detail=str(error)[:200])
        prompt = config.prompt
        if "{caption}" in prompt:
            extension, _, field = config.web_caption.partition(".")
            web = description.get(field) if field else sample.get(extension, b"").decode(errors="replace")
            if not isinstance(web, str) or not web.strip():
                return Outcome("skipped", cause="no web caption", detail=f"{config.web_caption} is missing or empty")
            prompt = prompt.replace("{caption}", " ".join(web.split()))
        picture = resized(picture, "longest", config.max_side)
        return Request(picture, prompt, sample_seed(config.seed, self.shard.path.name, self.number))


def sample_seed(seed: int, shard: str, number: int) -> int:
    """A sample's own seed, 0 ≤ seed < 2³¹ − 1 (what every server takes, and its successor)."""
    digest = hashlib.sha256(f"{seed} {shard} {number}".encode()).digest()
    return int.from_bytes(digest[:8]) % (2**31 - 1)


# --- this process's part --------------------------------------------------------------------------------------------


class _Run:
    """The shards of this process that are not done, opened one after another as the captioner asks for more."""

    def __init__(self, config: RecaptionConfig, paths: list[Path]):
        self.config = config
        done = [path for path in paths if is_done(config, path)]
        self.todo = [path for path in paths if path not in set(done)]
        totals = add_up([read_json(_beside(config, path, "stats.json")) for path in done])
        self.samples = totals["samples"]  # of all shards that were begun
        self.bad = sum(totals["uncaptioned"].values()) + sum(totals["skipped"].values())
        self.causes = Counter(totals["uncaptioned"]) + Counter(totals["skipped"])
        self.busy = 0  # shards that another process holds
        self.damaged: list[str] = []
        self.claims: dict[Path, contextlib.ExitStack] = {}
        self.all_bytes, self.begun_bytes, self.begun = sum(path.stat().st_size for path in self.todo), 0, 0
        self.first_caption = True
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.bar = tqdm(desc="recaption", unit="picture", mininterval=0.5, smoothing=0.05, disable=rank > 0)

    def __enter__(self) -> None:
        self.bar.unpause()  # the clock starts now, not when the model began to load

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for path in list(self.claims):
            self._unlock(path)

    def tasks(self) -> Iterator[_Task]:
        """All samples without an outcome, shard by shard."""
        for path in self.todo:
            if not self._lock(path):
                self.busy += 1
                continue
            if is_done(self.config, path):  # by another process, before the lock was ours
                self._unlock(path)
                continue
            tar = Tar(path, str(path))
            if tar.fault:
                tqdm.write(f"{path}: {': '.join(tar.fault)}; it has {len(tar)} whole samples before that")
            if not len(tar):
                self.damaged.append(str(path))
                self._unlock(path)
                continue
            shard = _Shard(self.config, path, tar)
            self._begin(shard)
            if shard.whole:  # killed between its last caption and its tar
                self._close(shard)
                continue
            yield from (_Task(shard, number) for number in range(len(tar)) if number not in shard.outcomes)

    def settle(self, shard: _Shard, number: int, outcome: Outcome) -> None:
        """Journal an outcome; write the shard if it was the last one.

        Raises:
            InputError: if too many samples have no caption.
        """
        shard.settle(number, outcome)
        self.bar.update()
        if outcome.kind == "captioned" and self.first_caption:
            self.first_caption = False
            tqdm.write(f"the first caption ({shard.tar.keys[number]}): {outcome.caption}")
        self._count(outcome)
        if self.bad > self.config.max_bad_share * self.samples:
            causes = ", ".join(f"{count} × {cause}" for cause, count in self.causes.most_common())
            raise InputError(
                f"{self.bad} of {self.samples} samples have no caption ({causes}), more than "
                f"max_bad_share={self.config.max_bad_share} allows; the last: {shard.path}, key {shard.tar.keys[number]!r}: "
                f"{outcome.cause}: {outcome.detail}. All are named in {self.config.out}/*.captions.jsonl and *.without.jsonl"
            )
        if shard.whole:
            self._close(shard)

    def _count(self, outcome: Outcome) -> None:
        if outcome.kind in ("uncaptioned", "skipped"):
            self.bad += 1
            self.causes[outcome.cause] += 1

    def _begin(self, shard: _Shard) -> None:
        for outcome in shard.outcomes.values():
            self._count(outcome)
        self.samples += len(shard.tar)
        # How many pictures the other shards hold is known when they are opened; until then, by their size.
        self.begun += len(shard.tar)
        self.begun_bytes += shard.bytes
        self.bar.total = round(self.begun * self.all_bytes / self.begun_bytes)
        self.bar.initial += len(shard.outcomes)  # for the rate, and with it the time left
        self.bar.update(len(shard.outcomes))

    def _close(self, shard: _Shard) -> None:
        shard.write()
        self._unlock(shard.path)

    def _lock(self, path: Path) -> bool:
        """Whether this shard is now ours."""
        with contextlib.ExitStack() as claim:
            if claim.enter_context(claimed(self.config.out, lock=f".{path.name}.lock")):
                self.claims[path] = claim.pop_all()
        return path in self.claims

    def _unlock(self, path: Path) -> None:
        (self.config.out / f".{path.name}.lock").unlink(missing_ok=True)
        self.claims.pop(path).close()


def _captioner(config: RecaptionConfig) -> Captioner:
    if config.model is not None:
        return LocalModel(config.model, config.max_new_tokens, config.temperature, config.dtype)
    assert config.endpoint is not None and config.endpoint_model is not None
    return Endpoint(
        config.endpoint, config.endpoint_model, config.max_new_tokens, read_key(config.api_key_env), config.temperature,
        config.concurrency, config.timeout, config.retries, config.retry_wait, config.extra,
    )  # fmt: skip


# --- what is said of it ---------------------------------------------------------------------------------------------


def add_up(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """The totals of some shards' statistics, with the mean words and the median sentences of the new captions."""
    totals: dict[str, Any] = {"shards": len(stats), "damaged_shards": sum(bool(each["damage"]) for each in stats)}
    for name in ("samples", "captioned", "kept", "trimmed"):
        totals[name] = sum(each[name] for each in stats)
    for name in ("uncaptioned", "skipped", "asked_twice"):
        totals[name] = dict(sum((Counter(each[name]) for each in stats), Counter[str]()).most_common())
    sentences = sum((Counter({int(n): m for n, m in each["sentences"].items()}) for each in stats), Counter[int]())
    totals["mean_words"] = round(sum(each["words"] for each in stats) / max(1, totals["captioned"]), 1)
    totals["median_sentences"] = _median(sentences)
    return totals


def _median(counts: Counter[int]) -> int:
    """The lower median of values given with their counts; 0 of none."""
    passed = 0
    for value in sorted(counts):
        passed += counts[value]
        if 2 * passed >= counts.total():
            return value
    return 0


def _announcement(config: RecaptionConfig, run: _Run, part: int, parts: int) -> str:
    which = f", part {part} of {parts}" if parts > 1 else ""
    who = f"by {config.model}, on this machine"
    if config.endpoint is not None:
        who = f"by {config.endpoint_model}; pictures are sent to {urlsplit(config.endpoint).netloc}"
    return f"{len(run.todo)} shards to caption{which}, {who}"


def _summary(config: RecaptionConfig, totals: dict[str, Any], shards: int, run: _Run) -> str:
    def listed(counts: dict[str, int]) -> str:
        return f" ({', '.join(f'{count} × {cause}' for cause, count in counts.items())})" if counts else ""

    lines = [
        f"{config.out}: {totals['captioned']} captions of {totals['mean_words']} words in the mean and "
        f"{totals['median_sentences']} sentences in the median",
        f"  {sum(totals['uncaptioned'].values())} samples without one{listed(totals['uncaptioned'])}, "
        f"{sum(totals['skipped'].values())} left out{listed(totals['skipped'])}, {totals['kept']} had one before",
        f"  {sum(totals['asked_twice'].values())} pictures were asked about twice{listed(totals['asked_twice'])}, "
        f"{totals['trimmed']} captions trimmed to whole sentences",
    ]
    if totals["captioned"] and totals["median_sentences"] < 2:
        lines.append(
            "warning: most captions are a single sentence, so there are no sub-captions to draw from: ask for several "
            "sentences (prompt), or allow more of them (max_new_tokens)"
        )
    if totals["damaged_shards"]:
        lines.append(f"  {totals['damaged_shards']} shards are damaged: their whole samples are there, the rest is not")
    if totals["shards"] < shards:
        held = f", {run.busy} of them in another process" if run.busy else ""
        lines.append(f"  {shards - totals['shards']} of {shards} shards are not done{held}")
    return "\n".join(lines)
