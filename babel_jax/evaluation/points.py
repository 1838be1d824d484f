"""The evaluation at each point of a run, and its files:

    evaluation/POINT.json        {"tasks": {"bits_per_byte": {"en": {"score": 1.02, "stderr": 0.01, "n": 12,
                                 "bytes": 40210}, ...}, "cloze": ...}}
    evaluation/items/POINT.json  {"bits_per_byte": {"en": [[12040.5, 3350], ...]}, ...}: the columns of each
                                 item (see `items.Items`), for intervals of differences between points

The text is the run's held-out text, which no stage trains on.
"""

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig
from babel_jax.data.tokens.chat_format import open_chat_format
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import (
    class_means,
    conversations_to_score,
    longest_window,
    scored_bits,
    text_to_score,
)
from babel_jax.evaluation.items import ACCURACY, BITS, BITS_PER_BYTE, CHRF, Items, Measured, Metric
from babel_jax.evaluation.items import scores_of as scores_with_errors
from babel_jax.evaluation.scoring import score
from babel_jax.evaluation.suite import CHOICE_TASKS, TRANSLATION_TASKS, Results, run_suite
from babel_jax.files import make_folder, write_text
from babel_jax.run_files import Point, PointItems, read_as
from babel_jax.training.mesh import make_mesh

log = logging.getLogger("babel")

LOWER_IS_BETTER = (BITS_PER_BYTE,)
_METRICS = {
    BITS_PER_BYTE: BITS,
    **dict.fromkeys(CHOICE_TASKS, ACCURACY),
    **dict.fromkeys(TRANSLATION_TASKS, CHRF),
}
_ITEMS = "items"  # folder beside the points' files
_DECIMALS = 3  # of the columns in files: a thousandth of a bit


def score_model(
    config: Config, point: str, model_config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer
) -> Measured:
    """The scored items of the held-out text: bits per byte by language, and the offline suite if the config
    asks for it. point: for the log.

    Raises BadInput if there is no held-out text although the config asks for some.
    """
    # Held-out text is text that no stage reads.
    settings, dtype = config.evaluation, jnp.dtype(config.training.compute_dtype)
    prepared = open_prepared(config.data.folder)
    heldout = {code: prepared.heldout(code) for code in prepared.languages}
    texts = {}
    for code, rows in heldout.items():
        texts[code] = [row.text for row in rows]

    # The mesh of training: parameters stay where they are.
    mesh = make_mesh(config.training.mesh)
    longest = longest_window(
        config.data.seq_len, model_config.max_position_embeddings, config.data.conversations
    )
    if config.data.conversations:
        format = open_chat_format(tokenizer.path, config.data.chat_template)
        to_score = conversations_to_score(format, texts, longest, settings.max_bytes)
    else:
        to_score = text_to_score(tokenizer, texts, longest, settings.max_bytes)
    if not to_score.sequences and config.data.heldout_fraction > 0:
        raise BadInput(
            f"{config.data.folder}: too little text to hold any out; give more text, or "
            "data.heldout_fraction = 0"
        )

    # The size of a batch decides time and memory alone.
    scorer = functools.partial(
        score,
        model_config,
        params,
        mesh=mesh,
        batch_tokens=tokens_of_batch(config),
        compute_dtype=dtype,
        what="bits per byte",
    )
    bits = scored_bits(to_score, scorer)
    measured: dict[str, dict[str, list[Items]]] = {BITS_PER_BYTE: {code: [bits[code]] for code in bits}}
    if settings.suite_items and not config.data.conversations:
        items, translate = settings.suite_items, settings.suite_translations
        measured |= run_suite(model_config, params, tokenizer, heldout, items, mesh, dtype, translate)

    _log_means(results_of(measured), point)
    return measured


def _log_means(results: Results, point: str) -> None:
    for task, values in results.items():
        if values:
            means = class_means(scores_of(results, task))
            parts = [f"{group} {mean:.3f}" for group, mean in means.items() if mean is not None]
            log.info("%s, %s: %s", task.replace("_", " "), point, ", ".join(parts))


def results_of(measured: Measured) -> Results:
    """The scores of items."""
    return scores_with_errors(measured)


def tokens_of_batch(config: Config) -> int:
    """The number of tokens that are scored together."""
    return config.evaluation.batch_size * config.data.seq_len


def scores_of(results: Results, task: str) -> dict[str, float]:
    """The score of each language in a task."""
    return {code: value["score"] for code, value in results.get(task, {}).items()}


def point_file(run_folder: Path, point: str) -> Path:
    """The file with the results of a point."""
    return run_folder / "evaluation" / f"{point}.json"


def write_point(run_folder: Path, point: str, measured: Measured) -> None:
    """Writes the files of a point. The file with the results comes last: with it the point is evaluated."""
    # Items first: a point without them could be compared with no other.
    columns: dict[str, dict[str, list[list[float]]]] = {}
    for task, by_language in measured.items():
        columns[task] = {}
        for code, (items,) in by_language.items():
            columns[task][code] = items.columns.round(_DECIMALS).tolist()
    path = _items_file(run_folder, point)
    make_folder(path.parent)
    write_text(path, json.dumps(columns) + "\n")
    write_text(point_file(run_folder, point), json.dumps({"tasks": results_of(measured)}, indent=2) + "\n")


def _items_file(run_folder: Path, point: str) -> Path:
    return run_folder / "evaluation" / _ITEMS / f"{point}.json"


def read_items(run_folder: Path, names: Sequence[str]) -> dict[str, Measured]:
    """The scored items of the points that have been evaluated; a point of an older version has none.

    Raises BadInput for a file with other content.
    """
    by_point: dict[str, Measured] = {}
    for name in names:
        path = _items_file(run_folder, name)
        if not path.is_file():
            continue
        measured: dict[str, dict[str, list[Items]]] = {}
        for task, by_language in read_as(path, PointItems).items():
            if task in _METRICS:
                measured[task] = {}
                for code, columns in by_language.items():
                    measured[task][code] = [_checked(columns, _METRICS[task], f"{path}: {task} {code}")]
        by_point[name] = measured
    return by_point


def _checked(columns: list[list[float]], metric: Metric, location: str) -> Items:
    """The items of a file. Raises BadInput for damaged columns."""
    # A file of a stranger's run folder may have anything in it.
    is_whole = bool(columns) and all(len(row) == metric.columns for row in columns)
    values = np.array(columns, np.float64) if is_whole else np.zeros((1, metric.columns))
    # An answer may have no byte, but then others have: scores are divided by the sum of bytes.
    is_divisible = not metric.has_bytes or (values[:, -1].min() >= 0 and values[:, -1].sum() > 0)
    if not is_whole or not np.isfinite(values).all() or not is_divisible:
        raise BadInput(f"{location}: damaged; put back a copy of the file, or remove it")
    return Items(values, metric)


def read_points(run_folder: Path, names: Sequence[str]) -> dict[str, Results]:
    """The results of the points that have been evaluated, in the order of `names`.

    Raises BadInput for a file with other content.
    """
    results = {}
    for name in names:
        path = point_file(run_folder, name)
        if path.is_file():
            results[name] = read_as(path, Point)["tasks"]
    return results


def point_names(config: Config) -> list[str]:
    """The points of a run, in order."""
    extended = ["extended"] if config.vocabulary is not None else []
    return ["base", *extended, "expanded", *(stage.result for stage in config.stages)]
