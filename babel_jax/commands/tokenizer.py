"""Tokenizers: what a vocabulary costs, and a larger one."""

import argparse

from babel_jax.commands.models import add_transfer_options, transfer_options
from babel_jax.commands.parsing import Commands, Result, positive, words

# The values of config.Shares, config.Marks and config.RowInit; their import would make the help slow.
_SHARES, _MARKS, _INITS = ("equal", "savings"), ("split", "join"), ("parts", "all", "donor")


def _report(options: argparse.Namespace) -> Result:
    from babel_jax.sending import output
    from babel_jax.vocabulary.report import tokenizer_report

    return tokenizer_report(options.model, options.data, options.languages, output(options.out))


def _extend(options: argparse.Namespace) -> Result:
    from babel_jax.config import VocabularySettings
    from babel_jax.config.file import parse_settings
    from babel_jax.data.sources.embedded import corpus_sources
    from babel_jax.vocabulary.folders import extend_folder
    from babel_jax.vocabulary.report import extension_summary
    from babel_jax.vocabulary.texts import texts_of

    names = (
        "languages", "tokens", "shares", "protect", "least", "marks", "reuse_unused", "init", "donor",
        "multiple",
    )  # fmt: skip
    # Options that were not given keep the defaults of VocabularySettings.
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = parse_settings(VocabularySettings, values, "babel tokenizer extend")
    texts = texts_of(corpus_sources(options.data), settings.languages, settings.protect, settings.max_bytes)
    written = extend_folder(options.source, options.destination, texts, settings, **transfer_options(options))
    return {**written, "summary": extension_summary(written)}


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    _declare_report(command)
    extend = _declare_extend(command)
    _add_token_options(extend)
    _add_row_options(extend)
    add_transfer_options(extend)


def _declare_report(command: Commands) -> None:
    report = command(
        "tokenizer report",
        _report,
        "what a tokenizer costs each language",
        "babel tokenizer report SmolLM2-135M --data text/ --out runs/tokenizer",
    )
    report.add_argument("model", metavar="MODEL", help="a model folder, or a tokenizer file")
    report.add_argument(
        "--data",
        help="folder of xx.jsonl, .gz or .zst text; rows with one id are translations "
        "(default: the package's text)",
    )
    report.add_argument(
        "--languages", type=words, metavar="en,my", help="only these (default: all of the folder)"
    )
    report.add_argument(
        "--out", default="runs/tokenizer", help="folder for page, table, plot and JSON (default %(default)s)"
    )


def _declare_extend(command: Commands) -> argparse.ArgumentParser:
    extend = command(
        "tokenizer extend",
        _extend,
        "a model with new tokens for some languages",
        "babel tokenizer extend SmolLM2-135M larger --data text/ --languages sw,ha --tokens 40",
        resumes=True,
    )
    extend.add_argument("source", metavar="SRC")
    extend.add_argument("destination", metavar="DST")
    extend.add_argument("--data", required=True, help="folder of xx.jsonl, .gz or .zst text to learn from")
    extend.add_argument(
        "--languages", type=words, required=True, metavar="my,ta", help="the languages that get new tokens"
    )
    extend.add_argument("--tokens", type=positive, required=True, metavar="N", help="number of new tokens")
    return extend


def _add_token_options(extend: argparse.ArgumentParser) -> None:
    """Adds the options that decide which tokens are learned, and their ids."""
    extend.add_argument(
        "--shares",
        choices=_SHARES,
        help="equal (default): as many tokens for each language. savings: always the token that saves most",
    )
    extend.add_argument(
        "--protect", type=words, metavar="en", help="languages whose words keep their tokens (default en)"
    )
    extend.add_argument(
        "--marks",
        choices=_MARKS,
        help=(
            "join: combining marks (vowel signs of Burmese, Tamil, Hindi ..) belong to words, as in Qwen3.5; "
            "old text with marks is then split anew (default split)"
        ),
    )
    extend.add_argument(
        "--least", type=positive, metavar="N", help="a new token occurs so often in the text (default 5)"
    )
    extend.add_argument(
        "--reuse-unused",
        action="store_true",
        help="take ids without a token, and of tokens that no text gives",
    )


def _add_row_options(extend: argparse.ArgumentParser) -> None:
    """Adds the options about the rows of new tokens in the embedding."""
    extend.add_argument(
        "--init",
        choices=_INITS,
        help=(
            "first values of new rows. parts (default): the mean of the rows of the old tokens. all: the "
            "mean of all rows. donor: sums of old rows by matching pursuit against --donor"
        ),
    )
    extend.add_argument("--donor", metavar="DIR", help="with --init donor: a model folder of any family")
    extend.add_argument(
        "--multiple",
        type=positive,
        metavar="N",
        help="rows of larger tables are a multiple of N (default 128)",
    )
