"""The judge: prompts out and replies in, by files and by a stand-in server on this machine."""

import contextlib
import http.server
import io
import json
import os
import threading

import pytest

from babel_jax.cli import main
from babel_jax.config.file import load_settings, parse_settings
from babel_jax.config.quality import JudgeSettings, QualityConfig
from babel_jax.errors import BadInput
from babel_jax.quality import server as serving
from babel_jax.quality.judge import judge, parse_reply, read_judged

DIMENSIONS = {"fluency": "Is it?", "substance": "Has it?"}


@pytest.fixture
def config_file(write_rows, rows_of, tmp_path):
    """A config with 8 documents of each of two languages to judge; texts have 10 rows."""
    for language in ("en", "ha"):
        write_rows(tmp_path / f"{language}.jsonl", rows_of(language, ("web",), 10))
    path = tmp_path / "quality.toml"
    sources = "\n".join(
        f'[[sources]]\nlanguage = "{code}"\npath = "{tmp_path / code}.jsonl"' for code in ("en", "ha")
    )
    path.write_text(
        (
            f'out = "{tmp_path / "out"}"\n[judge]\nmodel = "big"\ndocuments = 8\nmax_characters = '
            "50\nretries = 2\n[judge.dimensions]\n"
        )
        + "\n".join(f'{name} = "{question}"' for name, question in DIMENSIONS.items())
        + f'\n[classifier]\nmodel = "x"\n{sources}\n'
    )
    return path


