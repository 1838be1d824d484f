"""Text from a model: generate, chat."""

import argparse
import sys

from babel_jax.commands.parsing import Commands, Result, positive, seed


def _generate(options: argparse.Namespace) -> Result:
    from babel_jax.inference.generate import generate_text

    return generate_text(
        options.model,
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    )


def _chat(options: argparse.Namespace) -> Result:
    from babel_jax.inference.chat import Conversation, talk

    sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    conversation = Conversation(options.model, options.system, options.max_new_tokens, **sampling)
    # Text from a pipe, or a caller that reads JSON, has no one who answers: all of the input is one turn.
    if sys.stdin.isatty() and not options.json:
        return talk(conversation)
    answer = conversation.answer(sys.stdin.read().rstrip("\n"))
    return {**answer, "messages": conversation.messages, "summary": answer["text"]}


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    generate = command(
        "generate",
        _generate,
        "text from a model",
        'babel generate runs/my-run/run/hf "Habari ya asubuhi" --max-new-tokens 40',
    )
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=positive, default=64)

    chat = command(
        "chat",
        _chat,
        "answers from a model: a conversation on the terminal, or one turn from standard input",
        'echo "Habari?" | babel chat runs/my-chat/hf',
    )
    chat.add_argument("model", metavar="MODEL")
    chat.add_argument("--system", metavar="TEXT", help="the system message, before the first turn")
    chat.add_argument("--max-new-tokens", type=positive, default=256)
    for writes in (generate, chat):
        writes.add_argument(
            "--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token"
        )
        writes.add_argument("--top-p", type=float, default=1.0)
        writes.add_argument("--seed", type=seed, default=0)
