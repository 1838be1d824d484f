"""A conversation with a model through its chat template."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from babel_jax.data.tokens.chat_format import ChatFormat
from babel_jax.data.tokens.prompts import Message, PromptTokenizer
from babel_jax.distributed.signals import interruptible
from babel_jax.errors import BadInput, printable
from babel_jax.inference.generation import generate
from babel_jax.model_folders.folder import open_folder
from babel_jax.model_folders.generation_defaults import stored_repetition_penalty
from babel_jax.model_folders.params import load_params
from babel_jax.model_folders.tokenizer_files import check_vocabulary

_HOW_TO_LEAVE = "Ctrl-D leaves the conversation; Ctrl-C drops the answer that is being written."
_LEAVING = "leaving"
_DROPPING = "dropping the answer; again to end at once"


class Conversation:
    """The messages so far, and a model that answers them.

    Raises BadInput for a folder without a tokenizer or chat template.
    """

    def __init__(self, model: str, system: str | None = None, max_new_tokens: int = 256, **sampling: Any):
        """sampling: temperature, top_p and seed of `generate`."""
        folder = open_folder(model)
        check_vocabulary(folder.path, folder.config.vocab_size, needed=True)
        prompts = PromptTokenizer(folder.path)
        self._tokenizer = prompts.tokenizer
        self._format = ChatFormat(prompts.tokenizer, prompts.template())
        # A template that fails is found here, before the parameters are loaded, which takes longer.
        self._format.prompt([{"role": "user", "content": "?"}])
        self._config, self._params = folder.config, load_params(folder, dtype=jnp.float32)
        self._max_new_tokens = max_new_tokens
        self._sampling = {"repetition_penalty": stored_repetition_penalty(folder.path), **sampling}
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str) -> dict[str, Any]:
        """Adds a message of the user; returns {"prompt", "text", "tokens"} of the answer. If the messages do
        not fit the model, the oldest ones are left out.

        Raises BadInput if this message alone does not fit; the conversation is then unchanged.
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

        # The conversation changes only now, so an error before leaves it as it was.
        kept = [token for token in tokens if token not in self._tokenizer.stop_ids]
        answer = self._tokenizer.decode_after(ids, kept)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return {"prompt": text, "text": answer, "tokens": tokens}

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the messages, without the oldest turns that do not fit the model."""
        room = self._config.max_position_embeddings - self._max_new_tokens
        # The system message holds for the whole conversation, so it is never left out.
        kept = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        while True:
            ids = self._format.prompt([*kept, *turns])
            if len(ids) <= room or len(turns) == 1:
                return ids
            # A question leaves with its answer: templates want the user to speak first.
            turns = turns[2:]


def talk(conversation: Conversation, read: Callable[[str], str] = input) -> dict[str, Any]:
    """Turns from the terminal until its input ends (Ctrl-D), or until Ctrl-C at the prompt. An answer that
    fails, or that Ctrl-C stops, leaves the conversation unchanged.
    """
    print(_HOW_TO_LEAVE)
    while True:
        try:
            with interruptible(_LEAVING):
                text = read("> ")
        except (EOFError, KeyboardInterrupt):
            break
        try:
            with interruptible(_DROPPING):
                answer = conversation.answer(text)
            print(printable(answer["text"]))
        except BadInput as error:
            print(error)
        except KeyboardInterrupt:
            print(f"(no answer kept) {_HOW_TO_LEAVE}")
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    return {"messages": conversation.messages, "summary": f"\n{turns} turns"}
