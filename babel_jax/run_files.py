"""The JSON files of a run folder, read back. For any damage, one line names the file."""

import functools
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from babel_jax.errors import BadInput
from babel_jax.files import open_regular, read_json
from babel_jax.json_text import parse_json

MOST_LINE_BYTES = 16 * 2**20
_MOST_SECONDS = 253_402_300_799.0  # since 1970, at the end of the year 9999: no date is later
_FIRST_READ_BYTES = 2**18  # of the end of a file
RAW = ("checkpoints", "compiled")  # folders that Orbax and JAX themselves write into a bucket


class _Part(BaseModel):
    """A JSON object that needs these keys; it may have others."""

    model_config = ConfigDict(strict=True, extra="allow")


class Score(_Part):
    """A score of a task in a language."""

    score: float
    stderr: float | None = None
    n: int = 0
    bytes: int | None = None


Results = dict[str, dict[str, Score]]  # by task and language


class Point(_Part):
    """evaluation/POINT.json"""

    tasks: Results


PointItems = dict[str, dict[str, list[list[float]]]]  # evaluation/items/POINT.json: by task and language


class Evaluation(Point):
    """evaluation/evaluation.json, as `babel evaluate` writes it."""

    baselines: dict[str, Point] = {}


class Line(_Part):
    """A line of a file by step."""

    step: int


class StepLine(Line):
    """A line of metrics.jsonl."""

    stage: str
    loss: float | None
    total_steps: int | None = None
    seconds: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    gradient_norm: float | None = None
    rate: float | None = None
    loss_by_language: dict[str, float | None] = {}
    tokens_by_language: dict[str, int] = {}
    epochs_by_language: dict[str, float] = {}


class DuringLine(Line):
    """A line of evaluation/during.jsonl."""

    tasks: Results


class Best(_Part):
    """evaluation/best.json"""

    step: int
    bits_per_byte: float
    checkpoint: str


class MixtureRow(_Part):
    """A dataset's part of a stage."""

    language: str
    kind: str
    tokens: int
    share: float
    epochs: float


class StageMixture(_Part):
    """A stage of mixture.json."""

    rows: list[MixtureRow]
    warnings: list[str] = []


class TextOfSteps(_Part):
    """The prepared text that steps have read, from a step on."""

    from_step: int
    fingerprint: str


class TextRead(_Part):
    """data.json"""

    text: list[TextOfSteps]


class Sample(_Part):
    """A language of samples.json."""

    prompt: str
    text: str


class GoodputFile(_Part):
    """goodput.json"""

    seconds: dict[str, Annotated[float, Field(ge=0.0, le=_MOST_SECONDS)]]
    until: Annotated[float, Field(ge=0.0, le=_MOST_SECONDS)] | None = None
    last_step: int = -1


class Summary(_Part):
    """summary.json"""

    out: str
    hf: str
    bits_per_byte: dict[str, dict[str, float]]
    summary: str


class AblationResult(_Part):
    """A variant in the results of `babel ablate`; bits per byte by language."""

    variant: str
    seed: int
    before: dict[str, float]
    after: dict[str, float] = {}


class LayerValues(_Part):
    """A layer in layers.json; values by language."""

    cosine: dict[str, float]
    removed: dict[str, float]
    doubled: dict[str, float]


class KnownLayers(_Part):
    """layers.json of `babel sensitivity`; `mark` is a digest of the model and the text."""

    mark: str
    layers: dict[str, LayerValues]


class TuneLine(_Part):
    """A line of measurements.jsonl of `babel tune`: one visit of a candidate."""

    mark: str
    changes: dict[str, Any]
    visit: int
    step_seconds: list[float]
    compile_seconds: float | None = None
    program_gib: float | None = None
    forecast_seconds: float | None = None
    bound_seconds: float | None = None
    failure: str | None = None


def is_beside_checkpoints(name: str) -> bool:
    """True for the files that a run also has on disk if its folder is in a bucket. `name` is relative to the
    run folder.
    """
    return name.split("/")[0] not in RAW and name != "lease.json" and not name.endswith(".safetensors")


def read_as(path: Path, kind: Any) -> Any:
    """The JSON value of a file, checked to be of a kind: one of these classes, or a dict or list of them.

    Raises FileNotFoundError without a file, and BadInput for a damaged one.
    """
    return _checked(read_json(path), kind, str(path))


def read_lines(path: Path, kind: Any) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, each of a kind; empty without a file. An incomplete last line is left
    out.

    Raises BadInput for any other damaged line, because leaving it out would silently lose a part of a run's
    history.
    """
    values: list[dict[str, Any]] = []
    if not path.is_file():
        return values
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), b""), 1):
            # Only the last line can be cut off, by a kill while it was written.
            if not line.endswith(b"\n"):
                break
            location = f"{path}:{number}"
            values.append(_checked(parse_json(line, location), kind, location))
    return values


def read_last_lines(path: Path, kind: Any, most: int) -> list[dict[str, Any]]:
    """The objects of the last complete lines of a JSON lines file, at most so many. The rest is not read: a
    long run has millions of lines.

    Raises BadInput if one of these lines is damaged.
    """
    if not path.is_file():
        return []
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        # One more line end than lines: the first line may be cut.
        read, ends = 0, 0
        text = b""
        while ends <= most and read < min(size, most * MOST_LINE_BYTES):
            read = min(size, max(_FIRST_READ_BYTES, 4 * read))
            file.seek(size - read)
            text = file.read(read)
            ends = text.count(b"\n")
    lines = text.split(b"\n")[:-1]
    location = f"{path}: one of the last lines"
    return [_checked(parse_json(line, location), kind, location) for line in lines[-most:]]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each kind: to make one takes longer than to check a line."""
    return TypeAdapter(kind)


def _checked(value: Any, kind: Any, location: str) -> Any:
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        # One error is enough for a line; the input is left out, as it may be long.
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BadInput(
            f"{location}: damaged, or of an older version ({key}: {first['msg']}); put back a copy of it, or "
            "remove it"
        ) from None
    return value
