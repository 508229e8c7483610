"""The few endpoints of the Hugging Face hub that an upload needs, on this machine: repositories are folders in memory."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from web_server import JsonHandler, serving

TOKEN = "hf_test"


@dataclass
class Hub:
    """What was uploaded, and what was asked for."""

    repositories: dict[str, bool] = field(default_factory=dict)  # name → whether it is private
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files by hash, before their commit
    commits: list[str] = field(default_factory=list)
    address: str = ""


class _Refused(Exception):
    """An HTTP status to answer with."""


class _Handler(JsonHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(lambda: self._get(self.path.partition("?")[0]))

    def do_POST(self) -> None:
        body = self._body()
        self._answer(lambda: self._post(self.path.partition("?")[0], body))

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self.answer({})

    def _get(self, path: str) -> dict[str, Any]:
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name not in self.hub.repositories:
            raise _Refused(404)
        files = [{"rfilename": file} for file in self.hub.files[name]]
        return {"id": name, "private": self.hub.repositories[name], "sha": "0" * 40, "siblings": files, "tags": []}

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise _Refused(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            return {"objects": [self._batch(wanted) for wanted in json.loads(body)["objects"]]}
        if path == "/verify":
            wanted = json.loads(body)
            assert hashlib.sha256(self.hub.blobs[wanted["oid"]]).hexdigest() == wanted["oid"]
            return {}
        name, action = path.removeprefix("/api/models/").rsplit("/", 2)[:2]
        if action == "preupload":
            return {"files": [_mode(file) for file in json.loads(body)["files"]]}
        assert action == "commit", path
        return self._commit(name, body)

    def _create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "not-ours":
            raise _Refused(403)
        if name in self.hub.repositories:
            raise _Refused(409, f"{self.hub.address}/{name}")
        self.hub.repositories[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.files[name] = {}
        return {"url": f"{self.hub.address}/{name}", "id": name, "name": name}

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.address}/blobs/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.hub.address}/verify"}}}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line["key"]
                self.hub.files[name][value["path"]] = self.hub.blobs[value["oid"]]
        return {"commitUrl": f"{self.hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def _answer(self, work: Any) -> None:
        try:
            self.answer(work())
        except _Refused as refused:
            status, address = (*refused.args, "")[:2]
            self.answer({"error": "refused", "url": address}, status)  # url: of a repository that is there already

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub with no repository yet; its address is for HF_ENDPOINT."""
    hub = Hub()
    with serving(type("Handler", (_Handler,), {"hub": hub})) as hub.address:
        yield hub
