"""Model folders: convert, expand, sensitivity, ablate."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babel_jax.commands.parsing import Commands, Result, add_set, gib, integers, positive, seed, words
from babel_jax.errors import BadInput

if TYPE_CHECKING:
    from babel_jax.expansion.plan import ExpansionPlan

# The values of config.Init; its import would make the help slow.
_INITS = (
    "copy",
    "noise",
    "zero",
    "average",
    "identity",
    "scaled",
)
# The options that say where the new layers are.
_POSITIONS = ("preset", "new_layers", "insert_after", "append", "plan")
_MAX_BYTES = 1_500  # of text for each language, for the sensitivity of layers


def _convert(options: argparse.Namespace) -> Result:
    from babel_jax.model_folders.folder import Format
    from babel_jax.model_folders.transfer import convert

    written = convert(
        options.source,
        options.destination,
        Format(options.to) if options.to else None,
        **transfer_options(options),
    )
    return _compared(options, written, None)


def _expand(options: argparse.Namespace) -> Result:
    from babel_jax.config import ExpansionSettings
    from babel_jax.config.file import parse_settings
    from babel_jax.expansion.folders import expand_folder
    from babel_jax.expansion.plan import plan_from_settings, save_plan
    from babel_jax.model_folders.folder import open_folder

    _check_expand_options(options)
    # Only options that were given: the rest has the defaults of the settings.
    names = (*_POSITIONS, "init", "noise_mean", "noise_std", "seed")
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    # --auto becomes --insert-after, so that a saved plan needs neither the text nor the measurement.
    if options.auto is not None:
        from babel_jax.studies.sensitivity_report import layers_by_sensitivity

        max_bytes = options.max_bytes or _MAX_BYTES
        values["insert_after"] = layers_by_sensitivity(
            options.source, options.auto, options.data, options.languages, max_bytes
        )
    settings = parse_settings(ExpansionSettings, values, "babel expand")
    plan = plan_from_settings(settings, open_folder(options.source).config.num_hidden_layers)
    if options.save_plan:
        save_plan(plan, Path(options.save_plan))
    written = expand_folder(options.source, options.destination, plan, **transfer_options(options))
    return _compared(options, written, plan)


def _check_expand_options(options: argparse.Namespace) -> None:
    """Raises BadInput for an option that has no effect with the others."""

    def first_given(*names: str) -> str | None:
        """The first of these options that is given, as it is written on the command line."""
        for name in names:
            if getattr(options, name) is not None:
                return f"--{name.replace('_', '-')}"
        return None

    # An option without effect is a mistake of the user, who expects one.
    of_noise = first_given("noise_mean", "noise_std", "seed")
    of_text = first_given("data", "languages", "max_bytes")
    of_layer = first_given("init") or of_noise
    if options.plan is not None and of_layer:
        raise BadInput(
            f"babel expand: {of_layer} has no effect with --plan, which says how each layer begins; leave "
            "it out"
        )
    if of_noise and options.init != "noise":
        raise BadInput(
            f"babel expand: {of_noise} has no effect without --init noise; add it or leave the other out"
        )
    if options.auto is not None and first_given(*_POSITIONS):
        raise BadInput(
            "babel expand: --auto chooses the layers; leave out --preset, --new-layers, --insert-after, "
            "--append and --plan"
        )
    if options.auto is None and of_text:
        raise BadInput(
            f"babel expand: {of_text} has no effect without --auto, which measures the layers; add it or "
            "leave the other out"
        )


def _compared(options: argparse.Namespace, written: Result, plan: "ExpansionPlan | None") -> Result:
    """With --verify, also compares the logits, if the model fits into memory."""
    if options.verify:
        from babel_jax.expansion.verification import logits_difference

        limit = int(options.memory_limit * 2**30)
        written["verified"]["logits_difference"] = logits_difference(
            options.source, options.destination, plan, limit
        )
    return written


def transfer_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `transfer`."""
    shared = {"share": not options.no_links, "hard_links": options.hard_links}
    return {"memory_limit": int(options.memory_limit * 2**30), "verify": options.verify, **shared}


def _sensitivity(options: argparse.Namespace) -> Result:
    from babel_jax.sending import output
    from babel_jax.studies.sensitivity_report import sensitivity_report

    return sensitivity_report(
        options.model, options.data, options.languages, options.max_bytes or _MAX_BYTES, output(options.out)
    )


def _ablate(options: argparse.Namespace) -> Result:
    from babel_jax.places import on_disk
    from babel_jax.studies.ablation import DEFAULT, ablate

    return ablate(
        options.model,
        options.data,
        on_disk(options.out, "the folder of an ablation"),
        variants=options.variants or DEFAULT,
        new_layers=options.new_layers,
        tokens=options.tokens,
        seeds=options.seeds,
        overrides=tuple(options.set),
    )


def _push(options: argparse.Namespace) -> Result:
    from babel_jax.model_folders.push import push_folder

    return push_folder(options.folder, options.name, options.private, options.revision)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    convert = _declare_convert(command)
    expand = _declare_expand(command)
    for parser in (convert, expand):
        add_transfer_options(parser)
    sensitivity = _declare_sensitivity(command)
    for parser in (sensitivity, expand):
        _add_text_options(parser)
    _declare_ablate(command)
    _declare_push(command)


