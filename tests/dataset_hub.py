"""The few endpoints of the Hugging Face hub that fetching a data set needs, on this machine: repositories are folders on disk."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from web_server import JsonHandler, serving

COMMIT = "a" * 40


@dataclass
class DatasetHub:
    """What it offers, what it refuses, and what was asked for."""

    root: Path
    commit: str = COMMIT  # the newest of every repository
    refused: set[str] = field(default_factory=set)  # files that are not handed out
    cut: set[str] = field(default_factory=set)  # files that end halfway, once
    sent: list[tuple[str, str, int]] = field(default_factory=list)  # revision, repository/path, first byte
    address: str = ""


class _Handler(JsonHandler):
    hub: DatasetHub

    def do_HEAD(self) -> None:
        self._file(head=True)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)/?", path):
            self.answer([_entry(self.hub.root / found[1], file) for file in _files(self.hub.root / found[1])])
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            if not (self.hub.root / found[1]).is_dir():
                self.answer({"error": "no such repository"}, 404)
                return
            info = {"id": found[1], "sha": found[2] or self.hub.commit, "private": False, "siblings": [], "tags": []}
            self.answer(info)
        else:
            self._file(head=False)

    def _file(self, head: bool) -> None:
        found = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path.partition("?")[0])
        assert found is not None, self.path
        name = f"{found[1]}/{found[3]}"
        if name in self.hub.refused:
            self.answer({"error": "refused"}, 403)
            return
        file = self.hub.root / name
        content = file.read_bytes()
        entry = _entry(self.hub.root / found[1], file)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{entry.get("lfs", {}).get("oid", entry["oid"])}"')
        self.send_header("X-Repo-Commit", found[2])
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if head:
            return
        self.hub.sent.append((found[2], name, start))
        if name in self.hub.cut:
            self.hub.cut.remove(name)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])


def _files(repository: Path) -> list[Path]:
    return sorted(path for path in repository.rglob("*") if path.is_file())


def _entry(repository: Path, file: Path) -> dict[str, Any]:
    """A file as the hub lists it: large ones have a SHA-256 too."""
    content = file.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {
        "type": "file",
        "path": file.relative_to(repository).as_posix(),
        "size": len(content),
        "oid": oid,
    }
    if file.suffix == ".parquet":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serve_datasets(root: Path) -> Iterator[DatasetHub]:
    """A hub of the data sets `root/ORG/NAME`."""
    hub = DatasetHub(root)
    with serving(type("Handler", (_Handler,), {"hub": hub})) as hub.address:
        yield hub
