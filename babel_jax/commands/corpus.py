"""The corpus: mixture, statistics."""

import argparse

from babel_jax.commands.parsing import Commands, Result, add_config


def _mixture(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.sending import output
    from babel_jax.studies.mixtures import mixture_report

    return mixture_report(load_config(options.config, tuple(options.set)), output(options.out))


def _statistics(options: argparse.Namespace) -> Result:
    from babel_jax.data.windows.statistics import write_statistics

    return write_statistics(options.data)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    mixture = command(
        "mixture",
        _mixture,
        "tokens, shares and epochs of each language and kind in all stages, without training",
        "babel mixture my-run.toml --out runs/mixture",
    )
    add_config(mixture)
    mixture.add_argument(
        "--out", default="runs/mixture", help="folder for table, plot, CSV and JSON (default %(default)s)"
    )

    statistics = command(
        "statistics",
        _statistics,
        "a page of figures and a dataset card of prepared data",
        "babel statistics runs/my-run/data",
    )
    statistics.add_argument(
        "data", metavar="DATA", help="a folder that babel prepare made; both are written into it"
    )
