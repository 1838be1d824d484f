"""Quality of text: judge, classifier, score."""

import argparse
from pathlib import Path

from babel_jax.commands.parsing import Commands, Result, add_config, words


def _judge(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_settings
    from babel_jax.config.quality import QualityConfig
    from babel_jax.quality.judge import judge

    replies = Path(options.replies) if options.replies else None
    return judge(load_settings(QualityConfig, options.config, tuple(options.set)), replies)


def _classifier(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_settings
    from babel_jax.config.quality import QualityConfig
    from babel_jax.quality.classifier import train_classifier

    return train_classifier(load_settings(QualityConfig, options.config, tuple(options.set)))


def _score(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_settings
    from babel_jax.config.quality import QualityConfig
    from babel_jax.quality.classifier import score_sources

    return score_sources(load_settings(QualityConfig, options.config, tuple(options.set)), options.languages)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    judge = command(
        "judge",
        _judge,
        "scores of a sample of the text by a large model",
        "babel judge quality.toml",
        resumes=True,
    )
    judge.add_argument(
        "--replies", metavar="FILE", help="batch results of the prompts (default: OUT/replies.jsonl)"
    )
    classifier = command(
        "classifier",
        _classifier,
        "a small model that learns the judge's scores",
        "babel classifier quality.toml",
    )
    score = command(
        "score",
        _score,
        "rows with the classifier's score",
        "babel score quality.toml --languages ha",
    )
    score.add_argument(
        "--languages", type=words, metavar="en,sw", help="only these (default: all that the sources have)"
    )
    for with_config in (judge, classifier, score):
        add_config(with_config)
