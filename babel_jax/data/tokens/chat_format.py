"""Conversations to token ids by a chat template (Jinja, as in Hugging Face folders), with the tokens that an
assistant wrote marked.

What people wrote never becomes a control token: "<|im_end|>" inside a message is tokenized as the letters
that it is.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from babel_jax.data.tokens.chat_templates import TEMPLATE_FILE, ChatTemplate, read_template, stored_template
from babel_jax.data.tokens.special_tokens import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_object,
)
from babel_jax.data.tokens.template_worker import BEGIN, END
from babel_jax.data.tokens.tokenizer_json import loaded_tokenizer
from babel_jax.data.tokens.tokenizers import Tokenizer, is_control, open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.files import write_text

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
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MOST_CONTROLS = 0xDC00 - _FIRST_NUMBER

Message = Mapping[str, str]
Conversation = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and for each whether the assistant wrote it (the token that ends its turn counts as its
    own).
    """

    ids: list[int]
    targets: list[bool]


class ChatFormat:
    """A tokenizer and a chat template: conversations as token ids, for training and for prompts alike.

    A control token inside a message is the letters that it is. In the assistant's own messages that holds for
    special tokens alone: `<think>` and `<tool_call>`, which Qwen's tokenizer has as ordinary added tokens,
    are tokens there.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer = tokenizer
        self.template = template.text
        self.fingerprint = hashlib.sha256(template.text.encode()).hexdigest()
        self.where = template.where
        self._chat_template = template
        # The tokenizer of prompts, with offsets.
        self._tokenizer = tokenizer.with_controls
        special = [token.content for token in tokenizer.added_tokens if token.special]
        others = [
            token.content
            for token in tokenizer.added_tokens
            if not token.special and is_control(token.content)
        ]
        self._controls = [*special, *others]
        if len(self._controls) > _MOST_CONTROLS:
            raise BadInput(
                f"{tokenizer.path}: {len(self._controls):,} control tokens; conversations can be written "
                f"with {_MOST_CONTROLS:,}"
            )
        self._last: tuple[str, tuple[str, list[tuple[int, int]]]] | None = None
        self._special_control, self._any_control = _one_of(special), _one_of(self._controls)

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an assistant's turn: the last of its tokens.

        Raises BadInput where that is no control token.
        """
        probe = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        last = [token for token, target in zip(probe.ids, probe.targets, strict=True) if target][-1:]
        written = self._tokenizer.id_to_token(last[0]) if last else ""
        if written not in self._controls:
            raise BadInput(
                f"{self.where}: an assistant's turn ends with {written!r}, which is no control token of "
                f"{self.tokenizer.path}, so "
                "generation would not stop; give a tokenizer and a template that fit"
            )
        return last[0]

    @property
    def end_token(self) -> str:
        """The token of `end_id`."""
        return self._tokenizer.id_to_token(self.end_id) or ""

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the template writes it."""
        text = self._written([conversation], [add_generation_prompt])[0].replace(BEGIN, "").replace(END, "")
        return _MARKED.sub(lambda mark: self._controls[ord(mark[0][1]) - _FIRST_NUMBER], text)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation with the assistant's turn opened at its end."""
        text = self._written([conversation], [True])[0].replace(BEGIN, "").replace(END, "")
        return self._encoded(text, []).ids

    def check(self, text: str) -> None:
        """Raises BadInput where the template refuses a conversation, given as
        `conversation_text` gives it.
        """
        self._of_text(text)

    def encode_text(self, text: str) -> EncodedConversation:
        """The tokens of a conversation that is given as `conversation_text` gives it."""
        return self._encoded(*self._of_text(text))

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The tokens of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """The tokens of conversations, those of the assistant marked.

        Raises BadInput where the template refuses one.
        """
        return [self._encoded(*self._with_spans(conversation)) for conversation in conversations]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the control tokens."""
        return self.tokenizer.decode(ids)

    def _written(
        self, conversations: Sequence[Conversation], add_generation_prompt: Sequence[bool]
    ) -> list[str]:
        """What the template writes, with marks for `{% generation %}` and for control tokens inside of
        messages.
        """
        return self._chat_template.render(
            [self._safe(conversation) for conversation in conversations], add_generation_prompt
        )

    def _safe(self, conversation: Conversation) -> list[dict[str, str]]:
        safe = []
        for message in conversation:
            controls = self._special_control if message["role"] == "assistant" else self._any_control
            safe.append({**message, "content": controls.sub(self._mark, message["content"])})
        return safe

    def _mark(self, control: re.Match[str]) -> str:
        return _CONTROL + chr(_FIRST_NUMBER + self._controls.index(control[0]))

    def _of_text(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        # A row is checked as it is read, and encoded next: the template runs once for both.
        if self._last is None or self._last[0] != text:
            self._last = (text, self._with_spans(json.loads(text)))
        return self._last[1]

    def _with_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where (start, end) the assistant's part of it is."""
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        if _GENERATION.search(self.template):
            turns = []
        asked = [conversation[:turn] for turn in turns]
        answered = [conversation[: turn + 1] for turn in turns]
        opens_turn = [False] + [True] * len(turns) + [False] * len(turns)
        whole, *written = self._written([conversation, *asked, *answered], opens_turn)
        if not turns:
            return _without_marks(whole)
        # The template does not say what is the assistant's: its turn is what comes after the prompt that asks
        # for it.
        spans = []
        for before, after in zip(written[: len(turns)], written[len(turns) :], strict=True):
            after = after.rstrip()
            if not (after.startswith(before.rstrip()) and whole.startswith(after)):
                raise BadInput(
                    f"{self.where}: the template writes a turn in another way once others follow; give a "
                    "template that puts "
                    "{% generation %} and {% endgeneration %} around what is to be trained on"
                )
            spans.append((min(len(before), len(after)), len(after)))
        return whole, spans

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedConversation:
        ids: list[int] = []
        places: list[tuple[int, int]] = []  # of the characters that each token stands for
        for start, stop, has_letters in self._pieces(text):
            # Of each character that is encoded: its place in `text`, where a mark of two characters stands
            # for a whole control token.
            written, firsts, lasts = (
                text[start:stop],
                list(range(start, stop)),
                list(range(start + 1, stop + 1)),
            )
            if has_letters:
                written, firsts, lasts = self._letters(text, start, stop)
            encoding = (self._without_controls if has_letters else self._tokenizer).encode(
                written, add_special_tokens=False
            )
            ids += encoding.ids
            end = (
                len(written) - 1
            )  # a token that a tokenizer puts after the text stands for its last character
            places += [
                (firsts[min(first, end)], lasts[min(max(last - 1, first), end)])
                for first, last in encoding.offsets
            ]
        return EncodedConversation(ids, _touched(places, spans))

    def _pieces(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """Parts of a text, (start, stop, has_letters); the last says that marks are in it and no control
        token.

        A part ends only where a control token begins or ends: there a tokenizer starts anew in any text.
        Elsewhere Llama 2's would add a space.
        """
        if _CONTROL not in text:
            yield 0, len(text), False
            return
        flags = {token.content: token for token in self.tokenizer.added_tokens}
        done = place = 0
        for control in [*self._any_control.finditer(text), None]:
            stop = len(text) if control is None else control.start()
            if control is not None and flags[control[0]].lstrip:
                stop = place + len(text[place:stop].rstrip())
            if _CONTROL in text[place:stop]:
                if done < place:
                    yield done, place, False
                yield place, stop, True
                done = stop
            if control is not None:
                place = control.end()
                if flags[control[0]].rstrip:
                    place = len(text) - len(text[place:].lstrip())
        if done < len(text):
            yield done, len(text), False

    def _letters(self, text: str, start: int, stop: int) -> tuple[str, list[int], list[int]]:
        """A part of a text with the control tokens that its marks stand for, and of each character its first
        and last place.
        """
        written, firsts, lasts, place = "", list[int](), list[int](), start
        while place < stop:
            is_mark = text[place] == _CONTROL
            own = self._controls[ord(text[place + 1]) - _FIRST_NUMBER] if is_mark else text[place]
            width = 2 if is_mark else 1
            written += own
            firsts += [place] * len(own)
            lasts += [place + width] * len(own)
            place += width
        return written, firsts, lasts

    @functools.cached_property
    def _without_controls(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts, to which control tokens are the letters that they are."""
        description = json.loads(self._tokenizer.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["special"] or is_control(token["content"])
        made = loaded_tokenizer(description, self.tokenizer.path)
        made.encode_special_tokens = True
        return made


def open_chat_format(folder: Path | str, template: Path | str | None = None) -> ChatFormat:
    """The chat format of a model folder: its own template (chat_template.jinja, else that of
    tokenizer_config.json), or the file `template` in its place, or ChatML where there is none.

    Raises BadInput where the folder has no tokenizer, the template is none or cannot tell turns apart, or the
    two do not fit.
    """
    path = Path(folder)
    folder = path if path.is_dir() else path.parent
    tokenizer = open_tokenizer(path)
    if template is not None:
        chosen, where = read_template(_existing(Path(template))), Path(template)
    else:
        chosen, where = stored_template(folder) or (CHATML, folder)
    format = ChatFormat(tokenizer, ChatTemplate(chosen, str(where), tokenizer.named_tokens))
    _ = format.end_id  # raises where generation would not stop
    return format


def write_chat_files(folder: Path, format: ChatFormat, eos_ids: Sequence[int]) -> None:
    """Makes the files of a model folder beside its config.json those of a chat model: the template, the token
    that ends a turn, and `eos_ids`, at which generation stops."""
    write_text(folder / TEMPLATE_FILE, format.template)
    config = read_object(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    write_text(
        folder / TOKENIZER_CONFIG,
        json.dumps({**config, "eos_token": format.end_token}, indent=2, ensure_ascii=False) + "\n",
    )
    if (folder / SPECIAL_TOKENS_MAP).is_file():  # older readers take this before the config
        special = {**read_object(folder / SPECIAL_TOKENS_MAP), "eos_token": format.end_token}
        write_text(folder / SPECIAL_TOKENS_MAP, json.dumps(special, indent=2, ensure_ascii=False) + "\n")
    generation = read_object(folder / GENERATION_CONFIG)
    write_text(
        folder / GENERATION_CONFIG, json.dumps({**generation, "eos_token_id": list(eos_ids)}, indent=2) + "\n"
    )


def _existing(path: Path) -> Path:
    if not path.exists():
        raise BadInput(
            f"{path}: no such chat template; give a file with a Jinja template, or leave chat.template out"
        )
    return path


def _one_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, the longest first; with no token it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _touched(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens have a character in one of the spans, as transformers' assistant mask has it.

    A token can join the last character of a header with the first of an answer: that token begins the answer.
    Places and spans ascend.
    """
    touched, number = [], 0
    for first, last in places:
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        touched.append(number < len(spans) and last > spans[number][0])
    return touched


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    spans, plain, place = [], "", 0
    for mark in re.finditer(f"{BEGIN}([^{END}]*){END}", text):
        plain += text[place : mark.start()]
        spans.append((len(plain), len(plain) + len(mark[1])))
        plain += mark[1]
        place = mark.end()
    return plain + text[place:], spans
