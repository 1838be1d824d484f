"""Shells: completion."""

import argparse

from babel_jax.commands.parsing import Commands, Result

SHELLS = ("bash", "zsh", "fish")
# Arguments that are no files, though they have no list of choices.
_NO_FILES = ("prompt",)


def declare(command: Commands, parser: argparse.ArgumentParser) -> None:
    """Adds the command of this file. parser: the parser that has all commands."""

    def completion(options: argparse.Namespace) -> Result:
        import shtab

        _complete_files(parser)
        script: str = shtab.complete(parser, options.shell)
        return {"shell": options.shell, "script": script, "summary": script}

    made = command(
        "completion",
        completion,
        "the script with which a shell completes commands, options and files",
        "babel completion bash > babel-completion.bash",
    )
    made.add_argument(
        "shell", choices=SHELLS, help='for bash, put  eval "$(babel completion bash)"  into ~/.bashrc'
    )


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Has the shell complete files for all arguments that are text."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_files(below)
            continue
        takes_text = action.nargs != 0 and action.choices is None and action.type is None
        if takes_text and action.dest not in _NO_FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
