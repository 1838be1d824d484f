"""Chat templates of model folders: where they stand, and what they write, as `transformers` has them, but in
a process of their own.
"""

import contextlib
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.data.tokens import template_worker
from babel_jax.data.tokens.special_tokens import TOKENIZER_CONFIG, read_object
from babel_jax.data.tokens.template_worker import BEGIN, END, MOST_SECONDS
from babel_jax.errors import BadInput, one_line
from babel_jax.files import read_text

TEMPLATE_FILE = "chat_template.jinja"
MOST_TEMPLATE_BYTES = 2**20  # published templates have at most some tens of thousands


class ChatTemplate:
    """A Jinja template and the special tokens that it may name.

    It runs in a process with bounds: see `template_worker`.
    """

    def __init__(self, text: str, where: str, named_tokens: Mapping[str, str]):
        """`where` is the template's place, for messages. Raises BadInput for a template that is none."""
        self.text, self.where = text, where
        self._named_tokens = dict(named_tokens)
        self._process: subprocess.Popen[bytes] | None = None
        self._ask({"template": text}, "not a readable chat template")

    def render(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], add_generation_prompt: Sequence[bool]
    ) -> list[str]:
        """What the template writes for each conversation, with the assistant's part between BEGIN and END
        where it says which that is.

        Raises BadInput where the template refuses one, or exceeds its bounds.
        """
        context = {"tools": None, "documents": None, **self._named_tokens}
        requests = []
        for messages, opens_turn in zip(conversations, add_generation_prompt, strict=True):
            # Templates ask whether a key is there; in data a key without a value is as good as none.
            present = [
                {key: value for key, value in message.items() if value is not None} for message in messages
            ]
            requests.append({**context, "messages": present, "add_generation_prompt": opens_turn})
        return self._ask(requests, "the chat template does not take this conversation")["texts"]

    def _ask(self, request: object, fault: str) -> dict[str, Any]:
        if self._process is None:
            self._start()
            if not (isinstance(request, dict) and "template" in request):
                self._ask({"template": self.text}, fault)
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line.endswith(b"\n"):
            process.kill()
            process.wait()
            self._process = None
            raise BadInput(
                f"{self.where}: {fault}: it runs for more than {MOST_SECONDS:.0f} seconds, or its process "
                "ended"
            )
        answer = json.loads(line)
        if "error" in answer:
            at = "" if answer["line"] is None else f", line {answer['line']}"
            raise BadInput(f"{self.where}{at}: {fault}: {one_line(answer['error'], 300)}")
        return answer

    def _start(self) -> None:
        # -P: the folder of that file holds modules that have names of the standard library's.
        command = [sys.executable, "-P", template_worker.__file__]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process = process
        weakref.finalize(self, _end, process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.kill()
    process.wait()


def without_marks(text: str) -> str:
    """What a template wrote, as a reader has it."""
    return text.replace(BEGIN, "").replace(END, "")


def stored_template(folder: Path) -> tuple[str, Path] | None:
    """The template of a model folder and the file that it stands in: chat_template.jinja, else
    tokenizer_config.json.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file() or path.is_symlink():
        return read_template(path, below=folder), path
    path = folder / TOKENIZER_CONFIG
    stored = read_object(path).get("chat_template")
    if isinstance(stored, list):  # several by name; transformers takes the one named default
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        if "default" not in named:
            names = ", ".join(one_line(name, 40) for name in named) or "none"
            raise BadInput(
                f'{path}: chat_template has the templates {names}, and none with the name "default"; name '
                "the one to use so"
            )
        stored = named["default"]
    if stored is None:
        return None
    if not isinstance(stored, str):
        raise BadInput(f"{path}: chat_template is {one_line(stored, 80)!r}; a template as a string is needed")
    return stored, path


def read_template(path: Path, below: Path | None = None) -> str:
    """The text of a template's file.

    Raises BadInput when it cannot be read; `below` is the folder that links may not leave.
    """
    return read_text(path, below, MOST_TEMPLATE_BYTES)
