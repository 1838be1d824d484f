"""What a model makes of text: generate."""

import argparse

from babel_jax.commands.parsing import Commands, Result, positive, seed


def _generate(options: argparse.Namespace) -> Result:
    from babel_jax.recipe import generate_text

    return generate_text(options.model, options.prompt, options.max_new_tokens, options.temperature, options.top_p, options.seed)


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    generate = command("generate", _generate, "text from a model", 'babel generate runs/demo/hf "Every morning" --max-new-tokens 40')
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=positive, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=seed, default=0)
