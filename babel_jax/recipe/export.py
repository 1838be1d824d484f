"""Exports the trained model as a Hugging Face folder, and checks the logits of that folder."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from babel_jax.config import Config, ModelConfig
from babel_jax.data.tokens.chat_format import open_chat_format, write_chat_files
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.expansion.folders import expand_hf_config
from babel_jax.expansion.plan import ExpansionPlan
from babel_jax.model.decoder import forward
from babel_jax.model.parameters import in_type
from babel_jax.model_folders.folder import Format, ModelFolder, copy_other_files, open_folder, source_name
from babel_jax.model_folders.hf_config import stored_eos_token_ids, write_hf_config
from babel_jax.model_folders.params import load_params, save_folder
from babel_jax.places import place
from babel_jax.report.card import run_card
from babel_jax.report.samples import beginning
from babel_jax.run_files import StageMixture, read_as
from babel_jax.vocabulary.larger import NOT_OF_THE_MODEL


def export_difference(hf: Path, params: PyTree[Array], config: ModelConfig) -> float:
    """The largest difference between the logits of `params` and of the exported folder, read again, on fixed
    tokens.
    """
    reloaded = load_params(
        open_folder(hf), dtype=jnp.float32, shardings=jax.tree.map(lambda leaf: leaf.sharding, params)
    )
    tokens = np.arange(64, dtype=np.int32)[None] * 37 % config.vocab_size
    logits = jax.jit(forward, static_argnums=0)
    return float(jnp.max(jnp.abs(logits(config, params, tokens) - logits(config, reloaded, tokens))))


def _prompt(config: Config) -> str:
    """The first words of a held-out text, for the code in the card; empty without held-out text."""
    prepared = open_prepared(config.data.folder)
    for code in prepared.languages:
        for row in prepared.heldout(code)[:1]:
            if not config.data.conversations:
                return beginning(row.text, code)
    return ""


def export(
    path: Path,
    config: Config,
    model_config: ModelConfig,
    folder: ModelFolder | None,
    plans: Sequence[ExpansionPlan],
    params: PyTree[Array],
    tokenizer: Tokenizer,
    files: Path | None,
) -> None:
    """Writes the trained parameters as a Hugging Face folder, with the files beside the weights and a model
    card.

    folder: the model that the run began with; None for a model from random weights. plans: all expansions
    since then. files: the folder of the tokenizer and the other files, beside the weights.
    """
    # The config.json of the source, with each expansion of this run noted in it.
    base = None
    if folder is not None:
        base = folder.hf_config
        for plan in plans:
            base = expand_hf_config(base, plan, source_name(folder.path))
    stored = stored_eos_token_ids(base or {})
    chat = open_chat_format(tokenizer.path, config.data.chat_template) if config.data.conversations else None
    # The token that ends an assistant's turn comes first, because some readers use only one id.
    chat_eos = list(dict.fromkeys([chat.end_id, *stored, tokenizer.eos_id])) if chat is not None else []
    eos = chat_eos or (None if stored else tokenizer.eos_id)
    hf_config = write_hf_config(
        model_config, base, str(config.export_dtype), eos_token_id=eos, pad_token_id=tokenizer.pad_id
    )
    exported = in_type(params, jnp.dtype(config.export_dtype))
    # For the card: what the model was trained on.
    mixture = place(config.out) / "mixture.json"
    mixtures = read_as(mixture, dict[str, StageMixture]) if mixture.is_file() else {}
    source = folder.path if folder is not None else None
    card = run_card(config, hf_config, source, mixtures, _prompt(config))
    with tempfile.TemporaryDirectory() as scratch:
        # The files beside the weights are put together first, so that the model folder is written in one go.
        beside = Path(scratch)
        if files is not None:
            copy_other_files(files, beside)
        else:
            tokenizer.save(beside)
        for name in NOT_OF_THE_MODEL:
            (beside / name).unlink(missing_ok=True)
        if chat is not None:
            write_chat_files(beside, chat, chat_eos)
        save_folder(path, Format.HF, exported, hf_config, beside, texts=card)
