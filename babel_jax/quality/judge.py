"""Scores of a sample of documents by a judge: prompts are written, replies are read from files or from an
OpenAI-compatible server.

    prompts.jsonl  requests in the form of OpenAI's batch files, which other programs (vLLM's run_batch) read
    replies.jsonl  answers in the form of batch results; answers of a server are appended one by one, so that
                   a stopped command resumes
    judged.jsonl   {"id", "language", "text", "scores": {dimension: number}, "score": their mean} of each
                   reply that can be read
"""

import concurrent.futures
import heapq
import itertools
import json
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from babel_jax.config.quality import JudgeSettings, QualityConfig
from babel_jax.data.sources.rows import Row, rows_of_all
from babel_jax.disk_errors import explain_os_errors
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput, one_line
from babel_jax.files import make_folder, open_to_append, read_bytes, read_lines, write_text
from babel_jax.json_text import parse_json
from babel_jax.languages import LANGUAGES, in_order
from babel_jax.lease import alone_in
from babel_jax.places import on_disk
from babel_jax.progress import Work
from babel_jax.quality.server import Server

log = logging.getLogger("babel")

PROMPTS, REPLIES, JUDGED = "prompts.jsonl", "replies.jsonl", "judged.jsonl"
_REFUSED_IN_A_ROW = 10
_MOST_REPLY_CHARACTERS = 100_000  # searched for scores
_HIGHEST = 1e30  # score; float32 can hold it
_MOST_OBJECTS = 1_000  # JSON objects of a reply that are tried


class Judged(TypedDict):
    """A document with the judge's scores."""

    id: str
    language: str
    text: str
    scores: dict[str, float]
    score: float


def judge(config: QualityConfig, replies: Path | None = None) -> dict[str, Any]:
    """Does all possible steps: writes the prompts, asks the server if one is configured, and reads the
    replies.

    replies: a file with answers from elsewhere, instead of OUT/replies.jsonl. Returns {"out", "prompts",
    "replies", "judged", "unreadable": {reason: count}, "languages": {code: {"documents", "mean"}},
    "summary"}. A prompt that the server refuses is left out with a warning. Raises BadInput for sources
    without text, a server that refuses all prompts or many in a row, and a folder with a sample of other
    text.
    """
    out = on_disk(config.out, "out")
    make_folder(out)
    with alone_in(out):
        sample = dict(_sample(config))
        # The sample decides the names of the requests, by which replies are found again.
        requests = {name: _request(config.judge, *document) for name, document in sample.items()}
        _write_prompts(out / PROMPTS, requests)
        if config.judge.endpoint is not None:
            _ask(config.judge, requests, out / REPLIES)
        return _read(config, sample, replies or out / REPLIES)