def _declare_convert(command: Commands) -> argparse.ArgumentParser:
    parser = command(
        "convert",
        _convert,
        "model folder of one format to the other",
        "babel convert Qwen2.5-7B qwen-orbax --to orbax",
        resumes=True,
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument(
        "--to", choices=["hf", "orbax"], help="format of DST (default: the one that SRC does not have)"
    )
    return parser


def _declare_expand(command: Commands) -> argparse.ArgumentParser:
    parser = command(
        "expand",
        _expand,
        "a deeper model folder, of the same format",
        "babel expand Qwen2.5-7B babel-9b --preset babel-9b",
        "babel expand SmolLM2-135M deeper --new-layers 4 --init identity --verify",
        "babel expand SmolLM2-135M chosen --auto 2 --data text/ --languages sw,en",
        resumes=True,
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("--plan", help="plan file: for each layer its source and how it begins")
    parser.add_argument("--preset", help="babel-9b (28 to 34 layers) or babel-83b (80 to 92)")
    parser.add_argument(
        "--new-layers",
        type=positive,
        metavar="N",
        help="copy every other layer from the middle on, N in all, as the presets do",
    )
    parser.add_argument(
        "--insert-after", type=integers, metavar="14,16", help="copy these layers; a copy follows its layer"
    )
    parser.add_argument(
        "--append", type=positive, metavar="N", help="repeat the last N layers after the model"
    )
    parser.add_argument(
        "--init",
        choices=_INITS,
        help=(
            "how a new layer begins (default copy). copy: its source layer. noise: the copy with noise, as "
            "in the released Babel models. zero: all zeros, so it adds nothing. average: the mean of its "
            "source layer and the next. identity: a copy with output projections of zero, so it adds nothing "
            "at first (LLaMA Pro). scaled: the copy and its source add half each. Of copy, noise and zero, "
            "the Babel report favours copy and small noise. In our trial with SmolLM2-135M, identity "
            "recovered fastest: 1.95 bits per byte after 51,200 tokens, copy 2.03"
        ),
    )
    parser.add_argument(
        "--noise-mean", type=float, metavar="X", help="with --init noise: its mean (default 0.0001)"
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        metavar="X",
        help="with --init noise: its standard deviation (default 0.0001)",
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="with --init noise: its seed (default 0)")
    parser.add_argument(
        "--auto",
        type=int,
        metavar="N",
        help="copy the N layers whose repetition raises the loss least (see sensitivity)",
    )
    parser.add_argument("--save-plan", metavar="FILE", help="write the plan, to edit and apply with --plan")
    return parser


def add_transfer_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `transfer`."""
    parser.add_argument(
        "--memory-limit",
        type=gib,
        default=4.0,
        metavar="GIB",
        help="most memory to use (default %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help=(
            "read everything back; compare every tensor's sha256, the logits if the model fits into "
            "memory, and transformers' model of config.json"
        ),
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--no-links",
        action="store_true",
        help="copy unchanged safetensors files, even if the disk can clone them",
    )
    files.add_argument(
        "--hard-links",
        action="store_true",
        help=(
            "if the disk cannot clone, make unchanged files one with the source's; a program that "
            "writes in place then changes both"
        ),
    )


def _declare_sensitivity(command: Commands) -> argparse.ArgumentParser:
    parser = command(
        "sensitivity",
        _sensitivity,
        "how much each layer matters",
        "babel sensitivity SmolLM2-135M --data text/ --out runs/sensitivity",
        resumes=True,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--out", default="runs/sensitivity", help="folder for table, plot and JSON (default %(default)s)"
    )
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help="folder of xx.jsonl, .gz or .zst text to use (default: the package's text)"
    )
    parser.add_argument(
        "--languages", type=words, metavar="en,sw", help="only these (default: all that have text)"
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        metavar="N",
        help=f"of text for each language (default {_MAX_BYTES})",
    )


def _declare_ablate(command: Commands) -> None:
    parser = command(
        "ablate",
        _ablate,
        "positions and initializations of new layers, compared",
        "babel ablate SmolLM2-135M --data text/ --tokens 50000 --variants among:copy,among:identity,parent",
        resumes=True,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", help="folder of xx.jsonl, .gz or .zst text (default: the package's text)")
    parser.add_argument(
        "--out", default="runs/ablation", help="folder; the same command resumes in it (default %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, help="tokens to train each variant on (default: none)"
    )
    parser.add_argument("--seeds", type=integers, default=[0], metavar="0,1,2")
    parser.add_argument(
        "--new-layers",
        type=positive,
        metavar="N",
        help="number of new layers (default: as in Babel-9B, about a fifth of the depth)",
    )
    parser.add_argument(
        "--variants", type=words, metavar="among:copy,parent", help="default: the report's table and more"
    )
    add_set(parser, "override a setting of configs/ablation.toml")


def _declare_push(command: Commands) -> None:
    parser = command(
        "push",
        _push,
        "a model folder and its card to the Hugging Face hub, as one commit",
        "babel push runs/my-run/run/hf me/my-babel --private",
        resumes=True,
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model folder in Hugging Face's format")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository, made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to write to (default main)")
