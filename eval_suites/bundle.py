"""A comparison as one archive: all that its figures were computed from, without weights, and the command to compute them again."""

import gzip
import hashlib
import importlib.metadata
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from clips_core.folders import replacing
from eval_suites.records import PICTURES, Entry

REPORT = ("report.html", "report.json", "report.csv", "report.tex", "categories.csv")
# Of each stage's folder: what `read_run` and `fairness` read.
STAGE_FILES = (
    "manifest.json",
    "metrics.jsonl",
    "zero_shot.json",
    "results.json",
    "model/config.json",
    "model/processor_config.json",
)

README = """\
A comparison of {towers}, made by clips-llava {version}.

towers/         per-sample answers, settings, hashes and logs of every training
report.*        the comparison as it was published: page, JSON, CSV, LaTeX
categories.csv  wins and losses by category
sha256.txt      of every file (sha256sum -c sha256.txt)

All figures again, without a GPU, weights or benchmark files (pip install clips-llava=={version}):

    clips-llava compare {folders} --out recomputed{waived}{reference}
"""


def write_bundle(
    path: Path, entries: Sequence[Entry], report: Path, waived: Sequence[str] = (), reference: Path | None = None
) -> None:
    """Write `path`, a .tar.gz that holds everything `compare` reads of `entries`, and the `report` folder's files.

    The same comparison gives the same bytes.
    """
    names = list(dict.fromkeys(entry.name for entry in entries))
    files = dict(_files(entries))
    files |= {name: (report / name).read_bytes() for name in REPORT}
    if reference is not None:
        files["reference/reference.json"] = (reference / "reference.json").read_bytes()
    files["README.txt"] = README.format(
        towers=", ".join(names),
        version=importlib.metadata.version("clips-llava"),
        folders=" ".join(f"towers/{name}" for name in names),
        waived=f" --waive {' '.join(waived)}" if waived else "",
        reference=" --reference reference" if reference is not None else "",
    ).encode()
    files["sha256.txt"] = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{path.name.partition('.')[0]}/{name}")
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))


def _files(entries: Sequence[Entry]) -> Iterator[tuple[str, bytes]]:
    """Name in the archive and content of every file, one training after another."""
    several = len({entry.seed for entry in entries}) > 1
    for entry in entries:
        root = f"towers/{entry.name}" + (f"/seed{entry.seed}" if several else "")
        places = {
            "align": entry.align,
            "tune": entry.tune,
            **{f"eval/{name}": getattr(entry, name) for name in PICTURES},
        }
        for place, folder in {**places, "tower": entry.tower}.items():
            if folder is None:
                continue
            shared = place == "tower" and {e.tower for e in entries if e.name == entry.name} == {folder}
            target = f"towers/{entry.name}/tower" if shared else f"{root}/{place}"
            own = {folder / name for name in STAGE_FILES} | (
                set(folder.glob("*.jsonl")) if place.startswith("eval/") else set()
            )
            for file in sorted(own):
                if file.is_file() and not file.name.startswith("answers-"):
                    yield f"{target}/{os.path.relpath(file, folder)}", file.read_bytes()
