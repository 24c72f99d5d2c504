"""A Hub on this machine's loopback, as far as the Hugging Face clients use one: real HTTP, files, LFS, revisions.

Standard library only. It keeps everything in memory, knows three tokens, and can be told to fail: `hub.faults` holds
what the next matching requests get instead of an answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write to everything of `USER`, one may only read; every other one is refused."""

USER = "somebody"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repository:
    """Branches -> commits -> files; a file is its bytes."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch or commit."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


@dataclass
class Fault:
    """What a request gets instead of its answer: `status`, or with None half its body read and the line cut."""

    method: str
    path: str
    status: int | None
    times: int = 1


class LoopbackHub(ThreadingHTTPServer):
    """The server; `with LoopbackHub() as hub:` runs it in a thread.

    Attributes:
        repositories: id -> repository.
        objects: LFS objects by sha256, uploaded or committed.
        faults: what goes wrong next.
        requests: `(method, path)` of everything that was asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.repositories[repo].at(revision)[1]

    def asked(self, method: str, pattern: str) -> int:
        """How many requests there were of a kind."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


def lfs_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        fault = self._fault(path)
        if fault is not None and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self._body()
        try:
            if fault is not None:
                raise Refused(fault.status or 500, "out of order")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    self._authorise(write=method in ("POST", "PUT", "DELETE"))
                    answer(self, body, **match.groupdict())
                    return
            raise Refused(404, f"no route {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _authorise(self, write: bool) -> None:
        """As the Hub: an unknown token is refused even for reading; writing needs one that may."""
        if "/objects/" in self.path:
            return  # its address is the secret, as with the Hub's own store
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER, ""):
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and token != WRITER and "validate-yaml" not in self.path:
            raise Refused(403, "You don't have the required permissions") if token else Refused(401, "Log in first")

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _repository(self, repo: str) -> Repository:
        if repo not in self.server.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[repo]

    # -- routes -------------------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not repo.startswith(f"{USER}/"):
            raise Refused(403, f"You don't have the rights to create a model under the namespace of {repo}")
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repositories:
            return self._json({"url": url, "error": "You already created this model repo"}, 409)
        self.server.repositories[repo] = made = Repository()
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json({"url": url, "id": repo, "name": repo})

    def create_branch(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self._send(200)

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repository(repo).at(revision)[1]
        answers = []
        for asked in json.loads(body)["files"]:
            path, content = asked["path"], files.get(asked["path"])
            oid = None if content is None else (lfs_oid(content) if is_lfs(path) else git_oid(content))
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._repository(repo)
        answers = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.objects:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/objects/{asked['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def put_object(self, body: bytes, oid: str) -> None:
        if lfs_oid(body) != oid:
            raise Refused(400, "The object is not what its name says")
        self.server.objects[oid] = body
        self._send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files, message = dict(repository.at(revision)[1]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, files, message)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        oid, files = self._repository(repo).at(revision)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": repo, "modelId": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        self._json([_entry(path, content) for path, content in self._repository(repo).at(revision)[1].items()])

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self._repository(repo).at(revision)[1]
        paths = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", body.decode())
        self._json([_entry(path, files[path]) for path in map(unquote, paths) if path in files])

    def refs(self, body: bytes, repo: str) -> None:
        branches = self._repository(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self._json({"branches": listed, "tags": [], "converts": []})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        oid, files = self._repository(repo).at(revision)
        if path not in files:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{lfs_oid(content)}"', "X-Linked-Size": str(len(content))}
        start = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        if start and int(start[1]):
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[int(start[1]) :], headers)
        self._send(200, content, headers)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": lfs_oid(content), "size": len(content), "pointerSize": 134}
    return entry


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
# Methods (one that only reads is not "POST"), path, answer.
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/{_REVISION}", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", _Handler.put_object),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
    ("POST GET", rf"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("HEAD GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
)
