"""What a model makes of text: evaluate, generate."""

import argparse

from babel_jax.commands.parsing import Commands, Result, positive, seed, words


def _evaluate(options: argparse.Namespace) -> Result:
    from babel_jax.recipe import evaluate_folder

    return evaluate_folder(options.model, options.data, options.languages, options.max_bytes)


def _generate(options: argparse.Namespace) -> Result:
    from babel_jax.recipe import generate_text

    return generate_text(options.model, options.prompt, options.max_new_tokens, options.temperature, options.top_p, options.seed)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    evaluate = command("evaluate", _evaluate, "bits per byte by language", "babel evaluate runs/demo/hf --data text/")
    evaluate.add_argument("model", metavar="MODEL")
    evaluate.add_argument("--data", help="folder of xx.jsonl, .gz or .zst text (default: the package's own)")
    evaluate.add_argument("--languages", type=words, metavar="en,sw", help="only these (default: all that have text)")
    evaluate.add_argument("--max-bytes", type=positive, default=200_000, help="of text for each language (default %(default)s)")

    generate = command("generate", _generate, "text from a model", 'babel generate runs/demo/hf "Every morning" --max-new-tokens 40')
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=positive, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=seed, default=0)
