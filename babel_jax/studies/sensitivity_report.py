"""The study of one model's depth: the layers that matter, and so the layers that are best copied."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from babel_jax.data.sources.embedded import read_texts
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.files import make_folder, write_text
from babel_jax.model_folders.folder import model_name, open_folder
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.streaming import files_now, fingerprint
from babel_jax.model_folders.tokenizer_files import check_vocabulary
from babel_jax.run_files import KnownLayers, read_as
from babel_jax.studies.packed_text import EncodedText, encode
from babel_jax.studies.sensitivity import (
    LayerEffect,
    Sensitivity,
    layers_to_double,
    plot_sensitivity,
    sensitivity,
    sensitivity_table,
)
from babel_jax.studies.sensitivity_page import sensitivity_page
from babel_jax.training.mesh import mesh_for, param_shardings

log = logging.getLogger("babel")

LAYERS = "layers.json"  # the effects that are known
_SEQ_LEN = 256  # short windows leave little padding


def measure_sensitivity(
    model: str, data: str | None, languages: list[str] | None, max_bytes: int, out: Path | None = None
) -> Sensitivity:
    """The sensitivity of a model folder's layers on a folder of text, or on the package's text. The
    effects of layers are kept in the folder `out`, and a stopped study resumes after them.
    """
    folder = open_folder(model)
    tokenizer = open_tokenizer(folder.path)
    check_vocabulary(folder.path, folder.config.vocab_size)
    seq_len = min(_SEQ_LEN, folder.config.max_position_embeddings)
    documents = read_texts(data, languages)
    texts = encode(tokenizer, documents, seq_len=seq_len, batch_size=1, max_bytes=max_bytes)
    # A language without a byte to measure is left out.
    texts = {language: text for language, text in texts.items() if text.bytes}
    if not texts:
        raise BadInput(f"{data}: no text of two tokens or more")
    mesh = mesh_for(folder.config)
    params = load_params(folder, dtype=jnp.float32, shardings=param_shardings(folder.config, mesh))
    if out is None:
        return sensitivity(folder.config, params, texts, mesh)

    # Effects with another model or text do not count: the mark identifies the model and the text.
    path, mark = out / LAYERS, fingerprint(model=files_now(folder.path), text=_digest(texts))
    kept: dict[str, dict[str, Any]] = {}
    if path.is_file() and (before := read_as(path, KnownLayers))["mark"] == mark:
        kept = before["layers"]
        log.info("sensitivity: %d of %d layers are known", len(kept), folder.config.num_hidden_layers)

    # After each layer: a pass over a large model may take minutes.
    def keep(layer: int, effect: LayerEffect) -> None:
        kept[str(layer)] = effect._asdict()
        write_text(path, json.dumps({"mark": mark, "layers": kept}, indent=2) + "\n")

    known = {}
    for layer, values in kept.items():
        known[int(layer)] = LayerEffect(values["cosine"], values["removed"], values["doubled"])
    return sensitivity(folder.config, params, texts, mesh, known=known, found=keep)


def _digest(texts: dict[str, EncodedText]) -> str:
    hashed = hashlib.sha256()
    for language, text in texts.items():
        hashed.update(language.encode())
        for batch in text.batches:
            for column in batch:
                hashed.update(np.ascontiguousarray(column).data)
    return hashed.hexdigest()


def sensitivity_report(
    model: str, data: str | None, languages: list[str] | None, max_bytes: int, out: Path
) -> dict[str, Any]:
    """Computes the sensitivity and writes sensitivity.md, .json, .png and .html into the folder `out`; a
    stopped study resumes there.
    """
    make_folder(out)
    measures = measure_sensitivity(model, data, languages, max_bytes, out)
    means = []
    for group, mean in class_means(measures.model).items():
        if mean is not None:
            means.append(f"{group} {mean:.3f}")
    text = "\n".join(
        [
            f"# Sensitivity of the layers of {model_name(Path(model))}",
            "",
            "Cosine similarity of the residual stream before and after each layer, and the change of bits "
            "per byte with the layer removed or applied twice. Bits per byte of the whole model: "
            f"{', '.join(means)}.",
            "",
            sensitivity_table(measures),
            "",
            f"Page: {out / 'sensitivity.html'}. Plot: {out / 'sensitivity.png'}",
        ]
    )
    plot_sensitivity(out / "sensitivity.png", measures)
    write_text(out / "sensitivity.html", sensitivity_page(model_name(Path(model)), measures))
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