def parse_reply(content: str, settings: JudgeSettings) -> dict[str, float]:
    """The scores in a reply: its first JSON object with a number on the scale for each dimension.

    Raises ValueError with the reason if there is none.
    """
    problem = "no JSON object"
    content = content[:_MOST_REPLY_CHARACTERS]
    # Judges write words around the object, or several objects: each opening brace is tried.
    starts = (start for start, letter in enumerate(content) if letter == "{")
    for start in itertools.islice(starts, _MOST_OBJECTS):
        try:
            values, _ = json.JSONDecoder().raw_decode(content, start)
        except (ValueError, RecursionError):
            continue
        scores = {name: values.get(name) for name in settings.dimensions}
        if not all(map(_is_number, scores.values())):
            problem = "a dimension without a number"
        elif not all(settings.lowest <= value <= settings.highest for value in scores.values()):
            problem = "a score outside of the scale"
        else:
            # Converted only now: an integer of 400 digits is too large for a float.
            return {name: float(value) for name, value in scores.items()}
    raise ValueError(problem)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_judged(path: Path, dimensions: Iterable[str]) -> list[Judged]:
    """The judged documents of a file.

    Raises BadInput if the file is missing or was made for other dimensions.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no judged documents; run `babel judge` first")
    judged: list[Judged] = []
    for number, line in enumerate(read_lines(path), 1):
        judged.append(_document(parse_json(line, f"{path}:{number}"), f"{path}:{number}"))
    if not judged:
        raise BadInput(f"{path}: no document was judged; look at the replies beside it")
    # The classifier learns a column for each dimension, so the dimensions must be the same.
    if set(judged[0]["scores"]) != set(dimensions):
        raise BadInput(
            f"{path}: judged on {', '.join(judged[0]['scores'])}, not on judge.dimensions; run `babel "
            "judge` again"
        )
    return judged


def _document(value: Any, location: str) -> Judged:
    if not _is_judged(value):
        raise BadInput(
            f"{location}: no judged document with its scores; remove the file and run `babel judge` again"
        )
    result: Judged = value
    return result


def _is_judged(value: Any) -> bool:
    """True for an object with texts of the names of `Judged`, and with scores that are numbers."""
    if not isinstance(value, dict) or not isinstance(value.get("scores"), dict):
        return False
    for number in (*value["scores"].values(), value.get("score")):
        if not _is_number(number) or not -_HIGHEST <= number <= _HIGHEST:
            return False
    are_texts = all(isinstance(value.get(name), str) for name in ("id", "language", "text"))
    return are_texts and value["language"] in LANGUAGES


def _sample(config: QualityConfig) -> Iterator[tuple[str, tuple[str, Row]]]:
    """For each language, the documents whose ids draw the lowest numbers: pairs of a name for the request and
    (language, row).
    """
    for code in in_order(source.language for source in config.sources):
        sources = [source for source in config.sources if source.language == code]
        rows = rows_of_all(sources, config.bad_rows)
        progress = Work(f"sampling {code}", rows, unit="rows")
        chosen = heapq.nsmallest(config.judge.documents, progress, key=_draw)
        if not chosen:
            raise BadInput(f"sources: no text in {code}")
        for number, row in enumerate(chosen):
            yield f"{code}-{number}", (code, row)


def _draw(row: Row) -> tuple[float, str]:
    return unit_draw(Purpose.JUDGE_SAMPLE, row.id), row.id


def _request(settings: JudgeSettings, language: str, row: Row) -> dict[str, Any]:
    prompt = settings.prompt.format(
        language=LANGUAGES[language].name,
        dimensions="\n".join(f"- {name}: {question}" for name, question in settings.dimensions.items()),
        names=", ".join(settings.dimensions),
        lowest=f"{settings.lowest:g}",
        highest=f"{settings.highest:g}",
        text=row.text[: settings.max_characters],
    )
    return {"model": settings.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0}


def _write_prompts(path: Path, requests: dict[str, dict[str, Any]]) -> None:
    lines = []
    for name, body in requests.items():
        request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(request, ensure_ascii=False) + "\n")
    text = "".join(lines)
    # Names of requests are numbers of the sample: old replies would go to other documents.
    if path.exists() and path.with_name(REPLIES).exists() and not _has_content(path, text.encode()):
        raise BadInput(
            f"{path}: there are replies to other prompts in this folder; give another out, or remove "
            f"{REPLIES}"
        )
    write_text(path, text)


def _has_content(path: Path, data: bytes) -> bool:
    return path.stat().st_size == len(data) and read_bytes(path, most_bytes=len(data)) == data


def _ask(settings: JudgeSettings, requests: dict[str, dict[str, Any]], path: Path) -> None:
    """Appends the missing answers to the file of replies. A refusal is appended only when an answer follows,
    or at the end. If many refusals in a row stop the command, their prompts are asked again the next time.
    """
    server = Server(settings)
    # A prompt that was answered, or refused for good, is not asked again.
    answered = {name for name, _, _ in _replies(path)} if path.exists() else set()
    waiting = [name for name in requests if name not in answered]
    most = min(_REFUSED_IN_A_ROW, len(requests))
    refused: list[str] = []  # lines since the last answer
    lock = threading.Lock()
    with (
        explain_os_errors(path),
        open_to_append(path) as file,
        concurrent.futures.ThreadPoolExecutor(settings.parallel) as pool,
    ):

        def write(lines: list[str]) -> None:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()

        def answer(name: str) -> None:
            status, body = server.post(requests[name])
            line = json.dumps({"custom_id": name, "response": {"status_code": status, "body": body}})
            with lock:
                # An answer shows that the server works, so the refusals before it were about their prompts.
                if status == 200:
                    write([*refused, line])
                    refused.clear()
                    return
                refused.append(line)
                if len(refused) >= most:
                    raise BadInput(
                        f"judge.endpoint: {server.url} refused {len(refused)} prompts in a row, the last "
                        f"with status {status} ({body}); look at judge.model and judge.max_characters; "
                        "answers so far are kept, and the same command resumes"
                    )
            log.warning(
                "judge: %s is left out, as the server refused it with status %d (%s)", name, status, body
            )

        # After an error, or Ctrl-C, no further prompt is asked.
        futures = [pool.submit(answer, name) for name in waiting]
        completed = concurrent.futures.as_completed(futures)
        try:
            for done in Work("judge", completed, total=len(futures), unit="documents", keep=True):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        write(refused)


def _replies(path: Path) -> Iterator[tuple[str, str | None, Any]]:
    """For each line: the name of the request, the text of the answer (None if it has none), and its status
    (None if it is not given).

    A line that was cut off is skipped.
    """
    for line in read_lines(path):
        try:
            reply = json.loads(line)
            name = reply["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not isinstance(name, str):
            continue
        response = reply.get("response")
        status = response.get("status_code") if isinstance(response, dict) else None
        try:
            yield name, str(response["body"]["choices"][0]["message"]["content"]), status
        except (KeyError, TypeError, IndexError):
            yield name, None, status


def _read(config: QualityConfig, sample: dict[str, tuple[str, Row]], path: Path) -> dict[str, Any]:
    """Reads the replies, writes judged.jsonl, and returns the result of `judge`."""
    out = on_disk(config.out, "out")
    judged: dict[str, Judged] = {}
    unreadable: dict[str, int] = {}
    answered = list(_replies(path)) if path.exists() else []
    if not answered and path != out / REPLIES:
        raise BadInput(f"{path}: no replies in it; each line is a batch result with custom_id and response")

    # If a prompt has several replies, the last readable one counts.
    for name, content, status in answered:
        language, row = sample.get(name, (None, None))
        try:
            if language is None or row is None:
                raise ValueError("not asked for")
            if content is None and status not in (None, 200):
                raise ValueError(f"status {one_line(status, 40)} from the server")
            scores = parse_reply(content or "", config.judge)
        except ValueError as problem:
            unreadable[str(problem)] = unreadable.get(str(problem), 0) + 1
            continue
        text = row.text[: config.judge.max_characters]
        score = sum(scores.values()) / len(scores)
        judged[name] = {"id": row.id, "language": language, "text": text, "scores": scores, "score": score}

    # The order of the sample, whatever the order of the replies.
    documents = [judged[name] for name in sample if name in judged]
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    write_text(out / JUDGED, "".join(lines))
    languages = {}
    for code in dict.fromkeys(language for language, _ in sample.values()):
        scores_of_code = [document["score"] for document in judged.values() if document["language"] == code]
        mean = sum(scores_of_code) / len(scores_of_code) if scores_of_code else None
        languages[code] = {"documents": len(scores_of_code), "mean": mean}

    missing = len(sample) - len(judged)
    summary = [f"{len(sample)} prompts in {out / PROMPTS}, {len(judged)} judged in {out / JUDGED}"]
    summary += [f"{count} replies left out: {reason}" for reason, count in unreadable.items()]
    # Without a server, somebody else runs the prompts.
    if missing and config.judge.endpoint is None:
        summary.append(
            f"{missing} wait for replies: run the prompts as a batch, and give its results with --replies "
            "FILE"
        )
    return {
        "out": str(out),
        "prompts": len(sample),
        "replies": len(answered),
        "judged": len(judged),
        "unreadable": unreadable,
        "languages": languages,
        "summary": "\n".join(summary),
    }
