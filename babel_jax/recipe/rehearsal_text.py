"""The input of a rehearsal: a little text in the languages of a config, a tokenizer trained on it, and a
model with random weights.
"""

import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers

from babel_jax.config import Config, Source
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.expansion.plan import PROVENANCE as EXPANDED
from babel_jax.files import make_folder, write_text
from babel_jax.languages import BABEL, LANGUAGES, in_order
from babel_jax.model.decoder import init_params
from babel_jax.model_folders.folder import Format
from babel_jax.model_folders.hf_config import write_hf_config
from babel_jax.model_folders.params import save_folder
from babel_jax.tpu.shapes import Base
from babel_jax.vocabulary.card import PROVENANCE as EXTENDED
from babel_jax.vocabulary.texts import letters_of

_VOCABULARY = 2048
_ROWS = 16  # of each language, or of each source
_TOGETHER = 4  # rows of the embedded corpus in a text
_LAST_CODE_POINT = 0x20000  # of the letters of living scripts
_TURN = 12  # characters of a message of a conversation
_END, _CHAT = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")


def languages_of(config: Config) -> list[str]:
    """The languages of the sources; without sources, those that mixtures name, or Babel's 25. English if
    there are none.
    """
    named = set(config.order)
    if not config.data.sources and not any(
        stage.mixture.languages or stage.mixture.weights for stage in config.stages
    ):
        named |= set(BABEL)
    return in_order(named) or ["en"]


def write_sources(config: Config, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Writes sources with the first rows of local files. For sources that are elsewhere or do not exist yet,
    the embedded corpus is used.

    Returns the sources as settings, and the languages whose text is the user's.
    """
    make_folder(folder)
    sources: list[dict[str, Any]] = []
    user_languages: list[str] = []
    given = config.data.sources or [None] * len(languages_of(config))
    for number, (source, code) in enumerate(zip(given, _codes(config), strict=True)):
        rows = _first_rows(source, config) if source is not None else []
        # The user's own rows first: they show whether its files can be read.
        if rows:
            user_languages.append(code)
        elif config.data.conversations:
            rows = _conversations(package_rows(code)[:_ROWS])
        else:
            rows = _passages(package_rows(code))

        path = folder / f"{number:03}-{code}.jsonl"
        key = "messages" if config.data.conversations else "text"
        lines = []
        for row in rows:
            content = _short(row.text) if config.data.conversations else row.text
            values = {"id": row.id, "kind": row.kind, key: content}
            lines.append(json.dumps(values, ensure_ascii=False) + "\n")
        write_text(path, "".join(lines))

        settings: dict[str, Any] = {"language": code, "path": str(path), "text_key": key}
        if source is not None:
            settings |= {
                "kind": source.kind,
                "weight": source.weight,
                "off": [str(rule) for rule in source.off],
                "name": source.label,
            }
        sources.append(settings)
    return sources, list(dict.fromkeys(user_languages))


def _codes(config: Config) -> list[str]:
    return [source.language for source in config.data.sources] or languages_of(config)


def _first_rows(source: Source, config: Config) -> list[Row]:
    """The first rows of a source on this machine; empty if it is elsewhere or does not exist yet."""
    if source.path is None or "://" in source.path:
        return []
    # Path.glob refuses absolute patterns.
    if not glob.glob(source.path):  # noqa: PTH207
        return []
    return list(itertools.islice(read_rows(source, config.data.bad_rows, RowCounts()), _ROWS))


def _passages(rows: Sequence[Row]) -> list[Row]:
    """Several rows of one kind as one text, long enough for the rules of cleaning: a text of 300 characters
    in other languages has 90 in Chinese.
    """
    passages = []
    for kind, group in itertools.groupby(rows, key=lambda row: row.kind):
        of_kind = list(group)
        for start in range(0, len(of_kind), _TOGETHER):
            part = of_kind[start : start + _TOGETHER]
            passages.append(Row(part[0].id, "\n".join(row.text for row in part), kind))
    return passages


def _conversations(rows: Sequence[Row]) -> list[Row]:
    """Each row as a conversation: its beginning is the question, the rest is the answer."""
    conversations = []
    for row in rows:
        messages = [
            {"role": "user", "content": row.text[:_TURN]},
            {"role": "assistant", "content": row.text[_TURN:] or "."},
        ]
        conversations.append(Row(row.id, json.dumps(messages, ensure_ascii=False), row.kind))
    return conversations


def _short(conversation: str) -> list[dict[str, str]]:
    """The messages of a conversation, shortened so that an answer fits a small window."""
    return [{**message, "content": message["content"][:_TURN]} for message in json.loads(conversation)]


def write_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """Writes a byte-level BPE tokenizer like Qwen's, with ChatML's control tokens; returns the number of its
    entries.
    """
    make_folder(folder)
    # Byte level: every text of every language can be written, however small the vocabulary.
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


def write_model(folder: Path, base: Base, tokenizer: Path) -> None:
    """Writes a model folder with random weights, in bfloat16 like published models. Its config.json names the
    layers and rows that earlier commands added.
    """
    params = jax.jit(init_params, static_argnums=(0, 2))(base.config, jax.random.key(0), jax.numpy.bfloat16)
    hf_config = write_hf_config(base.config, None, "bfloat16", eos_token_id=0)
    if base.new_layers:
        hf_config[EXPANDED] = {"layers": _layers(base)}
    if base.new_rows:
        rows = {"new_rows": [[base.new_rows[0], base.new_rows[-1] + 1]], "tokens": len(base.new_rows)}
        hf_config[EXTENDED] = rows
    save_folder(folder, Format.HF, params, hf_config, tokenizer)


def _layers(base: Base) -> list[dict[str, Any]]:
    """A plan whose new layers are those of `base`."""
    layers: list[dict[str, Any]] = []
    kept = 0
    for number in range(base.config.num_hidden_layers):
        is_new = number in base.new_layers
        layers.append({"source": max(0, kept - 1), "init": "zero"} if is_new else {"source": kept})
        kept += not is_new
    return layers


def write_vocabulary_text(config: Config, sources: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes xx.jsonl for each language that `[vocabulary]` names: the rows that the rehearsal's sources
    have, and the package's text, so that there is enough for a few new tokens.
    """
    settings = config.vocabulary
    assert settings is not None
    make_folder(folder)
    for code in (*settings.languages, *settings.protect):
        texts = [row.text for row in package_rows(code)]
        for source in sources:
            if source["language"] == code and source["text_key"] == "text":
                texts += [row.text for row in read_rows(Source(**source), config.data.bad_rows, RowCounts())]
        lines = []
        for number, text in enumerate(texts):
            lines.append(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
        write_text(folder / f"{code}.jsonl", "".join(lines))


def package_rows(code: str) -> list[Row]:
    """The package's text in a language. For a language that the package lacks: text of another one in the
    same script, or else with its letters replaced by those of the script.
    """
    corpus = embedded_corpus()
    if code in corpus:
        return corpus[code]
    script = LANGUAGES[code].script
    alike = [other for other in corpus if LANGUAGES[other].script == script and other != "en"]
    if alike:
        return corpus[alike[0]]
    # A fixed exchange of letters: the text means nothing, but has the words and sentences of the other text.
    of_script = letters_of(script)
    letters = [letter for letter in map(chr, range(_LAST_CODE_POINT)) if of_script.match(letter)]
    rows = []
    for row in corpus["sw"]:
        text = "".join(letters[ord(one) % len(letters)] if one.isalpha() else one for one in row.text)
        rows.append(Row(row.id, text, row.kind))
    return rows
