"""moto's server of S3, with faults and counts on the way to it."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.buckets.gcs_server import Fault


class S3Server:
    """Runs in threads of this process.

    `fault` is asked about each request (method, path) and may give a status to answer with, or a Fault.
    """

    def __init__(self) -> None:
        self.fault: Callable[[str, str], int | Fault | None] = lambda method, path: None
        self.requests: Counter[str] = Counter()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._app = DomainDispatcherApplication(create_backend_app)
        self.url = f"http://127.0.0.1:{self._http.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def _answer(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.requests[environment["REQUEST_METHOD"]] += 1
        fault = self.fault(environment["REQUEST_METHOD"], environment["PATH_INFO"])
        if isinstance(fault, Fault):
            time.sleep(fault.seconds)
        status = fault.status if isinstance(fault, Fault) else fault
        if status:
            environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
            start(f"{status} fault", [("Content-Type", "application/xml")])
            code = b"AccessDenied" if status == 403 else b"SlowDown"
            return [b"<Error><Code>" + code + b"</Code><Message>a fault of the test</Message></Error>"]
        answer = self._app(environment, start)
        if isinstance(fault, Fault) and fault.cut:
            # The length is said, and half of the bytes come.
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    def close(self) -> None:
        self._http.shutdown()

    @property
    def environment(self) -> dict[str, str]:
        """What tells the clients to come here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIDOFTHETESTS",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def reset(self) -> None:
        """One empty bucket, no faults."""
        self.fault = lambda method, path: None
        self.requests.clear()
        client = self.client()
        for bucket in client.list_buckets()["Buckets"]:
            for entry in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
                client.delete_object(Bucket=bucket["Name"], Key=entry["Key"])
            client.delete_bucket(Bucket=bucket["Name"])
        client.create_bucket(Bucket="bucket")

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def read(self, bucket: str, name: str) -> bytes:
        return self.client().get_object(Bucket=bucket, Key=name)["Body"].read()

    def put_folder(self, folder: Path, url: str) -> None:
        """Lays the files of a folder at s3://BUCKET/NAME, as another program would."""
        bucket, _, name = url.removeprefix("s3://").partition("/")
        for path in folder.rglob("*"):
            if path.is_file():
                self.client().put_object(
                    Bucket=bucket, Key=f"{name}/{path.relative_to(folder)}", Body=path.read_bytes()
                )
