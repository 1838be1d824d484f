"""A hub on this machine for tests: a server that speaks the part of the Hugging Face hub's HTTP API that
huggingface_hub and datasets use.

Two servers listen: the hub itself, and the storage to which the hub sends the clients for large files (its
"CDN"), with another port. So tests see that keys do not go there. Repositories are in memory. Faults are put
in front of the next requests whose path matches: statuses, cut answers, slow answers.
"""

import base64
import dataclasses
import fnmatch
import gzip
import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# As the hub's .gitattributes: these are stored apart from git.
LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".gz", ".zst", ".model", ".arrow")
PAGE = 1000  # entries of a page of a listing, as on the hub
_TYPES = ("models", "datasets")


@dataclasses.dataclass
class Repo:
    """A repository. commits: {hash: {path: bytes}}; refs: {branch or tag: hash}."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, tag or commit; None if there is no such revision."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Makes these the files of a branch, and returns the hash of the commit."""
        number = f"{len(self.commits)} {sorted(files)} {time.time_ns()}"
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    path: str
    method: str = "*"
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body that are sent before the connection is closed
    seconds: float = 0.0  # before the answer
    bytes_per_second: float | None = None


@dataclasses.dataclass
class Request:
    """A request that came, and the answer to it. sent: bytes of the answer's body."""

    method: str
    path: str
    status: int
    sent: int
    host: str  # "hub" or "storage"
    byte_range: str | None
    has_key: bool


