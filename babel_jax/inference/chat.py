"""Talking with a model by its chat template."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from babel_jax.data.tokens.chat_format import ChatFormat
from babel_jax.data.tokens.prompts import Message, PromptTokenizer
from babel_jax.errors import BadInput, printable
from babel_jax.inference.generation import generate
from babel_jax.model_folders.folder import load_params, open_folder
from babel_jax.model_folders.generation_defaults import stored_repetition_penalty
from babel_jax.model_folders.tokenizer_files import check_vocabulary


class Conversation:
    """The turns so far, and a model to answer them.

    Raises BadInput for a folder without a tokenizer or chat template.
    """

    def __init__(self, model: str, system: str | None = None, max_new_tokens: int = 256, **sampling: Any):
        """`sampling`: temperature, top_p and seed of `generate`."""
        folder = open_folder(model)
        check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
        prompts = PromptTokenizer(folder.path)
        self._tokenizer = prompts.tokenizer
        self._format = ChatFormat(prompts.tokenizer, prompts.template())
        self._format.prompt([{"role": "user", "content": "?"}])  # before the parameters, which take longer
        self._config, self._params = folder.config, load_params(folder, dtype=jnp.float32)
        self._max_new_tokens = max_new_tokens
        self._sampling = {"repetition_penalty": stored_repetition_penalty(folder.path), **sampling}
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str) -> dict[str, Any]:
        """Takes a turn; gives {"prompt", "text", "tokens"} of the answer. The oldest turns are left out where
        all do not fit the model.

        Raises BadInput where this turn alone does not; the conversation then stands as before it.
        """
        if not text.strip():
            raise BadInput("babel chat: there is nothing to answer; write something")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._prompt(messages)
        tokens = generate(
            self._config,
            self._params,
            [ids],
            self._max_new_tokens,
            self._tokenizer.stop_ids,
            **self._sampling,
        )[0]
        said = self._tokenizer.decode_after(
            ids, [token for token in tokens if token not in self._tokenizer.stop_ids]
        )
        self.messages = [*messages, {"role": "assistant", "content": said}]
        return {"prompt": text, "text": said, "tokens": tokens}

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        room = self._config.max_position_embeddings - self._max_new_tokens
        kept = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        while True:
            ids = self._format.prompt([*kept, *turns])
            if len(ids) <= room or len(turns) == 1:
                return ids
            turns = turns[2:]


def talk(conversation: Conversation, read: Callable[[str], str] = input) -> dict[str, Any]:
    """Turns from the terminal until it ends (Ctrl-D); an answer that is refused leaves the conversation as it
    was.
    """
    while True:
        try:
            text = read("> ")
        except EOFError:
            break
        try:
            print(printable(conversation.answer(text)["text"]))
        except BadInput as error:
            print(error)
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    return {"messages": conversation.messages, "summary": f"\n{turns} turns"}
