"""TPU pods: plan."""

import argparse

from babel_jax.commands.parsing import Commands, Result, positive


def _plan(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.tpu.plan import plan
    from babel_jax.tpu.search import search

    config = load_config(options.config, tuple(options.set))
    return (search if options.search else plan)(config, options.topology, options.slices)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    plan = command(
        "plan",
        _plan,
        "what the train step needs and takes on a TPU pod, compiled without one",
        "babel plan configs/babel-9b.toml --topology v5e:16x16 --set training.gradient_accumulation=4",
    )
    plan.add_argument("config", metavar="CONFIG")
    plan.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:16x16, v6e:8x8, v5p:8x8x8, v4:4x4x4, tpu7x:4x4x4 ...")
    plan.add_argument("--slices", type=positive, default=1, help="how many of them, joined by the data centre's network")
    plan.add_argument("--search", action="store_true", help="try meshes, pieces of the batch and remat policies, and rank those that fit")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, such as data.seq_len=32768")
