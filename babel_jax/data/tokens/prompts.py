"""Prompts in the form that a model was trained on: its chat template, and text in which control tokens count.

Raw text differs: there "<|im_start|>" is tokenized as ordinary text (`Tokenizer.encode`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from babel_jax.data.tokens.chat_templates import TEMPLATE_FILE, ChatTemplate, stored_template, without_marks
from babel_jax.data.tokens.special_tokens import TOKENIZER_CONFIG
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput

Message = Mapping[str, str]


class PromptTokenizer:
    """The tokenizer and chat template of a model folder.

    Raises BadInput if there is no tokenizer, or it cannot be read.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.tokenizer = open_tokenizer(self.folder)
        # The eos_token that tokenizer files name. `tokenizer.eos_id` prefers the id of the config.
        named = self.tokenizer.named_tokens.get("eos_token")
        named_id = self.tokenizer.token_id(named) if named else None
        self.bos_id = self.tokenizer.bos_id
        self.eos_id = self.tokenizer.eos_id if named_id is None else named_id
        # Generation ends at any of these.
        self.end_ids = self.tokenizer.stop_ids
        # The token before a text that has no preceding text.
        self.first_id = self.eos_id if self.bos_id is None else self.bos_id
        self._stored = stored_template(self.folder)
        self._template: ChatTemplate | None = None

    @property
    def chat_template(self) -> str | None:
        """The folder's chat template, unchanged; None if the folder has none."""
        return None if self._stored is None else self._stored[0]

    def encode(self, text: str, special: bool | None = True) -> list[int]:
        """The ids of a prompt. `special`: True puts the ids before it that begin every text, if the tokenizer
        has any; False does not; None does so unless the text itself begins with them.
        """
        return self.tokenizer.encode_prompt(text, special)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids."""
        return self.tokenizer.decode(ids, skip_special)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that follow others."""
        return self.tokenizer.decode_after(before, ids)

    def template(self) -> ChatTemplate:
        """The folder's chat template, ready to render.

        Raises BadInput if there is none, or it cannot be read.
        """
        if self._stored is None:
            raise BadInput(
                f"{self.folder}: no chat template ({TEMPLATE_FILE}, or chat_template in "
                f"{TOKENIZER_CONFIG}); add the model's own"
            )
        if self._template is None:
            text, location = self._stored
            self._template = ChatTemplate(text, str(location), self.tokenizer.named_tokens)
        return self._template

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation ({"role", "content"} each), which ends with the start of an
        assistant's turn.

        Without `add_generation_prompt` the model continues the last message: the text that the template
        writes after it is left out. Raises BadInput if the folder has no chat template, or it fails.
        """
        # Marks of the assistant's part are for training; a prompt is the text alone.
        rendered = without_marks(self.template().render([messages], [add_generation_prompt])[0])
        if add_generation_prompt or not messages:
            return rendered
        last = messages[-1]["content"].strip()
        if last not in rendered:
            raise BadInput(
                f"{self.folder}: the chat template changes the last message, so the model cannot continue it"
            )
        return rendered[: rendered.rindex(last) + len(last)]