def reply(name, content):
    return (
        json.dumps(
            {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": content}}]}}}
        )
        + "\n"
    )


@pytest.fixture
def server():
    """A stand-in for a server: `answers` is a function of the prompt giving (status, content); `seen` are the
    requests.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            status, content = self.server.answers(body["messages"][0]["content"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen, made.answers = [], lambda prompt: (200, '{"fluency": 4, "substance": 2}')
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize("depth", [300, 480, 700, 950, 20_000])
def test_an_answer_that_is_nested_deeply(monkeypatch, depth):
    """It may be parsed and still be too deep for the search for the key: an answer, or BadInput."""
    answer = ("[" * depth + "]" * depth).encode()
    made = serving.Server(JudgeSettings(endpoint="http://127.0.0.1:9", retries=0, model="m"))
    monkeypatch.setattr(made._opener, "open", lambda *_, **__: io.BytesIO(answer))
    if depth == 300:
        assert made.post({}) == (200, json.loads(answer))
    else:
        with contextlib.suppress(BadInput):
            assert made.post({}) == (200, json.loads(answer))


def test_by_files(config_file, tmp_path, capsys):
    assert main(["judge", str(config_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["replies"], found["judged"]) == (16, 0, 0)
    prompts = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert len({prompt["custom_id"] for prompt in prompts}) == 16
    first = prompts[0]
    assert (first["method"], first["url"], first["body"]["model"]) == ("POST", "/v1/chat/completions", "big")
    (message,) = first["body"]["messages"]
    assert "meant to be in English" in message["content"]
    assert "- substance: Has it?" in message["content"]
    assert message["content"].rstrip("\n").endswith("All human beings are born free and equal in dignit")

    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        reply("en-0", 'Sure! ```json\n{"fluency": 5, "substance": 1.5}\n```')
        + reply("en-1", "no idea {")
        + reply("ha-3", '{"fluency": 9, "substance": 1}')
        + reply("ha-4", '{"note": {"a": 1}} {"fluency": 0, "substance": 1}')
        + reply("nobody", '{"fluency": 0, "substance": 1}')
        + json.dumps({"custom_id": "ha-5", "response": {"status_code": 500}})
        + '\n{"custom_id": "ha-6", "resp'
    )
    assert main(["judge", str(config_file), "--replies", str(answers), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unreadable"] == {
        "no JSON object": 1,
        "a score outside of the scale": 1,
        "not asked for": 1,
        "status 500 from the server": 1,
    }
    judged = read_judged(tmp_path / "out" / "judged.jsonl", DIMENSIONS)
    assert [(row["language"], row["scores"], row["score"]) for row in judged] == [
        ("en", {"fluency": 5.0, "substance": 1.5}, 3.25),
        ("ha", {"fluency": 0.0, "substance": 1.0}, 0.5),
    ]
    assert found["languages"]["ha"] == {"documents": 1, "mean": 0.5}


def test_a_server_is_asked_once_for_each_document(config_file, server, monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "_FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    failures = iter([503, 429])

    def sometimes_busy(prompt):
        return next(failures, 200), json.dumps({"fluency": 4, "substance": 5 if "English" in prompt else 1})

    server.answers = sometimes_busy
    settings = load_settings(
        QualityConfig, config_file, (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1",)
    )
    found = judge(settings)
    assert (found["judged"], found["unreadable"]) == (16, {})
    assert len(server.seen) == 18
    assert {(path, key) for path, key, _ in server.seen} == {("/v1/chat/completions", "Bearer secret")}
    assert found["languages"] == {"en": {"documents": 8, "mean": 4.5}, "ha": {"documents": 8, "mean": 2.5}}
    judge(settings)
    assert len(server.seen) == 18


def test_a_reply_that_a_kill_cut_off_is_asked_for_again_and_no_other(config_file, server, tmp_path):
    server.answers = lambda prompt: (200, '{"fluency": 4, "substance": 2}')
    settings = load_settings(
        QualityConfig, config_file, (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1",)
    )
    judge(settings)
    replies, judged = tmp_path / "out" / "replies.jsonl", tmp_path / "out" / "judged.jsonl"
    whole, expected = replies.read_bytes(), judged.read_bytes()
    for cut in (7, len(whole) // 2, len(whole) - 2):
        replies.write_bytes(whole[:cut])
        asked = len(server.seen)
        assert judge(settings)["judged"] == 16
        assert judged.read_bytes() == expected
        assert len(server.seen) - asked == 16 - whole[:cut].count(b"\n")


def test_replies_that_are_no_file_of_ours(config_file, server, tmp_path):
    server.answers = lambda prompt: (200, '{"fluency": 4, "substance": 2}')
    settings = load_settings(
        QualityConfig, config_file, (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1",)
    )
    victim, replies = tmp_path / "victim", tmp_path / "out" / "replies.jsonl"
    victim.write_text("theirs\n")
    replies.parent.mkdir()
    replies.symlink_to(victim)
    with pytest.raises(BadInput, match=r"replies.jsonl: a link or no regular file"):
        judge(settings)
    assert victim.read_text() == "theirs\n"
    replies.unlink()
    os.mkfifo(replies)
    with pytest.raises(BadInput, match="no regular file"):
        judge(settings)
    replies.unlink()
    with open(replies, "wb") as file:
        file.truncate(4 * 10**12)
    with pytest.raises(BadInput, match=r"replies.jsonl:1: a line of more than 16,777,216 bytes"):
        judge(settings)
    replies.unlink()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_refused_is_left_out(config_file, server, tmp_path, caplog, status):
    server.answers = lambda prompt: (status if "English" in prompt else 200, '{"fluency": 4, "substance": 2}')
    settings = load_settings(
        QualityConfig, config_file, (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1",)
    )
    found = judge(settings)
    assert (found["replies"], found["judged"], found["unreadable"]) == (
        16,
        8,
        {f"status {status} from the server": 8},
    )
    assert f"8 replies left out: status {status} from the server" in found["summary"]
    assert {row["language"] for row in read_judged(tmp_path / "out" / "judged.jsonl", DIMENSIONS)} == {"ha"}
    assert caplog.text.count("is left out, as the server refused it with status") == 8
    assert judge(settings)["judged"] == 8
    assert len(server.seen) == 16


def test_a_server_that_refuses_all_of_few_prompts(config_file, server):
    server.answers = lambda prompt: (400, "no such model")
    overrides = (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1", "judge.documents=1")
    with pytest.raises(
        BadInput, match=r"refused 2 prompts in a row, the last with status 400 \(.*no such model"
    ):
        judge(load_settings(QualityConfig, config_file, overrides))


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (400, "refused 10 prompts in a row, the last with status 400"),
        (401, r"does not serve \(status 401"),
        (403, r"does not serve \(status 403"),
        (404, r"does not serve \(status 404"),
    ],
)
def test_a_server_that_fails_loses_nothing(config_file, server, monkeypatch, failure, says):
    monkeypatch.setattr(serving, "_FIRST_PAUSE_SECONDS", 0.0)
    answered = []

    def fails_after_five(prompt):
        answered.append(prompt)
        return (200 if len(answered) <= 5 else failure), '{"fluency": 4, "substance": 2}'

    server.answers = fails_after_five
    overrides = (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1", "judge.parallel=1")
    settings = load_settings(QualityConfig, config_file, overrides)
    with pytest.raises(BadInput, match=says):
        judge(settings)
    server.answers = lambda prompt: (200, '{"fluency": 4, "substance": 2}')
    before = len(server.seen)
    assert judge(settings)["judged"] == 16
    assert len(server.seen) - before == 11
    with pytest.raises(BadInput, match="replies to other prompts"):
        judge(load_settings(QualityConfig, config_file, (*overrides, "judge.max_characters=10")))


@pytest.mark.parametrize(
    ("length", "problem"),
    [("1000000", "IncompleteRead"), ("9" * 20, "cannot fit 'int' into an index-sized integer")],
)
def test_an_answer_that_is_shorter_than_it_says(config_file, server, monkeypatch, length, problem):
    monkeypatch.setattr(serving, "_FIRST_PAUSE_SECONDS", 0.0)
    real = server.RequestHandlerClass.end_headers

    def promise_more(handler):
        handler.send_header("Content-Length", length)
        real(handler)

    monkeypatch.setattr(server.RequestHandlerClass, "end_headers", promise_more)
    with pytest.raises(BadInput, match=rf"does not serve \({problem}"):
        judge(
            load_settings(
                QualityConfig, config_file, (f"judge.endpoint=http://127.0.0.1:{server.server_port}/v1",)
            )
        )


def test_separators_of_lines_inside_of_a_text(tmp_path, write_rows):
    rows = [
        {
            "id": "1",
            "language": "en",
            "text": "one\u2028two\x85three",
            "scores": {"fluency": 1.0},
            "score": 1.0,
        }
    ]
    assert read_judged(write_rows(tmp_path / "judged.jsonl", rows), ["fluency"]) == rows


def test_no_server_at_all(config_file, monkeypatch):
    monkeypatch.setattr(serving, "_FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(
        BadInput, match=r"judge\.endpoint: http://127\.0\.0\.1:1/v1/chat/completions does not serve"
    ):
        judge(
            load_settings(
                QualityConfig, config_file, ("judge.endpoint=http://127.0.0.1:1/v1", "judge.retries=0")
            )
        )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no JSON object"),
        ('{"fluency": 1' + "0" * 400 + ', "substance": 3}', "a score outside of the scale"),
        ('{"fluency": 1e400, "substance": 3}', "a score outside of the scale"),
        ('{"fluency": 1' + "0" * 5000 + ', "substance": 3}', "no JSON object"),
        ('{"a":' * 20_000, "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ('{"fluency": 3}', "a dimension without a number"),
        ('{"fluency": 3, "substance": true}', "a dimension without a number"),
        ('{"fluency": 3, "substance": "4"}', "a dimension without a number"),
        ('{"fluency": 3, "substance": NaN}', "a score outside of the scale"),
        ('{"fluency": -1, "substance": 3}', "a score outside of the scale"),
    ],
)
def test_replies_that_are_no_scores(content, problem):
    with pytest.raises(ValueError, match=problem):
        parse_reply(content, JudgeSettings(dimensions=DIMENSIONS))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "Rate {text}"}, "must hold {text} and {dimensions}"),
        ({"prompt": "{text} {dimensions} {tone}"}, "of names in braces only"),
        ({"prompt": "{text} {dimensions} }"}, "write {{ and }} for braces"),
        ({"dimensions": {}}, "dimensions is empty"),
        ({"lowest": 5.0}, "lowest = 5 is not below highest = 5"),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(BadInput) as mistake:
        parse_settings(JudgeSettings, changes, "test")
    assert says in str(mistake.value)


def test_a_file_of_odd_replies_is_read(config_file, tmp_path, capsys):
    assert main(["judge", str(config_file)]) == 0
    odd = [
        '{"custom_id": ["en-0"], "response": {}}',
        '{"custom_id": {"a": 1}}',
        '{"custom_id": "en-1", "response": {"status_code": {"x": 1}}}',
        '{"custom_id": "en-2", "response": {"body": {"choices": {"message": 1}}}}',
        "[" * 100_000,
        '{"custom_id": "en-3", "response": {"status_code": 1' + "0" * 4000 + "}}",
        "5",
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "\n".join(odd)
        + "\n"
        + reply("en-4", '{"fluency": 5, "substance": 1' + "0" * 400 + "}")
        + reply("en-5", '{"fluency": 5, "substance": 1}')
    )
    for _ in range(2):
        capsys.readouterr()
        assert main(["judge", str(config_file), "--replies", str(answers), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["judged"] == 1
        assert found["unreadable"]["a score outside of the scale"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[" * 5000,
        '{"id": "1"}',
        '{"id": "1", "language": "en", "text": "x", "scores": {"fluency": 1' + "0" * 99 + '}, "score": 1}',
        '{"id": "1", "language": "en", "text": "x", "scores": {"fluency": "4"}, "score": 1}',
        '{"id": "1", "language": "xx", "text": "x", "scores": {"fluency": 4}, "score": 1}',
        '{"id": 1, "language": "en", "text": "x", "scores": {"fluency": 4}, "score": 1}',
        '{"id": "1", "language": "en", "text": "x", "scores": [], "score": 1}',
    ],
)
def test_damaged_files_of_judged_documents_are_one_line(tmp_path, line):
    path = tmp_path / "judged.jsonl"
    path.write_text(
        '{"id": "1", "language": "en", "text": "x", "scores": {"fluency": 4}, "score": 4}\n' + line + "\n"
    )
    with pytest.raises(BadInput, match=r"judged\.jsonl:2: "):
        read_judged(path, ["fluency"])
