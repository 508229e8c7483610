"""A comparison as one archive: all that its figures were computed from, without weights, and the command to compute them again."""

import gzip
import hashlib
import importlib.metadata
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from clips_core.folders import replacing
from eval_suites.kept import training_files
from eval_suites.records import Entry

REPORT = ("report.html", "report.json", "report.csv", "report.tex", "categories.csv")
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
        shared = {other.tower for other in entries if other.name == entry.name} == {entry.tower}
        for name, file in training_files(entry):
            seed = f"/seed{entry.seed}" if several and not (shared and name.startswith("tower/")) else ""
            yield f"towers/{entry.name}{seed}/{name}", file.read_bytes()
