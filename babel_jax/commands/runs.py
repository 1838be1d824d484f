"""Runs: demo, init, prepare, train, sft."""

import argparse
import sys
from typing import TYPE_CHECKING

from babel_jax.commands.parsing import Commands, Result, add_config, positive, steps, words
from babel_jax.errors import BadInput

if TYPE_CHECKING:
    from babel_jax.config import Config


def _demo(options: argparse.Namespace) -> Result:
    from babel_jax.places import on_disk
    from babel_jax.recipe.demo import demo

    out = on_disk(options.out, "the demo's folder")
    return demo(out, corpus=options.corpus, base=options.base, extend=options.extend)


def _init(options: argparse.Namespace) -> Result:
    from babel_jax.places import on_disk
    from babel_jax.recipe.first_config import Device, first_config

    _ask(options)
    return first_config(
        on_disk(options.out, "a config"),
        options.model,
        options.data,
        options.languages or (),
        options.new_layers,
        Device(options.device),
        options.tokens,
    )


# The options that `babel init` needs, with the question to ask if one is missing.
_QUESTIONS = {
    "model": "model folder to begin with (a Hugging Face folder)",
    "data": "folder of text, with a file for each language (such as sw.jsonl)",
}


def _ask(options: argparse.Namespace) -> None:
    """Asks for missing options on a terminal. Without a terminal, raises BadInput."""
    # The optional ones are asked for too if anything is missing: then a person is at the terminal.
    missing = [name for name in _QUESTIONS if getattr(options, name) is None]
    if missing and not sys.stdin.isatty():
        flags = " and ".join(f"--{name}" for name in missing)
        raise BadInput(f"babel init: give {flags} (it asks for them on a terminal)")
    # An empty answer is asked for again: these options have no default.
    for name in missing:
        answer = ""
        while not answer:
            answer = _answer(f"{_QUESTIONS[name]}: ", f"give --{name}")
        setattr(options, name, answer)
    if missing and options.languages is None:
        options.languages = words(
            _answer("languages, such as sw,ha,en (Enter: all of the folder): ", "give --languages")
        )
    if missing and options.new_layers is None:
        answer = _answer("new layers (Enter: 6 for every 28): ", "give --new-layers")
        try:
            options.new_layers = positive(answer) if answer else None
        except argparse.ArgumentTypeError as problem:
            raise BadInput(f"babel init: new layers: {problem}") from None


def _answer(question: str, instead: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        raise BadInput(f"babel init: no answer; {instead}") from None
    except UnicodeDecodeError:
        raise BadInput(f"babel init: the answer is no text in UTF-8; {instead}") from None


def _prepare(options: argparse.Namespace) -> Result:
    from babel_jax.data.windows.prepare import prepare
    from babel_jax.distributed.signals import preempted
    from babel_jax.recipe.vocabulary import tokenizer_files

    config = _config(options)
    with preempted():
        report = prepare(config.data, tokenizer_files(config), recheck=options.recheck)

    # Sums over languages, for the terminal; --json also has the whole report.
    kinds, sources = [], []
    entries = report["languages"].values()
    for entry in entries:
        kinds += entry["kinds"].values()
        sources += entry.get("cleaning", {}).values()
    totals = {}
    for name in ("documents", "bytes", "tokens", "windows"):
        totals[name] = sum(counts[name] for counts in kinds)
    if sources:
        dropped_by_source = [sum(source["dropped"].values()) for source in sources]
        totals["dropped"] = sum(dropped_by_source)
    for name in ("rows", "bad", "empty", "duplicates", "overlaps", "heldout_documents"):
        totals[name] = sum(entry[name] for entry in entries)
    result = {"folder": config.data.folder, **totals}
    return result | report if options.json else result


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

    # First of all: JAX cannot join other processes after it has been used.
    cluster.join()
    with preempted_by_sigterm():
        return run_recipe(config, profile=profile)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    _declare_demo(command)
    _declare_init(command)
    _declare_commands_of_configs(command)


def _declare_demo(command: Commands) -> None:
    demo = command(
        "demo",
        _demo,
        "the whole recipe on CPU in minutes, on the text in the package",
        "babel demo --out runs/demo",
        resumes=True,
    )
    demo.add_argument("--out", default="runs/demo", help="run folder (default %(default)s)")
    demo.add_argument("--corpus", help="folder of xx.jsonl, .gz or .zst text (default: the package's text)")
    demo.add_argument(
        "--extend", action="store_true", help="Burmese, Tamil and Bengali get new tokens before new layers"
    )
    demo.add_argument("--base", help="model folder to begin with (default: a model is trained first)")


def _declare_init(command: Commands) -> None:
    init = command(
        "init",
        _init,
        "a first config for your model, text and languages",
        "babel init --model SmolLM2-135M --data text/ --languages sw,ha,en --new-layers 4",
    )
    init.add_argument("--model", metavar="MODEL", help="model folder to begin with")
    init.add_argument("--data", metavar="DIR", help="folder of xx.jsonl, .gz or .zst text")
    init.add_argument("--languages", type=words, metavar="sw,ha,en", help="default: all that DIR has")
    init.add_argument("--new-layers", type=positive, metavar="N", help="default: 6 for every 28 layers")
    init.add_argument("--device", choices=["cpu", "gpu", "tpu"], default="cpu", help="default %(default)s")
    init.add_argument("--tokens", type=positive, metavar="N", help="budget of both stages together")
    init.add_argument("--out", default="my-run.toml", help="file to write (default %(default)s)")


def _declare_commands_of_configs(command: Commands) -> None:
    """Adds the commands that take a config file: prepare, train and sft."""
    prepare = command(
        "prepare", _prepare, "raw text to packed datasets", "babel prepare my-run.toml", resumes=True
    )
    train = command(
        "train",
        _train,
        "expand, train the stages, evaluate, export",
        "babel train my-run.toml --set seed=1",
        resumes=True,
    )
    sft = command(
        "sft",
        _sft,
        "chat fine-tuning: conversations, with the loss on the assistant's tokens",
        "babel sft my-chat.toml",
        resumes=True,
    )
    prepare.add_argument(
        "--recheck",
        action="store_true",
        help="read all text again and compare digests, even if sizes and times are unchanged",
    )
    for trains in (train, sft):
        trains.add_argument(
            "--profile",
            type=steps,
            metavar="FROM:TO",
            help="trace these steps, such as 10:13, for TensorBoard's profiler",
        )
    for with_config in (prepare, train, sft):
        add_config(with_config)
