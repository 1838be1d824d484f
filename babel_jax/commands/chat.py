"""Chat: sft."""

import argparse

from babel_jax.commands.parsing import Commands, Result
from babel_jax.errors import BadInput


def _sft(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.recipe import run_recipe

    config = load_config(options.config, tuple(options.set))
    if not config.data.conversations:
        raise BadInput(f"{options.config}: data.conversations is not true; `babel sft` trains on conversations, `babel train` on text")
    return run_recipe(config)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    sft = command(
        "sft", _sft, "chat fine-tuning: conversations, with the loss on the assistant's words", "babel sft configs/babel-9b-chat.toml"
    )
    sft.add_argument("config", metavar="CONFIG")
    sft.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, such as seed=1")
