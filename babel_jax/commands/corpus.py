"""The corpus: catalogue, mixture, statistics."""

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


def _catalogue(options: argparse.Namespace) -> Result:
    from babel_jax.studies.catalogue import catalogue_table, check_catalogue

    if options.action is None:
        return catalogue_table()
    return check_catalogue(options.names)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    catalogue = command(
        "catalogue",
        _catalogue,
        "known corpora; with check: what the hub has of them and of the benchmarks today",
        "babel catalogue",
        "babel catalogue check fineweb-2 --json",
    )
    catalogue.add_argument(
        "action",
        nargs="?",
        choices=["check"],
        help="compare with the hub: exit status 1 if a column, a name or a gate has changed",
    )
    catalogue.add_argument("names", nargs="*", metavar="NAME", help="corpora or benchmarks (default: all)")

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
