"""A run's report in a real browser: screenshots for desktop and phone, light and dark, what the console says,
and what is too wide.

    apt-get install chromium
    python benchmarks/report_in_browser.py runs/demo/report.html --out runs/shots

Exit status 1 when the console has a message, anything is asked of the network, or the page is wider than the
screen.
"""

import argparse
import base64
import json
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
SCREENS = {"desktop": (1280, 900, 1), "phone": (390, 844, 2)}


class Browser:
    """Chromium's DevTools protocol over its web socket (RFC 6455), as far as this script needs it."""

    def __init__(self, url: str):
        host, _, path = url.removeprefix("ws://").partition("/")
        name, port = host.split(":")
        self._socket = socket.create_connection((name, int(port)), timeout=30)
        key = base64.b64encode(b"0123456789abcdef").decode()
        head = f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self._socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        while self._read(1) != b"\n" or self._read(2) != b"\r\n":
            pass
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call; events that come meanwhile are kept."""
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": params}).encode()
        size = (
            struct.pack("!BBH", 0x81, 0xFE, len(data))
            if len(data) < 65536
            else struct.pack("!BBQ", 0x81, 0xFF, len(data))
        )
        self._socket.sendall(size + b"\0\0\0\0" + data)
        while True:
            message = json.loads(self._message())
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def _message(self) -> bytes:
        whole = b""
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            size = (
                struct.unpack("!H", self._read(2))[0]
                if size == 126
                else struct.unpack("!Q", self._read(8))[0]
                if size == 127
                else size
            )
            whole += self._read(size)
            if first & 0x80:
                return whole

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += self._socket.recv(size - len(found))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/shots"))
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            options.chromium,
            *FLAGS,
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            "about:blank",
        ]
        chromium = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            browser = Browser(_socket_of(Path(profile)))
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            for screen, (width, height, scale) in SCREENS.items():
                for scheme in ("light", "dark"):
                    wrong += _look(
                        browser,
                        options.page,
                        options.out / f"{screen}-{scheme}.png",
                        width,
                        height,
                        scale,
                        scheme,
                    )
        finally:
            chromium.terminate()
            chromium.wait()
    print("\n".join(wrong) or "no message in the console, nothing asked of the network, nothing too wide")
    return bool(wrong)


def _socket_of(profile: Path) -> str:
    for _ in range(300):
        if (profile / "DevToolsActivePort").is_file():
            port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as pages:
                found = [page["webSocketDebuggerUrl"] for page in json.load(pages) if page["type"] == "page"]
            if found:
                return found[0]
        time.sleep(0.1)
    raise RuntimeError("chromium did not start")


def _look(
    browser: Browser, page: Path, shot: Path, width: int, height: int, scale: int, scheme: str
) -> list[str]:
    browser.events.clear()
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=scale,
        mobile=scale > 1,
    )
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", url=page.resolve().as_uri())
    for _ in range(300):
        if (
            browser.call("Runtime.evaluate", expression="document.readyState")["result"]["value"]
            == "complete"
        ):
            break
        time.sleep(0.1)
    wide = browser.call("Runtime.evaluate", expression=_TOO_WIDE, returnByValue=True)["result"]["value"]
    size = browser.call("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
    picture = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    shot.write_bytes(base64.b64decode(picture["data"]))
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    said = [event["params"] for event in browser.events if event["method"] in kinds]
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    asked = [url for url in asked if not url.startswith(("data:", "file:"))]
    print(f"{shot}: {size['height']:.0f} pixels high")
    return [f"{shot.stem}: {problem}" for problem in (*said, *asked, *wide)]


_TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, pre, svg *'))
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
  .map(element => `${element.tagName}.${element.className} ends at ${element.getBoundingClientRect().right}`)
"""

if __name__ == "__main__":
    sys.exit(main())
