"""Chat templates of model folders: where they stand, and Jinja as transformers lets them use it, in its sandbox."""

import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from babel_jax.data.tokenizers import TOKENIZER_CONFIG
from babel_jax.errors import BadInput

TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Halves of surrogate pairs are in no text (rows that have them are refused), so they can mark places in what a template writes.
BEGIN, END = "\ud800", "\ud801"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}`: what is between is the assistant's, and stands between BEGIN and END."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Any) -> str:
        return BEGIN + caller() + END


def compiled_template(template: str, where: str) -> jinja2.Template:
    """A template to render with `messages`, `add_generation_prompt` and the special tokens. Raises BadInput for one that is none."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise BadInput(f"{where}: not a readable chat template: {error}") from None


def stored_template(folder: Path) -> tuple[str, Path] | None:
    """The template of a model folder and the file that it stands in: chat_template.jinja, else tokenizer_config.json."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return read_template(path), path
    stored = read_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(stored, list):  # several by name; transformers takes the one named default
        stored = next((entry["template"] for entry in stored if entry.get("name") == "default"), None)
    return None if stored is None else (stored, folder / TOKENIZER_CONFIG)


def read_template(path: Path) -> str:
    """The text of a template's file. Raises BadInput when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a readable text file: {error}") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a template may name, of those that tokenizer_config.json has."""
    config = read_object(folder / TOKENIZER_CONFIG)
    found = {name: config.get(name) for name in _SPECIAL_NAMES}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items() if token}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object beside a model; empty where there is no such file. Raises BadInput when it cannot be read."""
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
