"""Buckets on object storage: their names, the clients that read and write them, and the explanation of their
errors.

fsspec (gcsfs, s3fs) copies files; TensorStore makes conditional writes. Both, and Orbax, use the credentials
and endpoints of the cloud's own tools; see docs/how-to/buckets.md for the names of settings.
"""

import base64
import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from babel_jax.errors import BadInput, one_line

SCHEMES = ("gs", "s3")  # for writing; any scheme of fsspec can be read
PROBE = "babel-probe-"  # the beginning of the names of probes
LEASE = "lease.json"  # of the job that writes a folder; see lease.py
_ATTEMPTS = 3  # in addition to those of the clients
_FIRST_WAIT_SECONDS = 0.5
_SECONDS_OF_SILENCE = 60


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file in a bucket: its bytes, and a version that changes with its content.

    `md5` is hex; None if the bucket does not give it.
    """

    size: int
    version: str
    md5: str | None


def is_url(place: Path | str) -> bool:
    """True for a URL in a bucket or on another object storage."""
    return isinstance(place, str) and "://" in place


def clean(url: str) -> str:
    """The URL of a folder in a bucket, in its normal form.

    Raises BadInput for any other URL.
    """
    match = re.fullmatch(r"(\w+)://([^/?#@]+)((?:/[^?#]*)?)/*", url)
    if match is None:
        raise BadInput(
            f"{without_secrets(url)}: no folder of a bucket; write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
        )
    scheme, bucket, path = match.groups()
    parts = [part for part in path.split("/") if part]
    if not parts or any(part in (".", "..") for part in parts):
        raise BadInput(
            f"{without_secrets(url)}: names no folder in the bucket; write {scheme}://{bucket}/FOLDER"
        )
    return f"{scheme}://{bucket}/{'/'.join(parts)}"


def without_secrets(url: str) -> str:
    """A URL without the parts that may be keys: before @, and after ?."""
    return re.sub(r"://[^/@]*@", "://", re.split(r"[?#]", url, maxsplit=1)[0])


def stored_below(url: str) -> dict[str, Stored]:
    """The files below a URL by their relative names, without its lease and without probes (small files that
    test the rights).
    """

    def find() -> dict[str, Any]:
        system = filesystem(url)
        try:
            result: dict[str, Any] = system.find(key(url), detail=True)
            return result
        except FileNotFoundError:
            return {}

    # With a slash at its end, so that runs/a does not find the files of runs/ab.
    start = key(url).rstrip("/") + "/"
    with explain(url):
        entries = tried(find)
        # A bucket that is not there and a folder without files look alike; the first one is an error.
        if not entries:
            tried(lambda: _check_bucket(url))
        stored = {}
        for name, entry in entries.items():
            below = name[len(start) :]
            is_file_below = name.startswith(start) and not name.endswith("/")
            if is_file_below and PROBE not in below and below != LEASE:
                _check_name(below, url)
                stored[below] = _described(entry)
    return stored


def _check_name(name: str, url: str) -> None:
    """Raises BadInput for the name of a file that would be copied to a place outside of the local folder, or
    onto another file: in a bucket, "run/../../x" and "run//x" are names like any other.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise BadInput(
            f"{url}: has a file named {one_line(name, 200)!r}, which no folder on disk can have; rename or "
            "remove it"
        )


def _check_bucket(url: str) -> None:
    system, bucket = filesystem(url), key(url).split("/")[0]
    try:
        system.ls(bucket, refresh=True)
    except FileNotFoundError:
        raise BadInput(
            f"{url}: there is no bucket {bucket}, or it is not yours to see; check its name and the account"
        ) from None


def _described(entry: Mapping[str, Any]) -> Stored:
    # Google's client and Amazon's give a file's facts under other names.
    etag = str(entry.get("ETag") or entry.get("etag") or "").strip('"')
    # Google gives the MD5 in base64; Amazon's ETag of a file sent in one part is its MD5.
    digest, md5 = entry.get("md5Hash"), None
    if isinstance(digest, str):
        md5 = base64.b64decode(digest).hex()
    elif re.fullmatch("[0-9a-f]{32}", etag):
        md5 = etag
    version = str(entry.get("generation") or etag or entry.get("mtime") or entry.get("created") or "")
    return Stored(int(entry["size"]), version, md5)


def filesystem(url: str) -> Any:
    """fsspec's client for a URL, with the credentials and endpoints of the cloud's own tools."""
    import fsspec

    set_up_clients()
    return fsspec.core.url_to_fs(url)[0]


