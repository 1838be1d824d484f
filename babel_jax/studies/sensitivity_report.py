"""The study of one model's depth: the layers that matter, and so the layers that are best copied."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from babel_jax.data.sources.embedded import read_texts
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.files import make_folder, write_text
from babel_jax.model_folders.folder import load_params, open_folder
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.studies.packed_text import encode
from babel_jax.studies.sensitivity import (
    Sensitivity,
    layers_to_double,
    plot_sensitivity,
    sensitivity,
    sensitivity_table,
)
from babel_jax.training.mesh import mesh_for, param_shardings


def measure_sensitivity(
    model: str, data: str | None, languages: list[str] | None, max_bytes: int
) -> Sensitivity:
    """The sensitivity of a model folder's layers on a folder of text, or on the package's text."""
    folder = open_folder(model)
    tokenizer = open_tokenizer(folder.path)
    check_vocabulary(folder.path, folder.config.vocab_size)
    seq_len = min(512, folder.config.max_position_embeddings)
    texts = encode(tokenizer, read_texts(data, languages), seq_len=seq_len, batch_size=4, max_bytes=max_bytes)
    texts = {language: text for language, text in texts.items() if text.bytes}
    if not texts:
        raise BadInput(f"{data}: no text of two tokens or more")
    mesh = mesh_for(folder.config)
    params = load_params(folder, dtype=jnp.float32, shardings=param_shardings(folder.config, mesh))
    return sensitivity(folder.config, params, texts, mesh)


def sensitivity_report(
    model: str, data: str | None, languages: list[str] | None, max_bytes: int, out: Path
) -> dict[str, Any]:
    """Computes the sensitivity and writes sensitivity.md, .json and .png into the folder `out`."""
    make_folder(out)
    measures = measure_sensitivity(model, data, languages, max_bytes)
    means = [f"{group} {mean:.3f}" for group, mean in class_means(measures.model).items() if mean is not None]
    text = "\n".join(
        [
            f"# Sensitivity of the layers of {model}",
            "",
            "Cosine similarity of the residual stream before and after each layer, and the change of bits "
            "per byte with the layer removed or applied twice. Bits per byte of the whole model: "
            f"{', '.join(means)}.",
            "",
            sensitivity_table(measures),
            "",
            f"Plot: {out / 'sensitivity.png'}",
        ]
    )
    plot_sensitivity(out / "sensitivity.png", measures)
    write_text(out / "sensitivity.md", text + "\n")
    result = {"model": str(model), "layers": len(measures.cosine), **dataclasses.asdict(measures)}
    write_text(out / "sensitivity.json", json.dumps(result, indent=2) + "\n")
    return {**result, "out": str(out), "summary": text}


def layers_by_sensitivity(
    model: str, count: int, data: str | None, languages: list[str] | None, max_bytes: int
) -> tuple[int, ...]:
    """The layers of a model folder whose repetition raises the loss least.

    Raises BadInput if the model has fewer layers.
    """
    depth = open_folder(model).config.num_hidden_layers
    if not 0 < count <= depth:
        raise BadInput(f"--auto {count}: the model has {depth} layers to choose from; give 1 to {depth}")
    return layers_to_double(measure_sensitivity(model, data, languages, max_bytes), count)
