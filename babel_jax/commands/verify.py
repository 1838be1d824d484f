"""Checks that files are unchanged since they were written: verify."""

import argparse

from babel_jax.commands.parsing import Commands, Result


def _verify(options: argparse.Namespace) -> Result:
    from babel_jax.places import place
    from babel_jax.recipe.integrity import verify_folder

    return verify_folder(place(options.folder))


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    verify = command(
        "verify",
        _verify,
        "compare the files of a folder with the digests beside them",
        "babel verify runs/my-run/run",
    )
    verify.add_argument(
        "folder",
        metavar="FOLDER",
        help="a run folder, prepared data or a model folder that this program wrote",
    )
