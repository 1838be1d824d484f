"""Conversations to token ids by a chat template (Jinja, as in Hugging Face folders), with a mask of the
assistant's tokens.

Text of people never becomes a control token: "<|im_end|>" inside a message is tokenized as ordinary text.
"""

import dataclasses
import functools
import hashlib
import itertools
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
from babel_jax.data.tokens.tokenizer import Tokenizer, is_control
from babel_jax.data.tokens.tokenizer_json import loaded_tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.errors import BadInput
from babel_jax.files import write_text

# ChatML as Qwen's models use it, without a default system message.
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# A control token inside a message is marked by two characters: _CONTROL and a number. No text has either, as
# for BEGIN and END.
_CONTROL = "\ud802"
_FIRST_NUMBER = 0xD900
_MARKED = re.compile(f"{_CONTROL}[\ud900-\udbff]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MOST_CONTROLS = 0xDC00 - _FIRST_NUMBER
# Without {% generation %} the template runs twice for each turn of the assistant, on the conversation up to
# there. Of these conversations together, characters in one request to its process, and at all.
_REQUEST_CHARACTERS = 4 * 2**20
_MOST_READ_CHARACTERS = 256 * 2**20
_MESSAGE_CHARACTERS = 40  # of a message besides its content: its role, and the braces of JSON

Message = Mapping[str, str]
Conversation = Sequence[Message]


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and for each token True if the assistant wrote it; the token that ends its turn counts."""

    ids: list[int]
    targets: list[bool]


class ChatFormat:
    """A tokenizer and a chat template: conversations to token ids, for training and for prompts.

    A control token inside a message is tokenized as ordinary text. In the assistant's messages this holds for
    special tokens only: `<think>` and `<tool_call>`, ordinary added tokens of Qwen's tokenizer, stay tokens
    there.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer = tokenizer
        self.template = template.text
        self.fingerprint = hashlib.sha256(template.text.encode()).hexdigest()
        self.location = template.location
        self._chat_template = template
        # The tokenizer of prompts, with offsets.
        self._tokenizer = tokenizer.with_controls
        # In the assistant's messages only special tokens become letters. Elsewhere all control tokens do.
        special = [token.content for token in tokenizer.added_tokens if token.special]
        ordinary = [token.content for token in tokenizer.added_tokens if not token.special]
        others = [content for content in ordinary if is_control(content)]
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

        Raises BadInput if this is no control token.
        """
        # The shortest conversation with an answer shows how the template ends a turn.
        probe = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        answer_ids = [token for token, target in zip(probe.ids, probe.targets, strict=True) if target]
        last = self._tokenizer.id_to_token(answer_ids[-1]) if answer_ids else ""
        if last not in self._controls:
            raise BadInput(
                f"{self.location}: an assistant's turn ends with {last!r}, which is no control token of "
                f"{self.tokenizer.path}, so generation would not stop; give a tokenizer and a template that "
                "fit"
            )
        return answer_ids[-1]

    @property
    def end_token(self) -> str:
        """The token of `end_id`."""
        return self._tokenizer.id_to_token(self.end_id) or ""

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, as the template writes it."""
        text = self._written([conversation], [add_generation_prompt])[0].replace(BEGIN, "").replace(END, "")
        return _MARKED.sub(lambda mark: self._controls[ord(mark[0][1]) - _FIRST_NUMBER], text)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation, followed by the start of an assistant's turn."""
        text = self._written([conversation], [True])[0].replace(BEGIN, "").replace(END, "")
        return self._encoded(text, []).ids

    def check(self, text: str) -> None:
        """Raises BadInput if the template refuses a conversation. text: the output of `conversation_text`."""
        self._of_text(text)

    def encode_text(self, text: str) -> EncodedConversation:
        """The tokens of a conversation. text: the output of `conversation_text`."""
        return self._encoded(*self._of_text(text))

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The tokens of one conversation; see `encode_batch`."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """The tokens of conversations, with the assistant's tokens marked.

        Raises BadInput if the template refuses a conversation.
        """
        return [self._encoded(*self._with_spans(conversation)) for conversation in conversations]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the control tokens."""
        return self.tokenizer.decode(ids)

    def _written(
        self, conversations: Sequence[Conversation], add_generation_prompt: Sequence[bool]
    ) -> list[str]:
        """The output of the template, with marks for `{% generation %}` and for control tokens inside of
        messages.
        """
        safe = [self._safe(conversation) for conversation in conversations]
        return self._chat_template.render(safe, add_generation_prompt)

    def _safe(self, conversation: Conversation) -> list[dict[str, str]]:
        """The conversation with marks in the place of control tokens inside of its messages."""
        safe = []
        for message in conversation:
            controls = self._special_control if message["role"] == "assistant" else self._any_control
            safe.append({**message, "content": controls.sub(self._mark, message["content"])})
        return safe

    def _mark(self, control: re.Match[str]) -> str:
        return _CONTROL + chr(_FIRST_NUMBER + self._controls.index(control[0]))

    def _of_text(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        # A row is checked when it is read and encoded directly after: the template runs once for both.
        if self._last is None or self._last[0] != text:
            self._last = (text, self._with_spans(json.loads(text)))
        return self._last[1]

    def _with_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans (start, end) of the assistant's characters."""
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        whole = self._written([conversation], [False])[0]
        if not turns or _GENERATION.search(self.template):
            return _without_marks(whole)

        # The template does not mark the assistant's part. So an answer is the difference of two outputs:
        # the conversation up to the answer, and the conversation that ends before it.
        spans = []
        for group in self._grouped(conversation, turns):
            asked = [conversation[:turn] for turn in group]
            answered = [conversation[: turn + 1] for turn in group]
            opens_turn = [True] * len(group) + [False] * len(group)
            written = self._written([*asked, *answered], opens_turn)
            for before, after in zip(written[: len(group)], written[len(group) :], strict=True):
                after = after.rstrip()
                if not (after.startswith(before.rstrip()) and whole.startswith(after)):
                    raise BadInput(
                        f"{self.location}: the template writes a turn in another way if other turns "
                        "follow; give a template that puts {% generation %} and {% endgeneration %} around "
                        "the text to train on"
                    )
                spans.append((min(len(before), len(after)), len(after)))
        return whole, spans

    def _grouped(self, conversation: Conversation, turns: Sequence[int]) -> list[list[int]]:
        """The turns in groups, each for one request.

        Raises BadInput if the conversations up to each turn are too long together. Their length grows with
        the square of the number of turns.
        """
        # up_to[n] is the number of characters before message n.
        lengths = [len(message["content"]) + _MESSAGE_CHARACTERS for message in conversation]
        up_to = [0, *itertools.accumulate(lengths)]
        costs = [up_to[turn] + up_to[turn + 1] for turn in turns]
        if sum(costs) > _MOST_READ_CHARACTERS:
            raise BadInput(
                f"{self.location}: a conversation with {len(turns):,} turns of the assistant: to find them, "
                f"the template would read {sum(costs):,} characters, and at most {_MOST_READ_CHARACTERS:,} "
                "are read; split it, or give a template that puts {% generation %} and {% endgeneration %} "
                "around the text to train on"
            )
        groups: list[list[int]] = []
        size = 0
        for turn, cost in zip(turns, costs, strict=True):
            size += cost
            if not groups or size > _REQUEST_CHARACTERS:
                groups.append([])
                size = cost
            groups[-1].append(turn)
        return groups

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedConversation:
        """The ids of a text with marks; `spans` are the assistant's characters."""
        ids: list[int] = []
        # The span (start, end) of characters of `text` that each token comes from.
        token_spans: list[tuple[int, int]] = []
        for start, stop, has_letters in self._pieces(text):
            # The string to encode, and the span of each of its characters in `text`. They differ if the
            # piece has marks: two characters of `text` then become the letters of a control token.
            if has_letters:
                tokenizer = self._without_controls
                string, firsts, lasts = self._letters(text, start, stop)
            else:
                tokenizer = self._tokenizer
                string = text[start:stop]
                firsts, lasts = list(range(start, stop)), list(range(start + 1, stop + 1))
            encoding = tokenizer.encode(string, add_special_tokens=False)
            ids += encoding.ids

            # A token that the tokenizer puts after the text gets the span of the last character.
            end = len(string) - 1
            for first, last in encoding.offsets:
                token_spans.append((firsts[min(first, end)], lasts[min(max(last - 1, first), end)]))
        return EncodedConversation(ids, _touched(token_spans, spans))

    def _pieces(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """Pieces (start, stop, has_letters) of a text; `has_letters` is True if the piece has marks and no
        control token.

        A piece ends only where a control token begins or ends: there a tokenizer starts anew in any text.
        Elsewhere Llama 2's tokenizer would add a space.
        """
        if _CONTROL not in text:
            yield 0, len(text), False
            return
        flags = {token.content: token for token in self.tokenizer.added_tokens}
        yielded = position = 0
        for control in [*self._any_control.finditer(text), None]:
            # An added token with lstrip takes the spaces before it.
            stop = len(text) if control is None else control.start()
            if control is not None and flags[control[0]].lstrip:
                stop = position + len(text[position:stop].rstrip())
            if _CONTROL in text[position:stop]:
                if yielded < position:
                    yield yielded, position, False
                yield position, stop, True
                yielded = stop
            if control is not None:
                position = control.end()
                if flags[control[0]].rstrip:
                    position = len(text) - len(text[position:].lstrip())
        if yielded < len(text):
            yield yielded, len(text), False

    def _letters(self, text: str, start: int, stop: int) -> tuple[str, list[int], list[int]]:
        """A piece of a text, with the letters of a control token in the place of each mark; and the first and
        last position in `text` of each character.
        """
        string, firsts, lasts, position = "", list[int](), list[int](), start
        while position < stop:
            if text[position] == _CONTROL:
                letters, width = self._controls[ord(text[position + 1]) - _FIRST_NUMBER], 2
            else:
                letters, width = text[position], 1
            string += letters
            firsts += [position] * len(letters)
            lasts += [position + width] * len(letters)
            position += width
        return string, firsts, lasts

    @functools.cached_property
    def _without_controls(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts, changed so that it splits control tokens into letters."""
        description = json.loads(self._tokenizer.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["special"] or is_control(token["content"])
        made = loaded_tokenizer(description, self.tokenizer.path)
        made.encode_special_tokens = True
        return made


def open_chat_format(folder: Path | str, template: Path | str | None = None) -> ChatFormat:
    """The chat format of a model folder: its template (chat_template.jinja, else the one in
    tokenizer_config.json), or the file `template` instead, or ChatML if there is none.

    Raises BadInput if the folder has no tokenizer, the file is no template, the template cannot tell turns
    apart, or template and tokenizer do not fit.
    """
    path = Path(folder)
    folder = path if path.is_dir() else path.parent
    tokenizer = open_tokenizer(path)
    if template is not None:
        chosen, location = read_template(_existing(Path(template))), Path(template)
    else:
        chosen, location = stored_template(folder) or (CHATML, folder)
    format = ChatFormat(tokenizer, ChatTemplate(chosen, str(location), tokenizer.named_tokens))
    _ = format.end_id  # raises if generation would not stop
    return format


def write_chat_files(folder: Path, format: ChatFormat, eos_ids: Sequence[int]) -> None:
    """Changes the files beside a model's config.json for a chat model: the template, the token that ends a
    turn, and `eos_ids`, at which generation stops.
    """
    write_text(folder / TEMPLATE_FILE, format.template)
    # The template has a file of its own now: a second one in the config could contradict it.
    config = read_object(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    write_text(
        folder / TOKENIZER_CONFIG,
        json.dumps({**config, "eos_token": format.end_token}, indent=2, ensure_ascii=False) + "\n",
    )
    # Older readers prefer this file to the config.
    if (folder / SPECIAL_TOKENS_MAP).is_file():
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
    """A pattern that matches any of the tokens, the longest first; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _touched(token_spans: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token, True if one of its characters is in a span, as in transformers' assistant mask.

    A token may join the last character of a header with the first of an answer: it counts as part of the
    answer. Both lists must be sorted.
    """
    touched, number = [], 0
    for first, last in token_spans:
        # Both lists are sorted, so one pass is enough: spans that end before this token are skipped.
        while number < len(spans) and spans[number][1] <= first:
            number += 1
        touched.append(number < len(spans) and last > spans[number][0])
    return touched


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without BEGIN and END, and the spans between them."""
    spans, plain, position = [], "", 0
    for mark in re.finditer(f"{BEGIN}([^{END}]*){END}", text):
        plain += text[position : mark.start()]
        spans.append((len(plain), len(plain) + len(mark[1])))
        plain += mark[1]
        position = mark.end()
    return plain + text[position:], spans
