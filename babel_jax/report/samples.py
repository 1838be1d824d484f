"""Samples: the trained model continues the beginning of a held-out passage in every language."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from babel_jax.config import ModelConfig
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.prepared import PreparedData
from babel_jax.distributed.agreement import agreed, first_says
from babel_jax.evaluation.suite import continuation, sentences, words
from babel_jax.files import write_text
from babel_jax.inference.generation import generate
from babel_jax.report.record import SAMPLES

_PROMPT_WORDS, _PROMPT_TOKENS, _NEW_TOKENS = 8, 64, 48


def write_samples(
    run_folder: Path,
    config: ModelConfig,
    params: PyTree[Array],
    tokenizer: Tokenizer,
    data: PreparedData,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    name: str = SAMPLES,
) -> None:
    """Writes the file `name`, unless it exists: {language: {"prompt", "text"}}, drawn at temperature 0.7 from
    the likeliest 90%.

    name: SAMPLES or PARENT_SAMPLES. mesh: the mesh of `params`; None for one device. dtype: the dtype of
    activations. All processes of a run must call this.
    """
    if first_says((run_folder / name).is_file()):
        return
    longest, new = sample_tokens(config)

    # The first held-out text of each language begins the prompt.
    encoded = {}
    for code in data.languages:
        for row in data.heldout(code)[:1]:
            if prompt := beginning(row.text, code):
                encoded[code] = [*tokenizer.begin_ids, *tokenizer.encode(prompt)][:longest]
    # One batch for all languages, so one program.
    written = generate(
        config,
        params,
        list(encoded.values()),
        new,
        tokenizer.stop_ids,
        temperature=0.7,
        top_p=0.9,
        compute_dtype=dtype,
        mesh=mesh,
    )

    # The prompt is decoded from its tokens: it may be cut to the model's length.
    samples = {}
    for (code, ids), new_ids in zip(encoded.items(), written, strict=True):
        samples[code] = {"prompt": tokenizer.decode(ids), "text": continuation(tokenizer, ids, new_ids)}

    # One process writes; all processes learn of its error.
    with agreed():
        if jax.process_index() == 0:
            write_text(run_folder / name, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")


def sample_tokens(config: ModelConfig) -> tuple[int, int]:
    """The most tokens of a prompt, and the most new tokens after it."""
    new = min(_NEW_TOKENS, config.max_position_embeddings // 2)
    return min(_PROMPT_TOKENS, config.max_position_embeddings - new), new


def beginning(text: str, language: str) -> str:
    """The first words of a passage, at most its first sentence."""
    first = sentences(text, language)[0] if text.strip() else ""
    spans = words(first, language)
    return first[: spans[min(_PROMPT_WORDS, len(spans)) - 1][1]] if spans else ""
