"""Scores of a sample of documents by a judge: prompts out, replies in, by files or through an
OpenAI-compatible server.

prompts.jsonl  requests in the form of OpenAI's batch files, which other servers (vLLM's run_batch) take too
replies.jsonl  the answers, in the form of batch results; from a server they are added one by one, so that a
stopped command goes on judged.jsonl   {"id", "language", "text", "scores": {dimension: number}, "score":
their mean} of each reply that can be read
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

from tqdm import tqdm

from babel_jax.config.quality import JudgeSettings, QualityConfig
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.disk_errors import explain_os_errors
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput, one_line
from babel_jax.files import make_folder, open_to_append, parse_json, read_bytes, read_lines, write_text
from babel_jax.languages import CODES, LANGUAGES
from babel_jax.lease import alone_in
from babel_jax.places import on_disk
from babel_jax.quality.server import Server

log = logging.getLogger("babel")

PROMPTS, REPLIES, JUDGED = "prompts.jsonl", "replies.jsonl", "judged.jsonl"
_REFUSED_IN_A_ROW = 10
_MOST_REPLY_CHARACTERS = 100_000  # that scores are looked for in
_HIGHEST = 1e30  # of a score; float32 holds it
_MOST_OBJECTS = 1_000  # of a reply that may be the scores


class Judged(TypedDict):
    """A document with the judge's scores."""

    id: str
    language: str
    text: str
    scores: dict[str, float]
    score: float


def judge(config: QualityConfig, replies: Path | None = None) -> dict[str, Any]:
    """Does what can be done: writes the prompts, asks the server where one is named, and reads what replies
    there are.

    `replies` is a file of answers from elsewhere, in the place of OUT/replies.jsonl. Returns {"out",
    "prompts", "replies", "judged", "unreadable": {reason: count}, "languages": {code: {"documents", "mean"}},
    "summary"}. A prompt that the server refuses is left out with a warning. Raises BadInput for sources
    without text, a server that refuses all or many in a row, and a folder in which other text was sampled.
    """
    out = on_disk(config.out, "out")
    make_folder(out)
    with alone_in(out):
        sample = dict(_sample(config))
        requests = {name: _request(config.judge, *document) for name, document in sample.items()}
        _write_prompts(out / PROMPTS, requests)
        if config.judge.endpoint is not None:
            _ask(config.judge, requests, out / REPLIES)
        return _read(config, sample, replies or out / REPLIES)


