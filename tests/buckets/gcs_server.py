"""A server of the JSON API of Google Cloud Storage, for tests: buckets in memory, generations, conditions,
faults and counts.

The emulators on PyPI (gcp-storage-emulator 2026.7.19) know no conditions (ifGenerationMatch), on which leases
and OCDBT depend, and answer one request at a time. This one has what TensorStore, gcsfs and
google-cloud-storage ask for here, as https://cloud.google.com/storage/docs/json_api describes it, and no
rights but two kinds of buckets: `unreadable` and `unwritable`.
"""

import base64
import dataclasses
import email
import hashlib
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c

_PAGE = 1000


@dataclasses.dataclass
class Stored:
    """One object: its content and its generation."""

    data: bytes
    generation: int


@dataclasses.dataclass
class Fault:
    """What happens to a request instead of, or on the way to, its answer: `status` is sent, or `seconds`
    pass, or the answer is cut.
    """

    status: int = 0
    seconds: float = 0.0
    cut: bool = False


class GcsServer:
    """Runs in threads of this process.

    `fault` is asked about each request (method, path) and may give a Fault.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.unreadable: set[str] = set()
        self.unwritable: set[str] = set()
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.listed_as: dict[str, Any] = {}  # values of all objects in listings, in place of the right ones
        self.log: list[
            tuple[str, str, int, int]
        ] = []  # method, path, bytes received and sent of every request
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.uploads: dict[str, dict[str, Any]] = {}

        class Handler(_Handler):
            server_of = self

        self._http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """One empty bucket, no faults."""
        with self.lock:
            self.buckets.clear()
            self.buckets["bucket"] = {}
            self.unreadable.clear()
            self.unwritable.clear()
            self.requests.clear()
            self.bytes.clear()
            self.log.clear()
            self.listed_as = {}
            self.fault = lambda method, path: None

    def read(self, bucket: str, name: str) -> bytes:
        return self.buckets[bucket][name].data

    def put_folder(self, folder: Path, url: str) -> None:
        """Lays the files of a folder at gs://BUCKET/NAME, as another program would."""
        bucket, _, name = url.removeprefix("gs://").partition("/")
        for path in folder.rglob("*"):
            if path.is_file():
                self.buckets[bucket][f"{name}/{path.relative_to(folder)}"] = Stored(
                    path.read_bytes(), next(self.generations)
                )

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What tells the clients to come here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: GcsServer
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        body = self._body()
        server = self.server_of
        kind = method if "/batch/" not in self.path else "BATCH"
        with server.lock:
            server.requests[kind] += 1
            server.bytes["received"] += len(body)
        named = (
            re.search(rb'"name": ?"([^"]+)"', body[:2000]) if "uploadType=multipart" in self.path else None
        )
        path = urllib.parse.unquote(self.path) + (f"&name={named[1].decode()}" if named else "")
        fault = server.fault(method, path) or Fault()
        if fault.seconds:
            time.sleep(fault.seconds)
        if fault.status:
            self._send(
                fault.status,
                {},
                json.dumps({"error": {"code": fault.status, "message": "a fault of the test"}}).encode(),
            )
            return
        status, headers, answer = self._answer(method, self.path, body)
        server.log.append((method, path, len(body), len(answer)))
        self._send(status, headers, answer, fault.cut)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        with self.server_of.lock:
            self.server_of.bytes["sent"] += len(body)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)

    # --- the API -------------------------------------------------------------------------------------------

    def _answer(self, method: str, target: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        split = urllib.parse.urlsplit(target)
        query = {
            name: values[0]
            for name, values in urllib.parse.parse_qs(split.query, keep_blank_values=True).items()
        }
        if split.path.rstrip("/") == "/batch/storage/v1":
            return self._batch(body)
        parts = [
            urllib.parse.unquote(part)
            for part in re.sub(r"^/(upload|download)(?=/)", "", split.path).split("/")[1:]
        ]
        if parts[:2] != ["storage", "v1"]:
            return _error(404, "no such path")
        with self.server_of.lock:
            match parts[2:]:
                case ["b"]:
                    return _json({"items": [{"name": name} for name in self.server_of.buckets]})
                case ["b", bucket]:
                    return self._denied(bucket, "GET") or _json(
                        {"name": bucket, "location": "HERE", "locationType": "region"}
                    )
                case ["b", bucket, "o"] if split.path.startswith("/upload"):
                    return self._denied(bucket, "POST") or self._upload(method, bucket, query, body)
                case ["b", bucket, "o"]:
                    return self._denied(bucket, "GET") or self._list(bucket, query)
                case ["b", bucket, "o", name]:
                    return self._denied(bucket, method) or self._object(
                        method, bucket, name, query, split.path.startswith("/download")
                    )
                case ["b", bucket, "o", name, "moveTo", "o", new]:
                    return self._denied(bucket, "POST") or self._move(bucket, name, new)
                case ["b", bucket, "o", name, "rewriteTo" | "copyTo", "b", other, "o", new]:
                    return (
                        self._denied(bucket, "GET")
                        or self._denied(other, "POST")
                        or self._copy(bucket, name, other, new)
                    )
        return _error(404, "no such path")

    def _denied(self, bucket: str, method: str) -> tuple[int, dict[str, str], bytes] | None:
        server = self.server_of
        if bucket not in server.buckets:
            return _error(404, "The specified bucket does not exist.")
        if bucket in (server.unreadable if method == "GET" else server.unwritable):
            return _error(
                403,
                "test@example.com does not have access to the Google Cloud Storage object. Permission denied",
            )
        return None

    def _list(self, bucket: str, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end, token = (
            query.get("startOffset", ""),
            query.get("endOffset", ""),
            query.get("pageToken", ""),
        )
        most = min(int(query.get("maxResults") or _PAGE), _PAGE)
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        last = ""
        for name in sorted(self.server_of.buckets[bucket]):
            if (
                not name.startswith(prefix)
                or name < start
                or (end and name >= end)
                or (token and name <= token)
            ):
                continue
            below = name[len(prefix) :]
            group = (
                prefix + below.split(delimiter)[0] + delimiter if delimiter and delimiter in below else None
            )
            if group is not None and (group in prefixes or (token and group <= token)):
                continue
            if len(items) + len(prefixes) == most:
                return _json({"items": items, "prefixes": prefixes, "nextPageToken": last})
            last = name if group is None else group + "\U0010ffff"
            if group is None:
                items.append(self._metadata(bucket, name) | self.server_of.listed_as)
            else:
                prefixes.append(group)
        return _json({"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def _metadata(self, bucket: str, name: str) -> dict[str, Any]:
        stored = self.server_of.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.data)),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "crc32c": _crc32c(stored.data),
            "etag": str(stored.generation),
        }

    def _object(
        self, method: str, bucket: str, name: str, query: dict[str, str], download: bool
    ) -> tuple[int, dict[str, str], bytes]:
        objects = self.server_of.buckets[bucket]
        if (refused := self._refused(bucket, name, query)) is not None:
            return refused
        if name not in objects:
            return _error(404, f"No such object: {bucket}/{name}")
        if method == "DELETE":
            del objects[name]
            return 204, {}, b""
        if method != "GET" or (query.get("alt") != "media" and not download):
            return _json(self._metadata(bucket, name))
        stored = objects[name]
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(stored.generation),
            "x-goog-hash": f"crc32c={_crc32c(stored.data)}",
            "ETag": str(stored.generation),
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, headers, stored.data
        size = len(stored.data)
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first >= size:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, stored.data[first : last + 1]

    def _refused(
        self, bucket: str, name: str, query: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes] | None:
        stored = self.server_of.buckets[bucket].get(name)
        now = stored.generation if stored is not None else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            return _error(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            return 304, {}, b""
        if stored is not None and "generation" in query and int(query["generation"]) != now:
            return _error(404, "no such generation")
        return None

    def _upload(
        self, method: str, bucket: str, query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if "upload_id" in query:
            return self._upload_part(query["upload_id"], body)
        match query.get("uploadType"):
            case "media":
                return self._put(bucket, query["name"], body, query)
            case "multipart":
                message = email.message_from_bytes(
                    b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
                )
                described, _ = message.get_payload()
                name = json.loads(described.get_payload(decode=True)).get("name") or query["name"]
                boundary = re.search(r'boundary=["\']?([^"\';]+)', self.headers["Content-Type"])[1].encode()
                # Lines end as the first one does: gcsfs writes LF alone, and the data may end with CR.
                opening = b"--" + boundary
                line_end = b"\r\n" if body.split(opening, 1)[1].startswith(b"\r\n") else b"\n"
                data = body.split(opening, 2)[2].split(2 * line_end, 1)[1]
                data = data[: data.rindex(line_end + opening)]
                return self._put(bucket, name, data, query)
            case "resumable":
                name = query.get("name") or json.loads(body)["name"]
                number = f"upload-{next(self.server_of.generations)}"
                self.server_of.uploads[number] = {"bucket": bucket, "name": name, "query": query, "data": b""}
                objects = f"{self.server_of.url}/upload/storage/v1/b/{bucket}/o"
                where = f"{objects}?uploadType=resumable&upload_id={number}"
                return 200, {"Location": where}, b"{}"
        return _error(400, "no such uploadType")

    def _upload_part(self, number: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upload = self.server_of.uploads[number]
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range") or "")
        if asked and asked[1] is not None:
            upload["data"] = upload["data"][: int(asked[1])] + body
        elif asked is None:
            upload["data"] = body
        whole = asked is None or (asked[3] != "*" and len(upload["data"]) == int(asked[3]))
        if not whole:
            received = {"Range": f"bytes=0-{len(upload['data']) - 1}"} if upload["data"] else {}
            return 308, received, b""
        return self._put(upload["bucket"], upload["name"], upload["data"], upload["query"])

    def _put(
        self, bucket: str, name: str, data: bytes, query: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        if (refused := self._refused(bucket, name, query)) is not None:
            return refused
        self.server_of.buckets[bucket][name] = Stored(data, next(self.server_of.generations))
        return _json(self._metadata(bucket, name))

    def _copy(self, bucket: str, name: str, other: str, new: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.server_of.buckets[bucket]:
            return _error(404, f"No such object: {bucket}/{name}")
        data = self.server_of.buckets[bucket][name].data
        self._put(other, new, data, {})
        return _json(
            {"kind": "storage#rewriteResponse", "done": True, "resource": self._metadata(other, new)}
        )

    def _move(self, bucket: str, name: str, new: str) -> tuple[int, dict[str, str], bytes]:
        answer = self._copy(bucket, name, bucket, new)
        if answer[0] == 200:
            del self.server_of.buckets[bucket][name]
            return _json(self._metadata(bucket, new))
        return answer

    def _batch(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        answers = []
        for part in body.split(b"--" + boundary)[1:]:
            if (asked := re.search(rb"(DELETE|POST|GET) (\S+) HTTP", part)) is None:
                continue
            found = re.search(rb"Content-ID: <?([^>\r\n]+)", part, re.IGNORECASE)
            status, _, answer = self._answer(asked[1].decode(), asked[2].decode(), b"")
            number = found[1].decode() if found else ""
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n\r\n{answer.decode()}\r\n"
            )
        return (
            200,
            {"Content-Type": "multipart/mixed; boundary=batch"},
            ("".join(answers) + "--batch--").encode(),
        )


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _json(value: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(value).encode()


def _error(status: int, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {}, json.dumps({"error": {"code": status, "message": message}}).encode()
