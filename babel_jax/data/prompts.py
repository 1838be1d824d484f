"""Prompts as a model was trained to read them: chat templates, and text in which control tokens count.

`data/tokenizers.py` reads raw text, where "<|im_start|>" is the letters that it is. Here it is the control token, and a tokenizer that
begins every text with one (Llama, Gemma) does so: what transformers' AutoTokenizer gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import tokenizers

from babel_jax.data.chat_templates import BEGIN, END, TEMPLATE_FILE, compiled_template, read_object, special_tokens, stored_template
from babel_jax.data.tokenizers import SENTENCEPIECE_MODEL, TOKENIZER_CONFIG, TOKENIZER_JSON, open_tokenizer
from babel_jax.data.unigram import as_tokenizer_json
from babel_jax.errors import BadInput

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
        self.bos_id, eos_id = self._special_id("bos_token"), self._special_id("eos_token")
        self.eos_id = eos_of_folder if eos_id is None else eos_id
        stored = {**read_object(self.folder / "config.json"), **read_object(self.folder / "generation_config.json")}.get("eos_token_id")
        # Any of these ends what the model writes.
        self.end_ids = tuple(sorted({self.eos_id, eos_of_folder, *(stored if isinstance(stored, list) else [])}))
        # What a text without anything before it follows.
        self.first_id = self.eos_id if self.bos_id is None else self.bos_id
        self._template = stored_template(self.folder)

    @property
    def chat_template(self) -> str | None:
        """The folder's chat template as it stands, None where there is none."""
        return None if self._template is None else self._template[0]

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
        if self._template is None:
            raise BadInput(
                f"{self.folder}: no chat template ({TEMPLATE_FILE}, or chat_template in {TOKENIZER_CONFIG}); add the model's own"
            )
        template, where = self._template
        try:
            rendered = compiled_template(template, str(where)).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special_tokens(self.folder)
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadInput(f"{where}: the chat template does not take this conversation: {error}") from error
        rendered = rendered.replace(BEGIN, "").replace(END, "")
        if add_generation_prompt or not messages:
            return rendered
        last = messages[-1]["content"].strip()
        return rendered[: rendered.rindex(last) + len(last)]

    def _special_id(self, name: str) -> int | None:
        token = special_tokens(self.folder).get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _from_sentencepiece(self) -> str:
        path = self.folder / SENTENCEPIECE_MODEL
        return as_tokenizer_json(path.read_bytes(), str(path))