def parse_reply(content: str, settings: JudgeSettings) -> dict[str, float]:
    """The scores in a reply: of its first JSON object that has a number on the scale for each dimension.

    Raises ValueError with the reason where there is none.
    """
    problem = "no JSON object"
    content = content[:_MOST_REPLY_CHARACTERS]
    starts = (start for start, letter in enumerate(content) if letter == "{")
    for start in itertools.islice(starts, _MOST_OBJECTS):
        try:
            found, _ = json.JSONDecoder().raw_decode(content, start)
        except (ValueError, RecursionError):
            continue
        scores = {name: found.get(name) for name in settings.dimensions}
        numbers = {
            name: value
            for name, value in scores.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if len(numbers) < len(scores):
            problem = "a dimension without a number"
        elif not all(settings.lowest <= value <= settings.highest for value in numbers.values()):
            problem = "a score outside of the scale"
        else:
            # Only now: a whole number of 400 digits is no float.
            return {name: float(value) for name, value in numbers.items()}
    raise ValueError(problem)


def read_judged(path: Path, dimensions: Iterable[str]) -> list[Judged]:
    """The judged documents of a file.

    Raises BadInput where it is missing or was made for other dimensions.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no judged documents; run `babel judge` first")
    judged: list[Judged] = []
    # Splitlines() would also split at U+2028 and the like, which texts hold.
    for number, line in enumerate(read_lines(path), 1):
        judged.append(_document(parse_json(line, f"{path}:{number}"), f"{path}:{number}"))
    if not judged:
        raise BadInput(f"{path}: no document was judged; look at the replies beside it")
    if set(judged[0]["scores"]) != set(dimensions):
        raise BadInput(
            f"{path}: judged on {', '.join(judged[0]['scores'])}, not on judge.dimensions; run `babel "
            "judge` again"
        )
    return judged


def _document(value: Any, where: str) -> Judged:
    texts = [value.get(key) for key in ("id", "language", "text")] if isinstance(value, dict) else [None]
    scores = value.get("scores") if isinstance(value, dict) else None
    numbers = [*scores.values(), value.get("score")] if isinstance(scores, dict) else [None]
    whole = all(
        isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= _HIGHEST for one in numbers
    )
    if not whole or not all(isinstance(text, str) for text in texts) or value["language"] not in LANGUAGES:
        raise BadInput(
            f"{where}: no judged document with its scores; remove the file and run `babel judge` again"
        )
    return value


def _sample(config: QualityConfig) -> Iterator[tuple[str, tuple[str, Row]]]:
    """Of each language the documents whose ids draw the lowest numbers: pairs of a name for the request, and
    (language, row).
    """
    for code in CODES:
        sources = [source for source in config.sources if source.language == code]
        rows = (row for source in sources for row in read_rows(source, config.bad_rows, RowCounts()))
        chosen = heapq.nsmallest(
            config.judge.documents, tqdm(rows, f"sample {code}", leave=False, disable=None), key=_place
        )
        if sources and not chosen:
            raise BadInput(f"sources: no text in {code}")
        for number, row in enumerate(chosen):
            yield f"{code}-{number}", (code, row)


def _place(row: Row) -> tuple[float, str]:
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
    text = "".join(
        json.dumps(
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body},
            ensure_ascii=False,
        )
        + "\n"
        for name, body in requests.items()
    )
    if path.exists() and path.with_name(REPLIES).exists() and not _holds(path, text.encode()):
        raise BadInput(
            f"{path}: there are replies to other prompts in this folder; give another out, or remove "
            f"{REPLIES}"
        )
    write_text(path, text)


def _holds(path: Path, data: bytes) -> bool:
    return path.stat().st_size == len(data) and read_bytes(path, most_bytes=len(data)) == data


def _ask(settings: JudgeSettings, requests: dict[str, dict[str, Any]], path: Path) -> None:
    """Adds the answers that are missing to the file of replies. A refusal is added when an answer follows, or
    at the end: if many in a row stop the command, they are asked again."""
    server = Server(settings)
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
                if status == 200:
                    write([*refused, line])
                    refused.clear()
                    return
                refused.append(line)
                if len(refused) >= most:
                    raise BadInput(
                        f"judge.endpoint: {server.url} refused {len(refused)} prompts in a row, the last "
                        f"with status {status} "
                        f"({body}); look at judge.model and judge.max_characters; what was answered is "
                        "kept, and the same command goes on"
                    )
            log.warning(
                "judge: %s is left out, as the server refused it with status %d (%s)", name, status, body
            )

        asked = [pool.submit(answer, name) for name in waiting]
        try:
            for done in tqdm(
                concurrent.futures.as_completed(asked),
                "judge",
                total=len(asked),
                unit=" documents",
                disable=None,
            ):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        write(refused)


def _replies(path: Path) -> Iterator[tuple[str, str | None, Any]]:
    """Of each line a request's name, the text of the answer, None where it has none, and its status, None
    where it is not said.

    A line that was cut off is passed over.
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
    out = on_disk(config.out, "out")
    judged: dict[str, Judged] = {}
    unreadable: dict[str, int] = {}
    answered = list(_replies(path)) if path.exists() else []
    if not answered and path != out / REPLIES:
        raise BadInput(f"{path}: no replies in it; each line is a batch result with custom_id and response")
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
        mean = sum(scores.values()) / len(scores)
        judged[name] = {"id": row.id, "language": language, "text": text, "scores": scores, "score": mean}
    write_text(
        out / JUDGED,
        "".join(json.dumps(judged[name], ensure_ascii=False) + "\n" for name in sample if name in judged),
    )
    languages = {}
    for code in dict.fromkeys(language for language, _ in sample.values()):
        own = [document["score"] for document in judged.values() if document["language"] == code]
        languages[code] = {"documents": len(own), "mean": sum(own) / len(own) if own else None}
    missing = len(sample) - len(judged)
    summary = [f"{len(sample)} prompts in {out / PROMPTS}, {len(judged)} judged in {out / JUDGED}"]
    summary += [f"{count} replies left out: {reason}" for reason, count in unreadable.items()]
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
