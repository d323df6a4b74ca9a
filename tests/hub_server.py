"""A Hub on this machine: the part of the protocol of huggingface.co that huggingface_hub uses for models.

Repositories are kept in memory, each commit as a dict of files. Files that match `LFS` are uploaded and downloaded
through the routes of large files, redirects included. Clients are pointed here with `HF_ENDPOINT`. Requests are
logged, and faults are ordered, under `/_test`, so that a client in another process can ask for both.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
LFS = (".safetensors", ".bin", ".pt")
TOKEN = "hf_" + "TestTokenOfNobody" * 2  # the one that may write


@dataclass
class Repository:
    """The commits of a repository, and the branches and tags that point to them."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, branch: str, files: Files) -> str:
        """A new commit at the end of a branch."""
        count = str(len(self.commits)).encode()
        oid = hashlib.sha1(count + b"".join(hashlib.sha1(data).digest() for data in files.values())).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        oid = self.refs.get(revision, revision)
        return oid if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server; its repositories and its log are read by tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}  # by sha256
        self.log: list[dict[str, Any]] = []
        self.faults: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every file of every commit, by repository and path."""
        for name, repository in self.repositories.items():
            for commit in repository.commits.values():
                yield from ((f"{name}/{path}", data) for path, data in commit.items())

    def fault(self, method: str, path: str) -> str | None:
        """The fault that was ordered for a request, once: "503" or "break"."""
        with self.lock:
            for number, fault in enumerate(self.faults):
                if fault["method"] == method and re.search(fault["path"], path):
                    return self.faults.pop(number)["kind"]
        return None


@contextmanager
def hub() -> Iterator[Hub]:
    """A server in a thread."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal; `Hub.log` has the requests."""

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # as http.server names them

    def handle_request(self) -> None:
        self.body = self.read_body()
        self.path, self.query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.broken = False
        if self.path.startswith("/_test"):
            return self.control()
        kind = self.server.fault(self.command, self.path)
        if kind == "503":
            return self.answer(b"busy", status=503)
        self.broken = kind == "break"
        try:
            self.route()
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.answer(b"{}", {key: value for key, value in headers.items() if value}, refusal.status)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        """Send an answer, or half of it, and log it."""
        entry = {"method": self.command, "path": self.path, "status": status, "range": self.headers.get("Range")}
        self.server.log.append(entry)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.broken else data)
        if self.broken:
            self.close_connection = True

    def send(self, value: Any) -> None:
        self.answer(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def control(self) -> None:
        """What tests ask of the server: the log since the last time, a fault, a repository that is gated."""
        if self.path == "/_test/log":
            found, self.server.log[:] = list(self.server.log), []
            data = json.dumps(found).encode()
        else:
            order = json.loads(self.body)
            if self.path == "/_test/fault":
                self.server.faults.append(order)
            else:
                self.server.repositories[order["repository"]].gated = True
            data = b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    # Routes

    def route(self) -> None:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                return getattr(self, method)(**found.groupdict())
        raise RefusalError(404, message=f"no such route: {self.command} {self.path}")

    def may_write(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, message="Invalid credentials in Authorization header")

    def find(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None:
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        return repository

    def at(self, name: str, revision: str) -> tuple[str, Files]:
        """The files of a revision."""
        repository = self.find(name)
        oid = repository.resolve(revision)
        if oid is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def whoami(self) -> None:
        self.may_write()
        self.send({"type": "user", "name": "me", "orgs": [], "auth": {}})

    def validate(self) -> None:
        self.send({"errors": [], "warnings": []})

    def create(self) -> None:
        self.may_write()
        given = json.loads(self.body)
        name = f"{given.get('organization') or 'me'}/{given['name']}"
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            self.server.repositories[name] = Repository()
            self.server.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        url = f"{self.server.endpoint}/{name}"
        self.answer(json.dumps({"url": url, "name": name}).encode(), status=status)

    def preupload(self, name: str, revision: str) -> None:
        self.may_write()
        self.at(name, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.send({"files": files})

    def batch(self, name: str) -> None:
        self.may_write()
        self.find(name)
        objects = [{"oid": found["oid"], "size": found["size"]} for found in json.loads(self.body)["objects"]]
        for found in objects:
            if found["oid"] not in self.server.large:
                found["actions"] = {"upload": {"href": f"{self.server.endpoint}/_large/{found['oid']}"}}
        self.send({"transfer": "basic", "objects": objects})

    def put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, message="the content is another")
        self.server.large[oid] = self.body
        self.answer(b"")

    def commit(self, name: str, revision: str) -> None:
        self.may_write()
        files = dict(self.at(name, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.find(name).commit(revision, files)
        self.send({"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, name: str, revision: str) -> None:
        self.may_write()
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        refs = self.find(name).refs
        status = 409 if revision in refs else 200
        refs.setdefault(revision, self.at(name, start)[0])
        self.answer(b"{}", status=status)

    def tag(self, name: str, revision: str) -> None:
        self.may_write()
        self.find(name).refs[json.loads(self.body)["tag"]] = self.at(name, revision)[0]
        self.answer(b"{}")

    def info(self, name: str, revision: str | None = None) -> None:
        oid, files = self.at(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        gated = "auto" if self.find(name).gated else False
        self.send({"id": name, "sha": oid, "private": False, "gated": gated, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        _, files = self.at(name, revision)
        self.may_read(name)
        found = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not found:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in found.items()
        ]
        self.send(entries)

    def may_read(self, name: str) -> None:
        if self.find(name).gated:
            raise RefusalError(403, "GatedRepo", f"Access to model {name} is restricted")

    def resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self.at(name, revision)
        self.may_read(name)
        if path not in files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        data, headers = files[path], {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if not path.endswith(LFS):
            self.send_part(data, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            return
        sha = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha}"'}
        place = {"Location": f"http://localhost:{self.server.server_port}/_large/{sha}"}  # another host, as on the Hub
        self.answer(b"", headers | linked | place, status=302)

    def get_large(self, oid: str) -> None:
        self.send_part(self.server.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_part(self, data: bytes, headers: dict[str, str]) -> None:
        """The whole of a file, or the range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        span = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        self.answer(data[start:], headers | span, status=206 if asked else 200)


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+(?:/pr/\d+)?)"
ROUTES = (
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/validate-yaml", "validate"),
    ("POST /api/repos/create", "create"),
    (f"POST /api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    (f"POST /{_NAME}\\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /_large/(?P<oid>\w+)", "put_large"),
    (f"POST /api/models/{_NAME}/commit/{_REVISION}", "commit"),
    (f"POST /api/models/{_NAME}/branch/{_REVISION}", "branch"),
    (f"POST /api/models/{_NAME}/tag/{_REVISION}", "tag"),
    (f"GET /api/models/{_NAME}/tree/{_REVISION}(?:/(?P<folder>.+))?", "tree"),
    (f"GET /api/models/{_NAME}/revision/{_REVISION}", "info"),
    (f"GET /api/models/{_NAME}", "info"),
    (f"(?:GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    (r"(?:GET|HEAD) /_large/(?P<oid>\w+)", "get_large"),
)
