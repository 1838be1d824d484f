"""Prompts as a model was trained to read them: chat templates, and text in which control tokens count.

`data/tokenizers.py` reads raw text, where "<|im_start|>" is the letters that it is. Here it is the control token, and a tokenizer that
begins every text with one (Llama, Gemma) does so: what transformers' AutoTokenizer gives.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from babel_jax.data.tokenizers import SENTENCEPIECE_MODEL, TOKENIZER_CONFIG, TOKENIZER_JSON, open_tokenizer
from babel_jax.data.unigram import as_tokenizer_json
from babel_jax.errors import BadInput

CHAT_TEMPLATE = "chat_template.jinja"
Message = Mapping[str, str]


class PromptTokenizer:
    """The tokenizer and chat template of a model folder. Raises BadInput when there is no tokenizer, or it cannot be read."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        eos_of_folder = open_tokenizer(self.folder).eos_id
        path = self.folder / TOKENIZER_JSON
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else self._from_sentencepiece()
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except BadInput:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise BadInput(f"{path}: not a readable tokenizer: {' '.join(str(error).split())[:200]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = self._json(TOKENIZER_CONFIG)
        self.bos_id, eos_id = self._special_id("bos_token"), self._special_id("eos_token")
        self.eos_id = eos_of_folder if eos_id is None else eos_id
        stored = {**self._json("config.json"), **self._json("generation_config.json")}.get("eos_token_id")
        # Any of these ends what the model writes.
        self.end_ids = tuple(sorted({self.eos_id, eos_of_folder, *(stored if isinstance(stored, list) else [])}))
        # What a text without anything before it follows.
        self.first_id = self.eos_id if self.bos_id is None else self.bos_id
        self.chat_template = self._chat_template()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a prompt; `special` lets the tokenizer put those before it that begin every text, if it has any."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation ({"role", "content"} each), with the assistant's turn opened at its end.

        Without `add_generation_prompt` the last message is one to be gone on with: what the template puts behind it is left out.
        Raises BadInput where the folder has no chat template, or it fails.
        """
        if self.chat_template is None:
            raise BadInput(
                f"{self.folder}: no chat template ({CHAT_TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}); add the model's own"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        try:
            rendered = _environment().from_string(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{name: self._special(name) or "" for name in names},
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{self.folder}: the chat template does not take this conversation: {error}") from error
        if add_generation_prompt or not messages:
            return rendered
        last = messages[-1]["content"].strip()
        return rendered[: rendered.rindex(last) + len(last)]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _special_id(self, name: str) -> int | None:
        token = self._special(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _special(self, name: str) -> str | None:
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def _from_sentencepiece(self) -> str:
        path = self.folder / SENTENCEPIECE_MODEL
        return as_tokenizer_json(path.read_bytes(), str(path))

    def _chat_template(self) -> str | None:
        path = self.folder / CHAT_TEMPLATE
        if path.is_file():
            return path.read_text(encoding="utf-8")
        stored = self._config.get("chat_template")
        if isinstance(stored, list):  # several by name; transformers takes the one named default
            return next((entry["template"] for entry in stored if entry["name"] == "default"), None)
        return stored


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as chat templates expect it: what transformers lets them use, in its sandbox."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)
