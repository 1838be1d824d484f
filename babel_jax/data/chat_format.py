"""Conversations to token ids by a chat template (Jinja, as in Hugging Face folders), with the tokens that an assistant wrote marked.

What people wrote never becomes a control token: "<|im_end|>" inside a message is tokenized as the letters that it is.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from babel_jax.data.tokenizers import TOKENIZER_CONFIG, TOKENIZER_JSON, HuggingFaceTokenizer, is_control
from babel_jax.errors import BadInput
from babel_jax.files import write_text

TEMPLATE_FILE, SPECIAL_TOKENS = "chat_template.jinja", "special_tokens_map.json"
# ChatML as Qwen writes it, without a system message of its own.
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Halves of surrogate pairs are in no text (rows that have them are refused), so they can mark places in what a template writes.
_BEGIN, _END, _CONTROL = "\ud800", "\ud801", "\ud802"
_FIRST_NUMBER = 0xD900
_MARKED = re.compile(f"{_CONTROL}[\ud900-\udbff]")

Message = Mapping[str, str]
Conversation = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and for each whether the assistant wrote it (the token that ends its turn counts as its own)."""

    ids: list[int]
    targets: list[bool]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}`: what is between is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Any) -> str:
        return _BEGIN + caller() + _END


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
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._compiled = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise BadInput(f"{where}: not a readable chat template: {error}") from None
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
        text = self._written(conversation, add_generation_prompt).replace(_BEGIN, "").replace(_END, "")
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
        if _BEGIN in text:
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
    config = _read_json(folder / TOKENIZER_CONFIG)
    named = {name: config.get(name) for name in _SPECIAL_NAMES}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    where = folder / TEMPLATE_FILE if template is None else Path(template)
    if where.is_file():
        try:
            return ChatFormat(folder / TOKENIZER_JSON, where.read_text(encoding="utf-8"), special, str(where))
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{where}: not a readable text file: {error}") from None
    if template is not None:
        raise BadInput(f"{where}: no such chat template; give a file with a Jinja template, or leave chat.template out")
    own = config.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = next((one["template"] for one in own if one.get("name") == "default"), None)
    return ChatFormat(folder / TOKENIZER_JSON, own or CHATML, special, str(folder / TOKENIZER_CONFIG if own else folder))


def write_chat_files(folder: Path, format: ChatFormat, eos_ids: Sequence[int]) -> None:
    """Makes the files of a model folder beside its config.json those of a chat model: the template, the token that ends a turn, and
    `eos_ids`, at which generation stops."""
    write_text(folder / TEMPLATE_FILE, format.template)
    config = _read_json(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    write_text(folder / TOKENIZER_CONFIG, json.dumps({**config, "eos_token": format.end_token}, indent=2, ensure_ascii=False) + "\n")
    if (folder / SPECIAL_TOKENS).is_file():  # older readers take this before the config
        special = {**_read_json(folder / SPECIAL_TOKENS), "eos_token": format.end_token}
        write_text(folder / SPECIAL_TOKENS, json.dumps(special, indent=2, ensure_ascii=False) + "\n")
    generation = _read_json(folder / "generation_config.json")
    write_text(folder / "generation_config.json", json.dumps({**generation, "eos_token_id": list(eos_ids)}, indent=2) + "\n")


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    spans, plain, place = [], "", 0
    for mark in re.finditer(f"{_BEGIN}([^{_END}]*){_END}", text):
        plain += text[place : mark.start()]
        spans.append((len(plain), len(plain) + len(mark[1])))
        plain += mark[1]
        place = mark.end()
    return plain + text[place:], spans


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: a JSON object is needed")
    return values


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
