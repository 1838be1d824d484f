"""The `babel` command: parses, calls, prints. Exit status 0 on success, 2 on bad input, 130 on Ctrl-C.

What a command needs is imported when it runs, so that `babel --help` answers at once.
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from babel_jax import __version__
from babel_jax.errors import BadInput

Result = dict[str, Any]

_INITS = ("copy", "noise", "zero", "average", "identity", "scaled")  # those of config.Init, whose import costs more than the help


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and gives its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        with _log_shown():
            result = options.run(options)
    except BadInput as error:
        print(f"babel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("babel: interrupted; the same command goes on where this can be resumed", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        print(result.get("summary") or "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """What the project logs goes to standard error, above any progress bar; of other packages only warnings do."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("babel").setLevel(logging.INFO)
    with logging_redirect_tqdm():
        yield


# --- commands ----------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> Result:
    from babel_jax.demo import demo

    return demo(Path(options.out), corpus=options.corpus, base=options.base)


def _convert(options: argparse.Namespace) -> Result:
    from babel_jax.checkpoints.folder import Format, convert

    return convert(options.source, options.destination, Format(options.to) if options.to else None, **_transfer_options(options))


def _expand(options: argparse.Namespace) -> Result:
    from babel_jax.checkpoints.folder import open_folder
    from babel_jax.config import ExpansionSettings
    from babel_jax.config_file import parse_settings
    from babel_jax.expansion.apply import expand_folder
    from babel_jax.expansion.plan import plan_from_settings, save_plan

    names = ("preset", "insert_after", "append", "plan", "init", "noise_mean", "noise_std", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    noise = sorted(given.keys() & {"noise_mean", "noise_std", "seed"})
    if noise and given.get("init") != "noise" and not given.get("plan"):
        raise BadInput(f"babel expand: --{noise[0].replace('_', '-')} has no effect without --init noise; add it or leave the other out")
    if options.auto is not None:
        from babel_jax.study import layers_by_sensitivity

        if given.keys() & {"preset", "insert_after", "append", "plan"}:
            raise BadInput("babel expand: --auto chooses the layers; leave out --preset, --insert-after, --append and --plan")
        given["insert_after"] = layers_by_sensitivity(options.source, options.auto, options.data, options.languages, options.max_bytes)
    settings = parse_settings(ExpansionSettings, given, "babel expand")
    plan = plan_from_settings(settings, open_folder(options.source).config.num_hidden_layers)
    if options.save_plan:
        save_plan(plan, Path(options.save_plan))
    return expand_folder(options.source, options.destination, plan, **_transfer_options(options))


def _transfer_options(options: argparse.Namespace) -> dict[str, Any]:
    return {"memory_limit": int(options.memory_limit * 2**30), "verify": options.verify}


def _prepare(options: argparse.Namespace) -> Result:
    from babel_jax.config_file import load_config
    from babel_jax.data.prepare import prepare

    config = load_config(options.config, tuple(options.set))
    report = prepare(config.data, config.model.folder)
    kinds = [counts for entry in report["languages"].values() for counts in entry["kinds"].values()]
    totals = {name: sum(counts[name] for counts in kinds) for name in ("documents", "bytes", "tokens", "windows")}
    return {"folder": config.data.folder, **totals, **report} if options.json else {"folder": config.data.folder, **totals}


def _train(options: argparse.Namespace) -> Result:
    from babel_jax.config_file import load_config
    from babel_jax.recipe import run_recipe

    return run_recipe(load_config(options.config, tuple(options.set)))


def _evaluate(options: argparse.Namespace) -> Result:
    from babel_jax.recipe import evaluate_folder

    return evaluate_folder(options.model, options.data, options.languages, options.max_bytes)


def _generate(options: argparse.Namespace) -> Result:
    from babel_jax.recipe import generate_text

    return generate_text(options.model, options.prompt, options.max_new_tokens, options.temperature, options.top_p, options.seed)


def _sensitivity(options: argparse.Namespace) -> Result:
    from babel_jax.study import sensitivity_report

    return sensitivity_report(options.model, options.data, options.languages, options.max_bytes, Path(options.out))


def _ablate(options: argparse.Namespace) -> Result:
    from babel_jax.ablation import DEFAULT, ablate

    return ablate(
        options.model,
        options.data,
        Path(options.out),
        variants=options.variants or DEFAULT,
        new_layers=options.new_layers,
        tokens=options.tokens,
        seeds=options.seeds,
        overrides=tuple(options.set),
    )


# --- the command line --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="babel", description="Grow a pretrained decoder and train it on in 25 languages.")
    parser.add_argument("--version", action="version", version=f"babel-jax {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Result], does: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=does, description=does, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--json", action="store_true", help="print the result as one JSON object")
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "the whole recipe on CPU in minutes, on the text in the package", "babel demo --out runs/demo")
    demo.add_argument("--out", default="runs/demo", help="run folder (default %(default)s)")
    demo.add_argument("--corpus", help="folder of xx.jsonl, .gz or .zst text in place of the package's own")
    demo.add_argument("--base", help="model folder to begin with in place of a model trained here")

    convert = command("convert", _convert, "model folder of one format to the other", "babel convert Qwen2.5-7B qwen-orbax --to orbax")
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("destination", metavar="DST")
    convert.add_argument("--to", choices=["hf", "orbax"], help="format of DST (default: the one that SRC is not)")

    expand = command("expand", _expand, "a deeper model folder, of the same format", "babel expand Qwen2.5-7B babel-9b --preset babel-9b")
    expand.add_argument("source", metavar="SRC")
    expand.add_argument("destination", metavar="DST")
    expand.add_argument("--plan", help="plan file: for each layer its source and how it begins")
    expand.add_argument("--preset", help="babel-9b (28 to 34 layers) or babel-83b (80 to 92)")
    expand.add_argument("--insert-after", type=_integers, metavar="14,16", help="copy these layers, each behind itself")
    expand.add_argument("--append", type=_positive, metavar="N", help="repeat the last N layers behind the model")
    expand.add_argument("--init", choices=_INITS, help="how new layers begin (default copy)")
    expand.add_argument("--noise-mean", type=float)
    expand.add_argument("--noise-std", type=float)
    expand.add_argument("--seed", type=_seed)
    expand.add_argument("--auto", type=int, metavar="N", help="copy the N layers that cost least when passed twice (see sensitivity)")
    expand.add_argument("--save-plan", metavar="FILE", help="write the plan, to edit and apply with --plan")

    for between_folders in (convert, expand):
        between_folders.add_argument(
            "--memory-limit", type=_gib, default=4.0, metavar="GIB", help="most memory to use (default %(default)s)"
        )
        between_folders.add_argument("--verify", action="store_true", help="read all back and compare the sha256 of every tensor")

    prepare = command("prepare", _prepare, "raw text to packed datasets", "babel prepare my-run.toml")
    train = command("train", _train, "expand, train the stages, evaluate, export", "babel train my-run.toml --set seed=1")
    for with_config in (prepare, train):
        with_config.add_argument("config", metavar="CONFIG")
        with_config.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, such as seed=1")

    sensitivity = command(
        "sensitivity", _sensitivity, "how much each layer matters", "babel sensitivity Qwen2.5-0.5B --data text/ --out runs/sensitivity"
    )
    sensitivity.add_argument("model", metavar="MODEL")
    sensitivity.add_argument("--out", default="runs/sensitivity", help="folder for table, plot and JSON (default %(default)s)")
    for with_text in (sensitivity, expand):
        with_text.add_argument("--data", help="folder of xx.jsonl, .gz or .zst text to measure on (default: the package's own)")
        with_text.add_argument("--languages", type=_words, metavar="en,sw", help="only these (default: all that have text)")
        with_text.add_argument("--max-bytes", type=_positive, default=4_000, help="of text for each language (default %(default)s)")

    ablate = command(
        "ablate",
        _ablate,
        "positions and initializations of new layers, compared",
        "babel ablate runs/demo/base/hf --tokens 200000 --seeds 0,1",
    )
    ablate.add_argument("model", metavar="MODEL")
    ablate.add_argument("--data", help="folder of xx.jsonl, .gz or .zst text (default: the package's own)")
    ablate.add_argument("--out", default="runs/ablation", help="folder; the same command goes on in it (default %(default)s)")
    ablate.add_argument("--tokens", type=int, default=0, help="budget of recovery for each variant (default: none)")
    ablate.add_argument("--seeds", type=_integers, default=[0], metavar="0,1,2")
    ablate.add_argument("--new-layers", type=_positive, metavar="N", help="how many (default: as Babel-9B, about a fifth of the depth)")
    ablate.add_argument("--variants", type=_words, metavar="among:copy,parent", help="default: the report's table and more")
    ablate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of configs/ablation.toml")

    evaluate = command("evaluate", _evaluate, "bits per byte by language", "babel evaluate runs/demo/hf --data text/")
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("--data", help="folder of xx.jsonl, .gz or .zst text (default: the package's own)")
    evaluate.add_argument("--languages", type=_words, metavar="en,sw", help="only these (default: all that have text)")
    evaluate.add_argument("--max-bytes", type=_positive, default=200_000, help="of text for each language (default %(default)s)")

    generate = command("generate", _generate, "text from a model", 'babel generate runs/demo/hf "Every morning" --max-new-tokens 40')
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=_positive, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=_seed, default=0)
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 14,16") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB, such as 4")
    return number


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