class StandInHub:
    """The hub. `address` is for HF_ENDPOINT; `users` are the names of users by their tokens."""

    def __init__(self, port: int = 0, listener: socket.socket | None = None):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users = {"hf_writer": "writer", "hf_reader": "reader"}
        self.stored: dict[str, bytes] = {}  # by sha256
        self.web: dict[str, bytes] = {}  # files of an ordinary web server, by their paths, on `storage`
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None  # larger files are sent in parts
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._servers = []
        self.address = self._serve("hub", port, listener)
        self.storage = self._serve("storage", 0, None)

    def _serve(self, host: str, port: int, listener: socket.socket | None) -> str:
        handler = type("Handler", (_Handler,), {"hub": self, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler, bind_and_activate=listener is None)
        if listener is not None:
            server.socket.close()
            server.socket = listener
            server.server_address = listener.getsockname()
            server.server_activate()
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def reset(self) -> None:
        """Forgets repositories, requests and faults."""
        with self.lock:
            for kept in (self.repos, self.stored, self.web, self.parts, self.requests, self.faults):
                kept.clear()
            self.part_bytes = None

    def put(
        self,
        name: str,
        files: Path | dict[str, bytes | str],
        kind: str = "models",
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commits a folder, or files by their paths, to a repository, and returns the commit's hash."""
        if isinstance(files, Path):
            below = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in below}
        content = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        with self.lock:
            repo = self.repos.setdefault((kind, name), Repo({}, {}))
            repo.gated, repo.private = gated, private
            return repo.commit(content, branch)

    def fail(self, path: str, **fault: Any) -> None:
        """Adds a Fault for paths that match a pattern such as `*/resolve/*`."""
        with self.lock:
            self.faults.append(Fault(path, **fault))

    def count(self, path: str = "*", method: str = "*", status: int | None = None) -> int:
        """The number of requests that match."""
        return len(self.seen(path, method, status))

    def seen(self, path: str = "*", method: str = "*", status: int | None = None) -> list[Request]:
        """The requests that match, in order."""
        with self.lock:
            found = []
            for request in self.requests:
                is_same = fnmatch.fnmatch(request.path, path) and fnmatch.fnmatch(request.method, method)
                if is_same and status in (None, request.status):
                    found.append(request)
            return found


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    host: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._any()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    # --- one request ---------------------------------------------------------------------------------------

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        url = urllib.parse.urlsplit(self.path)
        self.route = urllib.parse.unquote(url.path)
        self.query = urllib.parse.parse_qs(url.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        self.user = self.hub.users.get(token)
        self.has_key = bool(token)
        fault = self._fault()
        if fault is not None:
            if fault.seconds:
                time.sleep(fault.seconds)
            if fault.status is not None:
                self._answer(fault.status, {"error": "made to fail"}, fault.headers)
                return
        self.fault = fault
        if self.has_key and self.user is None:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.host == "storage":
            self._storage()
        else:
            self._hub()

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                is_meant = fnmatch.fnmatch(self.route, fault.path) and fnmatch.fnmatch(
                    self.command, fault.method
                )
                if is_meant:
                    fault.times -= 1
                    if fault.times <= 0:
                        self.hub.faults.remove(fault)
                    return fault
        return None

    def _answer(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None, kind: str = ""
    ) -> None:
        """Sends an answer. content: bytes, or an object that is sent as JSON."""
        if not isinstance(content, bytes):
            content, kind = json.dumps(content).encode(), "application/json; charset=utf-8"
        length = (headers or {}).get("Content-Length", str(len(content)))
        self.send_response(status)
        for name, value in {"Content-Type": kind or "application/octet-stream", **(headers or {})}.items():
            if name != "Content-Length":
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        sent = b"" if self.command == "HEAD" else content
        fault = getattr(self, "fault", None)
        if fault is not None and fault.cut_after is not None:
            sent = sent[: fault.cut_after]
            self.close_connection = True
        request = Request(
            self.command,
            self.route,
            status,
            len(sent),
            self.host,
            self.headers.get("Range"),
            self.has_key,
        )
        # Before anything is sent: a client that has the answer goes on, and tests then count requests.
        with self.hub.lock:
            self.hub.requests.append(request)
        try:
            self.end_headers()
            if fault is not None and fault.bytes_per_second:
                step = max(1, int(fault.bytes_per_second / 20))
                for start in range(0, len(sent), step):
                    self.wfile.write(sent[start : start + step])
                    time.sleep(step / fault.bytes_per_second)
            else:
                self.wfile.write(sent)
        except OSError:
            self.close_connection = True

    def _no(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        """Bytes, or the range of them that was asked for."""
        if self.command == "HEAD":
            self._answer(200, b"", {**headers, "Content-Length": str(len(data))})
            return
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        headers = {"Accept-Ranges": "bytes", **headers}
        if wanted is None:
            self._answer(200, data, headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            self._answer(
                206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            )

    # --- storage -------------------------------------------------------------------------------------------

    def _storage(self) -> None:
        parts = self.route.strip("/").split("/")
        if self.route in self.hub.web:
            data = self.hub.web[self.route]
            self._content(data, {"ETag": f'"{_git_hash(data)}"'})
        elif self.command in ("GET", "HEAD"):
            data = self.hub.stored.get(parts[-1])
            if data is None:
                self._answer(404)
            else:
                self._content(data, {"ETag": f'"{parts[-1]}"'})
        elif parts[0] == "part":
            self.hub.parts.setdefault(parts[1], {})[int(parts[2])] = self.body
            self._answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})
        elif hashlib.sha256(self.body).hexdigest() == parts[1]:
            self.hub.stored[parts[1]] = self.body
            self._answer(200)
        else:
            self._answer(400, b"other bytes than named")

    # --- the hub -------------------------------------------------------------------------------------------

    def _hub(self) -> None:
        route = self.route
        if route == "/api/whoami-v2":
            self._answer(*((200, {"name": self.user, "type": "user"}) if self.user else (401, {})))
        elif route == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif route == "/api/repos/create":
            self._create(json.loads(self.body))
        elif match := re.fullmatch(r"/lfs/(complete|verify)/(\w+)", route):
            self._end_of_upload(*match.groups())
        elif route in ("/api/models", "/api/datasets"):
            self._search(route.rsplit("/", 1)[-1])
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", route):
            self._batch("datasets" if match[1] else "models", match[2], json.loads(self.body))
        elif match := re.fullmatch(r"/api/resolve-cache/(models|datasets)/([^/]+/[^/]+)/(\w+)/(.+)", route):
            self._inline(*match.groups())
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/((?:refs/\w+/)?[^/]+)/(.+)", route):
            self._resolve("datasets" if match[1] else "models", *match.groups()[1:])
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.*))?)?", route):
            self._api(*match.groups())
        else:
            self._answer(404, {"error": "Sorry, we can't find the page you are looking for."})

    def _repo(self, kind: str, name: str) -> Repo | None:
        """A repository that this user may see; answers and returns None if there is none."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.user is None):
            # The hub does not say to strangers which of both it is.
            status, message = (
                (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            )
            self._no(status, "RepoNotFound", message)
            return None
        return repo

    def _files(self, kind: str, name: str, revision: str) -> tuple[Repo, str, dict[str, bytes]] | None:
        repo = self._repo(kind, name)
        if repo is None:
            return None
        files = repo.files(revision)
        if files is None:
            self._no(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, repo.refs.get(revision, revision), files

    def _api(self, kind: str, name: str, what: str | None, rest: str | None) -> None:
        if what in (None, "revision"):
            found = self._files(kind, name, rest or "main")
            if found is not None:
                repo, sha, files = found
                self._answer(200, self._info(name, repo, sha, files))
        elif what == "tree":
            self._tree(kind, name, *self._revision_and_path(kind, name, rest or "main"))
        elif what == "paths-info":
            self._paths(kind, name, rest or "main")
        elif what == "refs":
            repo = self._repo(kind, name)
            if repo is not None:
                branches = [
                    {"name": name, "ref": name, "targetCommit": sha} for name, sha in repo.refs.items()
                ]
                self._answer(200, {"branches": branches, "converts": [], "tags": []})
        elif what in ("preupload", "commit", "branch"):
            self._write(kind, name, what, rest or "main")
        else:
            self._answer(404, {"error": f"no {what}"})

    def _revision_and_path(self, kind: str, name: str, rest: str) -> tuple[str, str]:
        first, _, path = rest.partition("/")
        if first == "refs":
            parts = rest.split("/")
            return "/".join(parts[:3]), "/".join(parts[3:])
        return first, path

    @staticmethod
    def _info(name: str, repo: Repo, sha: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {
            "_id": "0" * 24,
            "id": name,
            "sha": sha,
            "author": name.split("/")[0],
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 1,
            "tags": [],
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def _search(self, kind: str) -> None:
        wanted = self.query.get("search", [""])[0].lower()
        author = self.query.get("author", [None])[0]
        found = []
        for (of_kind, name), repo in sorted(self.hub.repos.items()):
            is_theirs = author is None or name.split("/")[0] == author
            if of_kind == kind and wanted in name.lower() and is_theirs and not repo.private:
                sha = repo.refs["main"]
                found.append(self._info(name, repo, sha, {}))
        self._answer(200, found[: int(self.query.get("limit", ["10"])[0])])

    def _tree(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._files(kind, name, revision)
        if found is None:
            return
        _, _, files = found
        start = f"{path}/" if path else ""
        below = {file[len(start) :]: file for file in sorted(files) if file.startswith(start)}
        if path and not below:
            self._no(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for relative, file in below.items():
            folders = relative.split("/")[:-1]
            for depth in range(1, len(folders) + 1) if recursive else range(1, min(2, len(folders) + 1)):
                folder = start + "/".join(folders[:depth])
                entries.setdefault(folder, {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
            if recursive or not folders:
                entries[file] = self._entry(file, files[file])
        cursor = int(self.query.get("cursor", ["0"])[0])
        page = list(entries.values())[cursor : cursor + PAGE]
        headers = {}
        if cursor + PAGE < len(entries):
            more = urllib.parse.urlencode({"recursive": recursive, "cursor": cursor + PAGE})
            route = urllib.parse.quote(self.route)
            headers["Link"] = f'<{self.hub.address}{route}?{more}>; rel="next"'
        self._answer(200, page, headers)

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "size": len(data), "path": path}
        if path.endswith(LARGE_SUFFIXES):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
            )
            return {**entry, "oid": _git_hash(pointer)}
        return {**entry, "oid": _git_hash(data)}

    def _paths(self, kind: str, name: str, revision: str) -> None:
        found = self._files(kind, name, revision)
        if found is None:
            return
        _, _, files = found
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        entries = []
        for path in paths:
            if path in files:
                entries.append(self._entry(path, files[path]))
            elif any(file.startswith(f"{path}/") for file in files):
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        self._answer(200, entries)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._files(kind, name, revision)
        if found is None:
            return
        repo, sha, files = found
        if repo.gated and self.user not in repo.readers:
            status = 403 if self.user else 401
            self._no(status, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
            return
        if path not in files:
            self._answer(
                404,
                b"Entry not found",
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha},
            )
            return
        data = files[path]
        if not path.endswith(LARGE_SUFFIXES):
            # Small files: a redirect within the hub.
            target = f"/api/resolve-cache/{kind}/{name}/{sha}/{urllib.parse.quote(path)}"
            self._answer(307, b"", {"Location": target, **self._described(sha, data, _git_hash(data))})
            return
        oid = hashlib.sha256(data).hexdigest()
        with self.hub.lock:
            self.hub.stored[oid] = data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"'}
        location = f"{self.hub.storage}/files/{oid}?Signature=secret-of-the-storage"
        self._answer(302, b"", {"Location": location, "X-Repo-Commit": sha, **linked})

    def _inline(self, kind: str, name: str, sha: str, path: str) -> None:
        found = self._files(kind, name, sha)
        if found is None:
            return
        data = found[2][path]
        headers = {"ETag": f'"{_git_hash(data)}"', "X-Repo-Commit": sha}
        self._content(data, headers)

    @staticmethod
    def _described(sha: str, data: bytes, oid: str) -> dict[str, str]:
        return {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}

    # --- writing -------------------------------------------------------------------------------------------

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or self.user
        if self.user is None:
            self._answer(401, {"error": "Invalid username or password."})
        elif owner != self.user:
            self._no(
                403,
                "Forbidden",
                f'You don\'t have the rights to create a model under the namespace "{owner}"',
            )
        else:
            kind = f"{wanted.get('type') or 'model'}s"
            name = f"{owner}/{wanted['name']}"
            address = f"{self.hub.address}/{name}"
            with self.hub.lock:
                if (kind, name) in self.hub.repos:
                    self._answer(409, {"error": "You already created this model repo", "url": address})
                    return
                repo = Repo({}, {}, private=wanted.get("visibility") == "private")
                repo.commit({".gitattributes": b""})
                self.hub.repos[kind, name] = repo
            self._answer(200, {"url": address, "name": name, "id": "1"})

    def _may_write(self, name: str) -> bool:
        if self.user == name.split("/")[0]:
            return True
        self._no(403 if self.user else 401, "Forbidden", "You are not allowed to write to this repository")
        return False

    def _write(self, kind: str, name: str, what: str, revision: str) -> None:
        repo = self._repo(kind, name)
        if repo is None or not self._may_write(name):
            return
        if what == "branch":
            start = repo.files("main") or {}
            repo.commit(start, revision)
            self._answer(200, {})
        elif (files := repo.files(revision)) is None:
            self._no(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "preupload":
            answers = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LARGE_SUFFIXES) else "regular"
                entry = self._entry(path, files[path]) if path in files else {}
                oid = entry.get("lfs", entry).get("oid")
                answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer(200, {"files": answers})
        else:
            self._commit(name, repo, revision, dict(files))

    def _commit(self, name: str, repo: Repo, revision: str, files: dict[str, bytes]) -> None:
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    self._answer(400, {"error": f"{value['path']}: not uploaded"})
                    return
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif value.get("parentCommit") not in (None, repo.refs.get(revision)):
                self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
        with self.hub.lock:
            sha = repo.commit(files, revision)
        address = f"{self.hub.address}/{name}/commit/{sha}"
        self._answer(200, {"success": True, "commitUrl": address, "commitOid": sha})

    def _batch(self, kind: str, name: str, wanted: dict[str, Any]) -> None:
        if self._repo(kind, name) is None or not self._may_write(name):
            return
        objects = []
        for each in wanted["objects"]:
            oid, size = each["oid"], each["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                verify = {"href": f"{self.hub.address}/lfs/verify/{oid}"}
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/upload/{oid}"}
                if self.hub.part_bytes is not None and size > self.hub.part_bytes:
                    number = -(-size // self.hub.part_bytes)
                    links = {str(n): f"{self.hub.storage}/part/{oid}/{n}" for n in range(1, number + 1)}
                    upload = {
                        "href": f"{self.hub.address}/lfs/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.part_bytes), **links},
                    }
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _end_of_upload(self, what: str, oid: str) -> None:
        if what == "complete":
            parts = self.hub.parts.pop(oid, {})
            data = b"".join(parts[number] for number in sorted(parts))
            if hashlib.sha256(data).hexdigest() != oid:
                self._answer(400, {"error": "other bytes than named"})
                return
            self.hub.stored[oid] = data
        self._answer(200 if oid in self.hub.stored else 404, {})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def jsonl(rows: Iterable[dict[str, Any]], compressed: bool = False) -> bytes:
    """Rows as JSON lines, as a data set's file has them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return gzip.compress(text, mtime=0) if compressed else text
