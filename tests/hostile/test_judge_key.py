"""Hostile servers: the judge's key goes to one host, stands in no output, and an answer has an end."""

import http.server
import json
import threading
import time
import urllib.parse

import pytest

from babel_jax.cli import main
from babel_jax.quality import server as serving

KEY = 'sk-planted"secret/0123456789+=='
ANSWER = json.dumps({"choices": [{"message": {"content": '{"fluency": 4, "substance": 2}'}}]}).encode()


@pytest.fixture
def servers(monkeypatch):
    """Starts servers: `start(answer)` gives the address of one whose POST and GET are answered by
    `answer(handler)`.
    """
    monkeypatch.setattr(serving, "_FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.server.seen.append(dict(self.headers))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer(self)

            def do_GET(self):
                self.do_POST()

            def log_message(self, *_):
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        made.seen, made.daemon_threads = [], True
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(made)
        return made

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.fixture
def judge(write_rows, tmp_path, capfd):
    """Runs `babel judge`: the exit status and all that it wrote, to the terminal and into files."""
    write_rows(tmp_path / "en.jsonl", [{"id": str(number), "text": f"text {number}"} for number in range(3)])

    def run(address, *changes):
        path = tmp_path / "quality.toml"
        path.write_text(
            f'out = "{tmp_path / "out"}"\n[judge]\nendpoint = {json.dumps(address)}\nretries = '
            "1\ntimeout_seconds = 1.0\n"
            f'dimensions = {{ fluency = "a", substance = "b" }}\n[classifier]\nmodel = "x"\n'
            f'[[sources]]\nlanguage = "en"\npath = "{tmp_path / "en.jsonl"}"\n'
        )
        status = main(["judge", str(path), *(part for change in changes for part in ("--set", change))])
        said = capfd.readouterr()
        files = (
            [file.read_bytes().decode() for file in (tmp_path / "out").rglob("*") if file.is_file()]
            if (tmp_path / "out").is_dir()
            else []
        )
        return status, said.err, "\n".join([said.out, said.err, *files])

    return run


def send(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def assert_no_key(text):
    """Neither the key nor any part of it of 8 characters, in any of the forms in which it may be written."""
    for form in (KEY, urllib.parse.quote(KEY, safe=""), json.dumps(KEY)[1:-1]):
        assert not any(form[start : start + 8] in text for start in range(len(form) - 7)), text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(servers, judge, status):
    other = servers(lambda handler: send(handler, 200, ANSWER))
    place = f"http://localhost:{other.server_port}/{urllib.parse.quote(KEY, safe='')}"
    first = servers(lambda handler: send(handler, status, Location=place))
    code, error, output = judge(f"http://127.0.0.1:{first.server_port}/v1")
    assert code == 2
    assert f"judge.endpoint: it redirects to another address (status {status})" in error
    assert other.seen == []
    assert_no_key(output)


FORMS = {
    "plain": KEY,
    "quoted": urllib.parse.quote(KEY, safe=""),
    "json": json.dumps(KEY),
    "python": repr(KEY),
    "at the end of what is shown": "x" * 290 + KEY,
    "with lines": f"Authorization:\r\n Bearer {KEY}\r\n",
    "with control characters": f"\x1b[2J{KEY}\x07",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 500, 503])
def test_what_a_server_repeats_is_not_written(servers, judge, status, form):
    one = servers(lambda handler: send(handler, status, FORMS[form].encode()))
    code, error, output = judge(f"http://127.0.0.1:{one.server_port}/v1")
    assert code == 2
    assert error.count("\n") == error.count("babel: ") + error.count("judge: en-")
    assert "[key]" in output
    assert "\x1b" not in output
    assert_no_key(output)


def test_an_answer_that_repeats_the_key(servers, judge):
    content = {"choices": [{"message": {"content": f'{KEY} {{"fluency": 4, "substance": 2}}'}}], KEY: [KEY]}
    one = servers(lambda handler: send(handler, 200, json.dumps(content).encode()))
    code, _, output = judge(f"http://127.0.0.1:{one.server_port}/v1")
    assert code == 0
    assert [seen["Authorization"] for seen in one.seen] == [f"Bearer {KEY}"] * 3
    assert_no_key(output)


@pytest.mark.parametrize(
    "key",
    ["sk-a secret\nin two lines", "sk-a\rsecret", "sk-a\x00secret", "sk-sécret-0123456789", "sk-a secret"],
)
def test_a_key_that_no_header_can_hold(servers, judge, monkeypatch, key):
    one = servers(lambda handler: send(handler, 200, ANSWER))
    monkeypatch.setattr(serving.os, "environ", {**serving.os.environ, "OPENAI_API_KEY": key})
    code, error, output = judge(f"http://127.0.0.1:{one.server_port}/v1")
    assert code == 2
    assert error.startswith("babel: OPENAI_API_KEY: the key has a space, a line end")
    assert "cret" not in output
    assert one.seen == []


def test_a_line_end_behind_the_key_is_no_part_of_it(servers, judge, monkeypatch):
    one = servers(lambda handler: send(handler, 200, ANSWER))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    assert judge(f"http://127.0.0.1:{one.server_port}/v1")[0] == 0
    assert one.seen[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "endpoint", ["http://host:pa55w0rd-secret/v1", "http://[pa55w0rd-secret/v1", ["pa55w0rd-secret"]]
)
def test_an_endpoint_that_is_no_address_is_not_repeated(judge, endpoint):
    code, error, output = judge(endpoint)
    assert code == 2
    assert "endpoint" in error
    assert "pa55w0rd-secret" not in error + output


@pytest.mark.parametrize(
    "endpoint",
    [
        f"http://user:{'pa55w0rd-secret'}@host/v1",
        "http://pa55w0rd-secret@host/v1",
        "https://host/v1?key=pa55w0rd-secret",
    ],
)
def test_a_password_in_the_endpoint_is_refused_and_not_repeated(judge, endpoint):
    code, error, output = judge(endpoint)
    assert code == 2
    assert error.count("\n") == 1
    assert "endpoint holds a user name, a password or a query" in error
    assert "pa55w0rd" not in output


def test_a_key_in_the_place_of_its_variable(judge):
    code, error, output = judge("http://127.0.0.1:1/v1", f"judge.key_variable={json.dumps(KEY)}")
    assert code == 2
    assert "key_variable is no name of an environment variable" in error
    assert_no_key(output)


def drip_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    drip(handler, b" ")


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    drip(handler, b"x")


def drip_chunks(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    drip(handler, b"1\r\n \r\n")


def drip(handler, part):
    try:
        for _ in range(200):
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


@pytest.mark.parametrize("answer", [drip_body, drip_headers, drip_chunks])
def test_an_answer_has_a_deadline(servers, judge, answer):
    one = servers(answer)
    start = time.monotonic()
    code, error, _ = judge(f"http://127.0.0.1:{one.server_port}/v1", "judge.retries=0")
    assert code == 2
    assert "within judge.timeout_seconds" in error or "timed out" in error
    assert time.monotonic() - start < 5


def test_an_answer_has_a_size(servers, judge, monkeypatch):
    monkeypatch.setattr(serving, "MOST_ANSWER_BYTES", 100_000)

    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(10_000):
                handler.wfile.write(b" " * 65536)
        except OSError:
            pass

    one = servers(endless)
    code, error, _ = judge(f"http://127.0.0.1:{one.server_port}/v1", "judge.retries=0")
    assert code == 2
    assert "an answer of more than 100,000 bytes" in error


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b'{"choices": []}'])
def test_answers_that_are_none(servers, judge, body):
    one = servers(lambda handler: send(handler, 200, body))
    code, error, _ = judge(f"http://127.0.0.1:{one.server_port}/v1")
    assert code in (0, 2)
    assert "Traceback" not in error
