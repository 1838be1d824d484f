"""What a rehearsal reads: a little text in the languages of a config, a tokenizer of it, and a model with
random weights.
"""

import glob
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers

from babel_jax.config import Config, ModelConfig, Source
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.files import make_folder, write_text
from babel_jax.languages import CODES
from babel_jax.model.decoder import init_params
from babel_jax.model_folders.folder import Format, save_folder
from babel_jax.model_folders.hf_config import write_hf_config

_VOCABULARY = 2048
_ROWS = 16  # of each language, or of each source
_TOGETHER = 4  # rows of the embedded corpus in a text
_TURN = 12  # characters of a message of a conversation
_END, _CHAT = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")


def languages_of(config: Config) -> list[str]:
    """The languages of the sources, or where there are none those that mixtures name, or all; English with
    them.
    """
    named = {source.language for source in config.data.sources}
    if not named:
        for stage in config.stages:
            named |= {*stage.mixture.languages, *stage.mixture.weights, *stage.mixture.curated_languages}
        if not any(stage.mixture.languages or stage.mixture.weights for stage in config.stages):
            named |= set(CODES)
    return [code for code in CODES if code in named] or ["en"]


def write_sources(config: Config, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Sources of the first rows of local files, and of the embedded corpus in place of what is elsewhere or
    not there yet.

    Gives the sources as settings, and the languages whose text is the user's own.
    """
    make_folder(folder)
    corpus, sources, own = embedded_corpus(), [], []
    given = config.data.sources or [None] * len(languages_of(config))
    for number, (source, code) in enumerate(zip(given, _codes(config), strict=True)):
        rows = _first_rows(source, config) if source is not None else []
        if rows:
            own.append(code)
        else:
            rows = (
                _conversations(corpus[code][:_ROWS]) if config.data.conversations else _passages(corpus[code])
            )
        path = folder / f"{number:03}-{code}.jsonl"
        key = "messages" if config.data.conversations else "text"
        lines = [
            {"id": row.id, "kind": row.kind, key: _short(row.text) if key == "messages" else row.text}
            for row in rows
        ]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        settings: dict[str, Any] = {"language": code, "path": str(path), "text_key": key}
        if source is not None:
            settings |= {
                "kind": source.kind,
                "weight": source.weight,
                "off": [str(rule) for rule in source.off],
                "name": source.label,
            }
        sources.append(settings)
    return sources, list(dict.fromkeys(own))


def _codes(config: Config) -> list[str]:
    return [source.language for source in config.data.sources] or languages_of(config)


def _first_rows(source: Source, config: Config) -> list[Row]:
    """The first rows of a source on this machine; none of one that is elsewhere, or not there yet."""
    if source.path is None or "://" in source.path or not glob.glob(source.path):  # noqa: PTH207 - may be absolute
        return []
    return list(itertools.islice(read_rows(source, config.data.bad_rows, RowCounts()), _ROWS))


def _passages(rows: Sequence[Row]) -> list[Row]:
    """Some rows of one kind as one text, so long that rules of cleaning keep it: Chinese says in 90
    characters what others do in 300.
    """
    made = []
    for kind, own in itertools.groupby(rows, key=lambda row: row.kind):
        of_kind = list(own)
        for start in range(0, len(of_kind), _TOGETHER):
            part = of_kind[start : start + _TOGETHER]
            made.append(Row(part[0].id, "\n".join(row.text for row in part), kind))
    return made


def _conversations(rows: Sequence[Row]) -> list[Row]:
    """Each row as a question about its beginning, answered by the rest."""
    made = []
    for row in rows:
        messages = [
            {"role": "user", "content": row.text[:_TURN]},
            {"role": "assistant", "content": row.text[_TURN:] or "."},
        ]
        made.append(Row(row.id, json.dumps(messages, ensure_ascii=False), row.kind))
    return made


def _short(conversation: str) -> list[dict[str, str]]:
    """The messages of a conversation, cut so that an answer is within a small window."""
    return [{**message, "content": message["content"][:_TURN]} for message in json.loads(conversation)]


def write_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """A byte-level BPE tokenizer as Qwen's is, with ChatML's control tokens; gives the
    number of its entries.
    """
    make_folder(folder)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END, *_CHAT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    write_text(folder / "tokenizer_config.json", json.dumps({"eos_token": _END}) + "\n")
    return bpe.get_vocab_size()


def write_model(folder: Path, shape: ModelConfig, tokenizer: Path) -> None:
    """A model folder with random weights, in bfloat16 as published models are."""
    params = jax.jit(init_params, static_argnums=(0, 2))(shape, jax.random.key(0), jax.numpy.bfloat16)
    save_folder(
        folder, Format.HF, params, write_hf_config(shape, None, "bfloat16", eos_token_id=0), tokenizer
    )
