"""Conversations to token ids by a chat template (Jinja, as in Hugging Face folders), with the tokens that an assistant wrote marked.

What people wrote never becomes a control token: "<|im_end|>" inside a message is tokenized as the letters that it is.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
import tokenizers

from babel_jax.data.chat_templates import (
    BEGIN,
    END,
    TEMPLATE_FILE,
    compiled_template,
    read_object,
    read_template,
    special_tokens,
    stored_template,
)
from babel_jax.data.tokenizers import TOKENIZER_CONFIG, TOKENIZER_JSON, HuggingFaceTokenizer, is_control
from babel_jax.errors import BadInput
from babel_jax.files import write_text

SPECIAL_TOKENS = "special_tokens_map.json"
# ChatML as Qwen writes it, without a system message of its own.
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# As BEGIN and END, no text has it.
_CONTROL = "\ud802"
_FIRST_NUMBER = 0xD900
_MARKED = re.compile(f"{_CONTROL}[\ud900-\udbff]")

Message = Mapping[str, str]
Conversation = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and for each whether the assistant wrote it (the token that ends its turn counts as its own)."""

    ids: list[int]
    targets: list[bool]


class ChatFormat:
    """A tokenizer.json and a chat template."""

    def __init__(self, tokenizer_json: Path, template: str, special_tokens: Mapping[str, str], where: str):
        """`special_tokens` are those that a template may name (bos_token, ..); `where` is the template's place, for messages.

        Raises BadInput for a template that is none, cannot tell turns apart, or names control tokens that the tokenizer does not have.
        """
        self.template = template
        self.fingerprint = hashlib.sha256(template.encode()).hexdigest()
        self.where = where
        self._raw = HuggingFaceTokenizer(tokenizer_json)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("added_tokens", [])
        self._controls = [token["content"] for token in added if token["special"] or is_control(token["content"])]
        self._any_control = re.compile("|".join(map(re.escape, sorted(self._controls, key=len, reverse=True))) or r"(?!)")
        self._compiled = compiled_template(template, where)
        self._special_tokens = dict(special_tokens)
        probe = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        # The last of the assistant's tokens ends its turn.
        last = [token for token, target in zip(probe.ids, probe.targets, strict=True) if target][-1]
        self.end_id, self.end_token = last, self._tokenizer.id_to_token(last)
        if self.end_token not in self._controls:
            raise BadInput(
                f"{where}: an assistant's turn ends with {self.end_token!r}, which is no control token of {tokenizer_json}, so generation "
                "would not stop; give a tokenizer and a template that fit"
            )

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the template writes it."""
        text = self._written(conversation, add_generation_prompt).replace(BEGIN, "").replace(END, "")
        return _MARKED.sub(lambda mark: self._controls[ord(mark[0][1]) - _FIRST_NUMBER], text)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The tokens of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """The tokens of conversations, those of the assistant marked. Raises BadInput where the template refuses one."""
        return [self._encoded(*self._with_spans(conversation)) for conversation in conversations]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the control tokens."""
        return self._raw.decode(ids)

    def _written(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """What the template writes, with marks for `{% generation %}` and for control tokens inside of messages."""
        safe = [{**message, "content": self._any_control.sub(self._mark, message["content"])} for message in conversation]
        try:
            return self._compiled.render(messages=safe, add_generation_prompt=add_generation_prompt, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadInput(f"{self.where}: the template refuses a conversation: {' '.join(str(error).split())[:200]}") from None

    def _mark(self, control: re.Match[str]) -> str:
        return _CONTROL + chr(_FIRST_NUMBER + self._controls.index(control[0]))

    def _with_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where (start, end) the assistant's part of it is."""
        text = self._written(conversation)
        if BEGIN in text:
            return _without_marks(text)
        # The template does not say what is the assistant's: its turn is what comes after the prompt that asks for it.
        spans = []
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = self._written(conversation[:turn], add_generation_prompt=True)
            after = self._written(conversation[: turn + 1]).rstrip()
            if not (after.startswith(before.rstrip()) and text.startswith(after)):
                raise BadInput(
                    f"{self.where}: the template writes a turn in another way once others follow; give a template that puts "
                    "{% generation %} and {% endgeneration %} around what is to be trained on"
                )
            spans.append((min(len(before), len(after)), len(after)))
        return text, spans

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedConversation:
        ids: list[int] = []
        starts: list[int] = []
        for start, piece, control in self._pieces(text):
            if control:
                raw = self._raw.encode(piece)
                ids += raw
                starts += [start] * len(raw)
            else:
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                ids += encoding.ids
                starts += [start + first for first, _ in encoding.offsets]
        return EncodedConversation(ids, [any(first <= start < end for first, end in spans) for start in starts])

    def _pieces(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """Parts of a text with their places; True for those that look like control tokens and are none."""
        place = 0
        for mark in _MARKED.finditer(text):
            if mark.start() > place:
                yield place, text[place : mark.start()], False
            yield mark.start(), self._controls[ord(mark[0][1]) - _FIRST_NUMBER], True
            place = mark.end()
        if place < len(text):
            yield place, text[place:], False


def open_chat_format(folder: Path | str, template: Path | str | None = None) -> ChatFormat:
    """The chat format of a model folder: its own template (chat_template.jinja, else that of tokenizer_config.json), or the file
    `template` in its place, or ChatML where there is none. Raises BadInput where the folder has no tokenizer.json, and as `ChatFormat`.
    """
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / TOKENIZER_JSON).is_file():
        raise BadInput(f"{folder}: no {TOKENIZER_JSON}; a chat template needs the control tokens of one")
    if template is not None:
        path = Path(template)
        if not path.is_file():
            raise BadInput(f"{path}: no such chat template; give a file with a Jinja template, or leave chat.template out")
        chosen, where = read_template(path), path
    else:
        chosen, where = stored_template(folder) or (CHATML, folder)
    return ChatFormat(folder / TOKENIZER_JSON, chosen, special_tokens(folder), str(where))


def write_chat_files(folder: Path, format: ChatFormat, eos_ids: Sequence[int]) -> None:
    """Makes the files of a model folder beside its config.json those of a chat model: the template, the token that ends a turn, and
    `eos_ids`, at which generation stops."""
    write_text(folder / TEMPLATE_FILE, format.template)
    config = read_object(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    write_text(folder / TOKENIZER_CONFIG, json.dumps({**config, "eos_token": format.end_token}, indent=2, ensure_ascii=False) + "\n")
    if (folder / SPECIAL_TOKENS).is_file():  # older readers take this before the config
        special = {**read_object(folder / SPECIAL_TOKENS), "eos_token": format.end_token}
        write_text(folder / SPECIAL_TOKENS, json.dumps(special, indent=2, ensure_ascii=False) + "\n")
    generation = read_object(folder / "generation_config.json")
    write_text(folder / "generation_config.json", json.dumps({**generation, "eos_token_id": list(eos_ids)}, indent=2) + "\n")


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    spans, plain, place = [], "", 0
    for mark in re.finditer(f"{BEGIN}([^{END}]*){END}", text):
        plain += text[place : mark.start()]
        spans.append((len(plain), len(plain) + len(mark[1])))
        plain += mark[1]
        place = mark.end()
    return plain + text[place:], spans
