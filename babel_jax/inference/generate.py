"""The text that a model folder generates after one prompt."""

from typing import Any

import jax.numpy as jnp

from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.inference.generation import generate
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.generation_defaults import stored_repetition_penalty
from babel_jax.model_folders.params import load_params


def generate_text(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> dict[str, Any]:
    """The text that a model folder generates after a prompt.

    Returns {"prompt", "text", "tokens", "summary"}. Raises BadInput for an empty prompt, or one that is not
    UTF-8.
    """
    folder = open_folder(model)
    tokenizer = open_tokenizer(folder.path)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadInput("babel generate: the prompt is not UTF-8; check the terminal's encoding") from None
    ids = tokenizer.encode_prompt(prompt)
    if len(ids) == len(tokenizer.begin_ids):
        raise BadInput("babel generate: the prompt is empty; give some text to continue")
    params = load_params(folder, dtype=jnp.float32)
    new = generate(
        folder.config,
        params,
        [ids],
        max_new_tokens,
        tokenizer.stop_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        repetition_penalty=stored_repetition_penalty(folder.path),
    )[0]
    text = tokenizer.decode_after(ids, [token for token in new if token not in tokenizer.stop_ids])
    return {"prompt": prompt, "text": text, "tokens": new, "summary": prompt + text}
