"""The process in which chat templates run. A template comes with a model folder and may be a stranger's
program.

`chat_templates.py` starts this file by its path. The process reads requests, one JSON value a line, and
answers each with one line:

    {"template": TEXT}                                     ->  {}
    [{"messages": [..], "add_generation_prompt": ..}, ..]  ->  {"texts": [..]}
    an error in either                                     ->  {"error": MESSAGE, "line": NUMBER OR null}

Bounds: the memory and processor time below, and the length of the output. A template that exceeds the time
ends the process. The process imports only the standard library and Jinja, so it starts in a tenth of a
second.
"""

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MOST_MEMORY = 512 * 2**20  # bytes of address space
MOST_SECONDS = 5.0  # of processor time for one conversation
MOST_CHARACTERS = 16 * 2**20  # of the output for one conversation
# No text has halves of surrogate pairs (rows with them are refused), so they can be marks in the output.
BEGIN, END = "\ud800", "\ud801"
_NAME = "<chat template>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` .. `{% endgeneration %}`: the text between is the assistant's; it is put between
    BEGIN and END.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own name and type

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between_marks"), [], [], body).set_lineno(line)

    def _between_marks(self, caller: Any) -> str:
        result: str = BEGIN + caller() + END
        return result


def compiled_template(template: str) -> jinja2.Template:
    """A template with the filters and functions that transformers gives to templates.

    Raises jinja2.TemplateError for text that is no template.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # As in transformers, whose functions published templates use.
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    code = environment.compile(template, _NAME, _NAME)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:  # the order of transformers' arguments
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _rendered(template: jinja2.Template, request: dict[str, Any]) -> str:
    # Piece by piece: a template that writes without an end stops at the bound, before memory does.
    pieces, length = [], 0
    for piece in template.generate(**request):
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise ValueError(f"it writes more than {MOST_CHARACTERS:,} characters for one conversation")
        pieces.append(piece)
    return "".join(pieces)


def _line_of(error: BaseException) -> int | None:
    """The line of the template that raised an error."""
    line = getattr(error, "lineno", None)
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == _NAME:
            line = frame.tb_lineno
        frame = frame.tb_next
    return line if isinstance(line, int) and line > 0 else None


def _message_of(error: BaseException) -> str:
    if isinstance(error, jinja2.TemplateError):
        return str(error.message or error)
    if isinstance(error, MemoryError):
        return f"it needs more than {MOST_MEMORY >> 20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it calls itself without an end"
    return f"{type(error).__name__}: {str(error)[:1000]}"


def main() -> None:
    """Answers requests until the standard input ends."""
    # The parent decides when this process ends: it has its own answer to Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: jinja2.Template | None = None
    answer = functools.partial(json.dumps, ensure_ascii=True)
    for line in sys.stdin.buffer:
        # The default action of SIGPROF ends the process, even within a long operation such as 9 ** (9 ** 9).
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        try:
            request = json.loads(line)
            if isinstance(request, dict):
                template = compiled_template(request["template"])
                reply = answer({})
            else:
                assert template is not None
                reply = answer({"texts": [_rendered(template, values) for values in request]})
        except Exception as error:  # a stranger's program may raise anything
            reply = answer({"error": _message_of(error), "line": _line_of(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
