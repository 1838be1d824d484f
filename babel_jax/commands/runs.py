"""Runs: demo, prepare, train, sft."""

import argparse
from typing import TYPE_CHECKING

from babel_jax.commands.parsing import Commands, Result, steps
from babel_jax.errors import BadInput

if TYPE_CHECKING:
    from babel_jax.config import Config


def _demo(options: argparse.Namespace) -> Result:
    from babel_jax.places import on_disk
    from babel_jax.recipe.demo import demo

    return demo(on_disk(options.out, "the demo's folder"), corpus=options.corpus, base=options.base)


def _prepare(options: argparse.Namespace) -> Result:
    from babel_jax.data.windows.prepare import prepare
    from babel_jax.distributed.signals import preempted

    config = _config(options)
    with preempted():
        report = prepare(config.data, config.model.folder, recheck=options.recheck)
    kinds = [counts for entry in report["languages"].values() for counts in entry["kinds"].values()]
    totals = {
        name: sum(counts[name] for counts in kinds) for name in ("documents", "bytes", "tokens", "windows")
    }
    cleaned = [
        source for entry in report["languages"].values() for source in entry.get("cleaning", {}).values()
    ]
    if cleaned:
        totals["dropped"] = sum(sum(source["dropped"].values()) for source in cleaned)
    totals |= {
        name: sum(entry[name] for entry in report["languages"].values()) for name in ("rows", "bad", "empty")
    }
    totals["duplicates"] = sum(entry["duplicates"] for entry in report["languages"].values())
    return (
        {"folder": config.data.folder, **totals, **report}
        if options.json
        else {"folder": config.data.folder, **totals}
    )


def _train(options: argparse.Namespace) -> Result:
    return _run(_config(options), options.profile)


def _sft(options: argparse.Namespace) -> Result:
    config = _config(options)
    if not config.data.conversations:
        raise BadInput(
            f"{options.config}: data.conversations is not true; `babel sft` trains on conversations, `babel "
            "train` on text"
        )
    return _run(config, options.profile)


def _config(options: argparse.Namespace) -> "Config":
    from babel_jax.config.file import load_config

    return load_config(options.config, tuple(options.set))


def _run(config: "Config", profile: range | None) -> Result:
    from babel_jax.distributed import cluster
    from babel_jax.distributed.stopping import preempted_by_sigterm
    from babel_jax.recipe.recipe import run_recipe

    cluster.join()
    with preempted_by_sigterm():
        return run_recipe(config, profile=profile)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    demo = command(
        "demo",
        _demo,
        "the whole recipe on CPU in minutes, on the text in the package",
        "babel demo --out runs/demo",
    )
    demo.add_argument("--out", default="runs/demo", help="run folder (default %(default)s)")
    demo.add_argument("--corpus", help="folder of xx.jsonl, .gz or .zst text in place of the package's own")
    demo.add_argument("--base", help="model folder to begin with in place of a model trained here")

    prepare = command("prepare", _prepare, "raw text to packed datasets", "babel prepare my-run.toml")
    train = command(
        "train", _train, "expand, train the stages, evaluate, export", "babel train my-run.toml --set seed=1"
    )
    sft = command(
        "sft",
        _sft,
        "chat fine-tuning: conversations, with the loss on the assistant's words",
        "babel sft configs/babel-9b-chat.toml",
    )
    prepare.add_argument(
        "--recheck",
        action="store_true",
        help="read all text again and compare digests, even where sizes and times are the same",
    )
    for trains in (train, sft):
        trains.add_argument(
            "--profile",
            type=steps,
            metavar="FROM:TO",
            help="trace these steps, such as 10:13, for TensorBoard's profiler",
        )
    for with_config in (prepare, train, sft):
        with_config.add_argument("config", metavar="CONFIG")
        with_config.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a setting, such as seed=1",
        )
