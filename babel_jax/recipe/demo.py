"""The whole recipe on a CPU in minutes: tokenizer, base model, expansion, two stages, evaluation, export."""

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import BadRows
from babel_jax.config.file import shipped_config
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.errors import one_line
from babel_jax.files import make_folder
from babel_jax.languages import LANGUAGES
from babel_jax.model_folders.folder import open_folder
from babel_jax.new_folders import new_folder
from babel_jax.progress import working
from babel_jax.recipe.recipe import run_recipe
from babel_jax.report.page import PAGE
from babel_jax.report.record import SAMPLES
from babel_jax.run_files import Sample, read_as

log = logging.getLogger("babel")

_TOKENIZER_BYTES = 400_000
_SPOKEN = ("en", "sw", "hi")  # the languages that the demo speaks at its end
_LONGEST_WORDS = 200  # characters
_EXTENDED = ("my", "ta", "bn")  # the languages that get new tokens
_NEW_TOKENS = 100  # for each


def demo(
    out: Path, corpus: str | None = None, base: str | None = None, extend: bool = False
) -> dict[str, Any]:
    """Runs or resumes the recipe in `out`: tokenizer/, data/, base/ (a run) and run/ (the recipe's run);
    returns the result of `run_recipe`.

    corpus: a folder of xx.jsonl text, instead of the package's. base: a model folder, instead of a model
    trained here. extend: some languages get new tokens first, with text prepared anew in data-extended/.
    """
    make_folder(out)
    sources = [
        source.model_dump(mode="json", exclude_none=True)
        for source in corpus_sources(corpus or embedded_folder())
    ]
    languages = {source["language"] for source in sources}
    if base is None:
        log.info("demo, 1 of 3: a tokenizer from the text")
        tokenizer = _tokenizer(out / "tokenizer", corpus)
        settings = {
            "out": str(out / "base"),
            "data": {"folder": str(out / "data"), "tokenizer": str(tokenizer), "sources": sources},
        }
        log.info("demo, 2 of 3: a small base model from nothing, in %d languages", len(languages))
        base = run_recipe(shipped_config("tiny-base.toml", settings, languages=languages))["hf"]
        settings |= {"out": str(out / "run"), "model": {"folder": base}}
        if extend:
            settings |= _larger_vocabulary(out, sources)
        config = shipped_config("tiny.toml", settings, languages=languages)
    else:
        layers = open_folder(base).config.num_hidden_layers
        settings = {
            "out": str(out / "run"),
            "model": {"folder": base},
            # As in Babel-9B: a model of 28 layers gets copies after layers 14, 16 .. 24.
            "expansion": {"insert_after": list(range(layers // 2, layers - 2, 2)) or [layers - 1]},
            "data": {"folder": str(out / "data"), "tokenizer": base, "sources": sources},
        }
        if extend:
            settings |= _larger_vocabulary(out, sources)
        config = shipped_config("tiny-from-base.toml", settings, languages=languages)

    log.info("demo, 3 of 3: more layers, training on in two stages, evaluation, export and report")
    result = run_recipe(config, compare_export=True)
    # The files that people look for are copied to where they asked for the demo.
    for name in ("summary.md", "summary.json", "summary.png", PAGE):
        shutil.copyfile(out / "run" / name, out / name)
    summary = "\n".join([result["summary"], "", *_words_of(out / "run")])
    return {**result, "out": str(out), "report": str(out / PAGE), "summary": summary}


def _larger_vocabulary(out: Path, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that extend the vocabulary, for the languages with the most bytes for a character."""
    present = {source["language"] for source in sources}
    chosen = [code for code in _EXTENDED if code in present] or sorted(present - {"en"})[:1]
    return {
        "vocabulary": {"languages": chosen, "tokens": _NEW_TOKENS * len(chosen), "least": 2},
        "data": {"folder": str(out / "data-extended"), "sources": list(sources)},
    }


def _words_of(run_folder: Path) -> list[str]:
    """What the model says: its continuation of a beginning in a few languages, and how to ask for more."""
    samples = read_as(run_folder / SAMPLES, dict[str, Sample])
    chosen = [code for code in _SPOKEN if code in samples] or list(samples)[:1]
    lines = ["The model continues:"]
    for code in chosen:
        text = one_line(samples[code]["prompt"] + samples[code]["text"], _LONGEST_WORDS)
        lines.append(f"  {LANGUAGES[code].name}: {text}")
    prompt = samples[chosen[0]]["prompt"] if chosen else "Every morning"
    lines.append(f"Ask it yourself: babel generate {run_folder / 'hf'} {shlex.quote(prompt)}")
    return lines


def _tokenizer(folder: Path, corpus: str | None) -> Path:
    """A SentencePiece model of 4,096 pieces, trained on the same amount of text of every language, if it has
    so much.
    """
    if not folder.is_dir():
        texts = []
        for source in corpus_sources(corpus or embedded_folder()):
            # The first rows of each language, so that no language fills the vocabulary.
            remaining_bytes = _TOKENIZER_BYTES // 4
            for row in read_rows(source, BadRows.REFUSE, RowCounts()):
                if remaining_bytes <= 0:
                    break
                remaining_bytes -= len(row.text.encode())
                texts.append(row.text)
        with working("training the tokenizer"), new_folder(folder) as partial:
            train_sentencepiece(texts, 4096, partial / "tokenizer.model")
    return folder
