"""Chat templates of model folders: their location, and their output, equal to that of `transformers`. They
run in a separate process.
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
    """A Jinja template, and the special tokens whose names it may use.

    The template runs in a process with bounds: see `template_worker`.
    """

    def __init__(self, text: str, location: str, named_tokens: Mapping[str, str]):
        """`location` is for messages. Raises BadInput for text that is no template."""
        self.text, self.location = text, location
        self._named_tokens = dict(named_tokens)
        self._process: subprocess.Popen[bytes] | None = None
        self._ask({"template": text}, "not a readable chat template")

    def render(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], add_generation_prompt: Sequence[bool]
    ) -> list[str]:
        """The output of the template for each conversation. BEGIN and END mark the assistant's part, if the
        template marks it.

        Raises BadInput if the template refuses a conversation, or exceeds its bounds.
        """
        context = {"tools": None, "documents": None, **self._named_tokens}
        requests = []
        for messages, opens_turn in zip(conversations, add_generation_prompt, strict=True):
            # Templates test if a key is present; in data a null value means that the key is missing.
            present = [_without_nulls(message) for message in messages]
            requests.append({**context, "messages": present, "add_generation_prompt": opens_turn})
        result: list[str] = self._ask(requests, "the chat template does not take this conversation")["texts"]
        return result

    def _ask(self, request: object, fault: str) -> dict[str, Any]:
        """The answer of the process, which is started if needed. `fault` begins the message of an error."""
        if self._process is None:
            # A new process must compile the template before it takes conversations.
            self._start()
            if not (isinstance(request, dict) and "template" in request):
                self._ask({"template": self.text}, fault)
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None

        # A process that ends while it reads or works gives no whole line.
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
                f"{self.location}: {fault}: it runs for more than {MOST_SECONDS:.0f} seconds, or its process "
                "ended"
            )

        answer = json.loads(line)
        if "error" in answer:
            at = "" if answer["line"] is None else f", line {answer['line']}"
            raise BadInput(f"{self.location}{at}: {fault}: {one_line(answer['error'], 300)}")
        result: dict[str, Any] = answer
        return result

    def _start(self) -> None:
        # -P keeps the folder of that file off the path: it has modules with names of the standard library.
        command = [sys.executable, "-P", template_worker.__file__]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the parent process
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


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def without_marks(text: str) -> str:
    """The output of a template without BEGIN and END."""
    return text.replace(BEGIN, "").replace(END, "")


def stored_template(folder: Path) -> tuple[str, Path] | None:
    """The template of a model folder and its file: chat_template.jinja, else tokenizer_config.json. None if
    there is none.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file() or path.is_symlink():
        return read_template(path, below=folder), path
    path = folder / TOKENIZER_CONFIG
    stored = read_object(path).get("chat_template")

    # A list has several templates by name; transformers uses the one named "default".
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        if "default" not in named:
            names = ", ".join(one_line(name, 40) for name in named) or "none"
            raise BadInput(
                f'{path}: chat_template has the templates {names}, and none with the name "default"; give '
                "this name to the one to use"
            )
        stored = named["default"]

    if stored is None:
        return None
    if not isinstance(stored, str):
        raise BadInput(f"{path}: chat_template is {one_line(stored, 80)!r}; a template as a string is needed")
    return stored, path


def read_template(path: Path, below: Path | None = None) -> str:
    """The text of a template's file. A link may not lead out of the folder `below`.

    Raises BadInput if the file cannot be read.
    """
    return read_text(path, below, MOST_TEMPLATE_BYTES)
