"""The page of all commands, from their parsers."""

import argparse

from babel_jax.commands.parser import GROUPS, BabelParser, CommandParser

_HEAD = """# Commands

Every command takes `--help` and `--json`, answers a mistake with one line and exit status 2, and writes
folders whole or not at all. Exit status 0 is success, also of a run that SIGTERM stopped after a checkpoint;
130 is Ctrl-C. This page is made from the parsers of the commands; a test runs each example.
"""


def commands_page() -> str:
    """Markdown: a section for each command, in the groups of `babel --help`."""
    parts = [_HEAD]
    commands = BabelParser().commands
    for title, names in GROUPS.items():
        parts.append(f"## {title.capitalize()}\n")
        parts += [_section(name, commands[name]) for name in names]
    return "\n".join(parts)


def _section(name: str, parser: CommandParser) -> str:
    lines = [f"### {name}", "", f"{parser.does[0].upper()}{parser.does[1:]}.", ""]
    lines += ["```bash", *parser.examples, "```", ""]
    lines += ["| argument | default | meaning |", "| --- | --- | --- |"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and "--json" not in action.option_strings:
            lines.append("| " + " | ".join(_row(parser, action)) + " |")
    return "\n".join([*lines, ""])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str]:
    """The name, the default and the meaning of an argument."""
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        shown = "|".join(map(str, action.choices))
    if action.option_strings:
        takes_value = action.nargs != 0
        name = ", ".join(action.option_strings) + (f" {shown}" if takes_value else "")
    else:
        name = shown
    default = action.default
    has_default = bool(default) or (default == 0 and default is not False)
    if isinstance(default, list):
        default = ",".join(map(str, default))
    meaning = (action.help or "").replace("%(default)s", str(default))
    cells = (f"`{name}`", f"`{default}`" if has_default else "", meaning)
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return escaped[0], escaped[1], escaped[2]
