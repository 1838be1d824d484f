"""The evaluation at each point of a run, and its file `evaluation/POINT.json`:

    {"tasks": {"bits_per_byte": {"en": {"score": 1.02, "stderr": null, "n": 12}, ...}, "cloze": ...}}

The text is the run's held-out text, which no stage trains on.
"""

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
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
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.scoring import score
from babel_jax.evaluation.suite import Results, run_suite
from babel_jax.files import make_folder, write_text
from babel_jax.run_files import Point, read_as
from babel_jax.training.mesh import make_mesh

log = logging.getLogger("babel")

LOWER_IS_BETTER = (BITS_PER_BYTE,)


def score_model(
    config: Config, point: str, model_config: ModelConfig, params: PyTree[Array], tokenizer: Tokenizer
) -> Results:
    """Bits per byte by language, and the offline suite if the config asks for it, on the held-out text.
    point: for the log.

    Raises BadInput if there is no held-out text although the config asks for some.
    """
    settings, dtype = config.evaluation, jnp.dtype(config.training.compute_dtype)
    prepared = open_prepared(config.data.folder)
    heldout = {code: prepared.heldout(code) for code in prepared.languages}
    texts = {}
    for code, rows in heldout.items():
        texts[code] = [row.text for row in rows]

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

    scorer = functools.partial(
        score,
        model_config,
        params,
        mesh=mesh,
        batch_tokens=tokens_of_batch(config),
        compute_dtype=dtype,
        what="bits per byte",
    )
    bits_per_byte = {}
    for code, items in scored_bits(to_score, scorer).items():
        bits_per_byte[code] = {"score": items.score, "stderr": None, "n": len(items.columns)}
    results: Results = {BITS_PER_BYTE: bits_per_byte}
    if settings.suite_items and not config.data.conversations:
        results |= run_suite(model_config, params, tokenizer, heldout, settings.suite_items, mesh, dtype)

    # The means go to the log.
    for task, values in results.items():
        if values:
            means = class_means(scores_of(results, task))
            parts = [f"{group} {mean:.3f}" for group, mean in means.items() if mean is not None]
            log.info("%s, %s: %s", task.replace("_", " "), point, ", ".join(parts))
    return results


def tokens_of_batch(config: Config) -> int:
    """The number of tokens that are scored together."""
    return config.evaluation.batch_size * config.data.seq_len


def scores_of(results: Results, task: str) -> dict[str, float]:
    """The score of each language in a task."""
    return {code: value["score"] for code, value in results.get(task, {}).items()}


def point_file(run_folder: Path, point: str) -> Path:
    """The file with the results of a point."""
    return run_folder / "evaluation" / f"{point}.json"


def write_point(run_folder: Path, point: str, results: Results) -> None:
    """Writes the file of a point."""
    path = point_file(run_folder, point)
    make_folder(path.parent)
    write_text(path, json.dumps({"tasks": results}, indent=2) + "\n")


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
    return ["base", "expanded", *(stage.result for stage in config.stages)]