@functools.cache
def set_up_clients() -> None:
    """Sets up all clients, including those that Orbax and JAX make.

    fsspec's clients list the bucket each time, because TensorStore and other processes write there too.
    TensorStore's clients repeat a request that transfers nothing; by default they would wait for ever.
    """
    import fsspec

    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_SECONDS_OF_SILENCE))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

    for scheme in (*SCHEMES, "gcs", "s3a"):
        fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False


def key(url: str) -> str:
    """BUCKET/NAME, the form in which fsspec's clients name files."""
    return url.split("://", 1)[1]


def kvstore(url: str) -> Any:
    """TensorStore's client for a folder in a bucket. It can write on the condition that nobody else has
    written (leases).
    """
    import tensorstore

    set_up_clients()
    return tensorstore.KvStore.open(kvstore_spec(url + "/")).result()


def kvstore_spec(url: str) -> dict[str, Any] | str:
    """The spec with which TensorStore opens a URL."""
    if not url.startswith("s3://"):
        return url
    # TensorStore takes the endpoint of an S3 store of another provider only in this form.
    bucket, _, path = key(url).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return spec


@functools.cache
def let_orbax_speak_s3() -> None:
    """Lets Orbax write to s3:// as it writes to gs://.

    Orbax 0.12 only knows gs://: it reads any other URL as a relative path on disk, and refuses it.
    TensorStore, which does the writing, knows both. Orbax's rules for gs:// are right for S3 too: no renames,
    and a success file that is written last.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for_gcs = gcs_utils.get_kvstore_for_gcs
    prefixes = tuple(f"{scheme}://" for scheme in SCHEMES)

    def normalized(path: str) -> str:
        return re.sub(r"^(gs|s3):/(?=[^/])", r"\1://", os.path.normpath(path))

    # Orbax has no setting for this, so four names in its modules are replaced.
    for module, name, value in (
        (gcs_utils, "_GCS_PATH_PREFIX", prefixes),
        (
            gcs_utils,
            "get_kvstore_for_gcs",
            lambda path: for_gcs(path) if path.startswith("gs://") else kvstore_spec(path),
        ),
        (tensorstore_utils, "_use_gcs_driver", lambda folder: folder.startswith(prefixes)),
        (tensorstore_utils, "_normalize_path", normalized),
    ):
        if not hasattr(module, name):
            raise BadInput(
                "s3://: this version of Orbax cannot be taught to write there; install the one of "
                "constraints.txt, or use gs://"
            )
        setattr(module, name, value)


def tried(operation: Callable[[], Any]) -> Any:
    """The result of an operation, which is repeated if the connection or the service failed."""
    for attempt in range(_ATTEMPTS):
        try:
            return operation()
        except (BadInput, FileNotFoundError, PermissionError, FileExistsError, ImportError):
            raise
        except Exception as error:
            # A store that refuses will refuse again, so only other failures are waited for.
            if attempt + 1 == _ATTEMPTS or _is_refusal(error):
                raise
            time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError


def _is_refusal(error: Exception) -> bool:
    words = str(error)
    return any(
        word in words
        for word in (
            "Forbidden",
            "AccessDenied",
            "Access Denied",
            "PERMISSION_DENIED",
            "NoSuchBucket",
            "credentials",
        )
    )


_CLIENTS = ("gcsfs", "s3fs", "aiohttp", "aiobotocore", "botocore", "google", "requests")
_SIGNS = (
    "http_response",
    "gs://",
    "s3://",
    "GCS",
    "CURL",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
)


def is_of_bucket(error: Exception) -> bool:
    """True if an error comes from a bucket or the connection to it: it has a type of a client, or is
    TensorStore's ValueError.
    """
    words = str(error)
    return (
        type(error).__module__.split(".")[0] in _CLIENTS
        or isinstance(error, OSError)
        or any(sign in words for sign in _SIGNS)
    )


@contextlib.contextmanager
def explain(url: str, done: str = "read") -> Iterator[None]:
    """Turns the errors of fsspec's packages and of TensorStore into BadInput that names `url`, without
    keys.
    """
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError as error:
        if done == "read":
            reason = one_line(without_secrets(str(error)), 200) or "not there"
            raise BadInput(
                f"{without_secrets(url)}: cannot be read ({reason}); check the name of the bucket and of "
                "the folder"
            ) from error
        raise BadInput(
            f"{without_secrets(url)}: cannot be {done}: there is no such bucket or file; check the name"
        ) from error
    except Exception as error:
        reason = one_line(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", str(error)), 200) or type(error).__name__
        raise BadInput(
            f"{without_secrets(url)}: cannot be {done} ({reason}); check the name, the rights and that the "
            "package for such URLs is there"
        ) from error
