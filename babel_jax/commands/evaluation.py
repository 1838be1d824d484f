"""The quality of a model: evaluate."""

import argparse
from pathlib import Path

from babel_jax.commands.parsing import Commands, Result, count, positive, words
from babel_jax.places import fetched, place
from babel_jax.sending import output


def _evaluate(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import declare_languages
    from babel_jax.evaluation.benchmarks.evaluate import Request, evaluate

    # Before --languages is read: it may name languages that the config alone declares.
    if options.config:
        declare_languages(options.config)
    request = Request(
        tasks=tuple(options.tasks),
        languages=tuple(options.languages) if options.languages else None,
        data=fetched(options.data) if options.data else None,
        few_shot=options.few_shot,
        limit=options.limit,
        max_bytes=options.max_bytes,
        chat=options.chat,
        trained_in=place(options.contamination) if options.contamination else None,
    )
    # Benchmarks take long, so their answers are always stored; bits per byte are not.
    has_benchmarks = request.tasks != ("bits_per_byte",)
    options.resumes = has_benchmarks
    out = None
    if options.out:
        out = output(options.out)
    elif has_benchmarks:
        out = Path("runs/evaluation")
    return evaluate(options.model, options.baseline, request, out)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    evaluate = command(
        "evaluate",
        _evaluate,
        "benchmarks and bits per byte by language",
        "babel evaluate runs/my-run/run/hf --baseline SmolLM2-135M --data text/ --languages sw,ha,en",
        "babel evaluate runs/my-run/run/hf --tasks xcopa --data items/ --languages sw --out runs/table",
        resumes=True,
    )
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="MODEL",
        help="compare with this one; may be repeated",
    )
    _add_item_options(evaluate)
    _add_prompt_options(evaluate)
    evaluate.add_argument(
        "--contamination",
        metavar="RUN",
        help="search for the items in the training windows of this run folder",
    )
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="folder for tables, plots and answers (default for benchmarks: runs/evaluation)",
    )


def _add_item_options(evaluate: argparse.ArgumentParser) -> None:
    """Adds the options that choose tasks, languages and where their items come from."""
    evaluate.add_argument(
        "--tasks",
        type=words,
        default=["bits_per_byte"],
        metavar="xcopa,xnli",
        help=(
            "all (the report's: mmmlu m3exam xcopa mgsm xnli flores200), broad (belebele sib200 global_mmlu "
            "include mmlu_prox), any of them, lm-eval:TASK, bits_per_byte (default bits_per_byte)"
        ),
    )
    evaluate.add_argument(
        "--languages",
        type=words,
        metavar="en,sw",
        help="only these (default: all that --data has; of the hub, Babel's 25)",
    )
    evaluate.add_argument(
        "--config",
        metavar="RUN.toml",
        help="a config whose [[languages]] declare languages that the registry does not have",
    )
    evaluate.add_argument(
        "--data",
        metavar="DIR",
        help=(
            "folder with xx.jsonl text and xcopa/id.test.jsonl ... (default: the package's text, the hub's "
            "items)"
        ),
    )


def _add_prompt_options(evaluate: argparse.ArgumentParser) -> None:
    """Adds the options that decide how many items are asked, and in which prompts."""
    evaluate.add_argument(
        "--few-shot", type=count, metavar="N", help="examples in each prompt (default: as the task says)"
    )
    evaluate.add_argument(
        "--limit", type=positive, metavar="N", help="only the first items of each task and language"
    )
    evaluate.add_argument(
        "--max-bytes", type=positive, default=200_000, help="of text for each language (default %(default)s)"
    )
    evaluate.add_argument("--chat", action="store_true", help="ask with the model's chat template")
