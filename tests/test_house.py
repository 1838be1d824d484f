"""The order of the folders: no folder imports itself by way of others, and the table in docs/concepts/code.md
names each of them.
"""

import ast
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / "babel_jax").rglob("*.py")
}


def room_of(module: str) -> str:
    """A module's folder; modules at the top are rooms of their own."""
    folder = module.rpartition(".")[0]
    return module if folder == "babel_jax" else folder


def imported_by(path: Path) -> set[str]:
    """The modules of this project that a file imports, at its top or within a function; not those for types
    alone.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{name.name}" for name in node.names] + [node.module]
            found |= {name for name in names if name in MODULES}
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name in MODULES}
    return found


def test_no_room_imports_itself_by_way_of_others():
    arrows: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        room = room_of(module)
        arrows.setdefault(room, set()).update(room_of(other) for other in imported_by(path))
    assert len(arrows) > 25
    above: list[str] = []
    done: set[str] = set()

    def visit(room: str) -> None:
        assert room not in above, " -> ".join([*above[above.index(room) :], room])
        if room in done:
            return
        above.append(room)
        for below in sorted(arrows[room] - {room}):
            visit(below)
        done.add(above.pop())

    for room in arrows:
        visit(room)


def test_the_table_names_every_folder():
    page = (ROOT / "docs" / "concepts" / "code.md").read_text(encoding="utf-8")
    for folder in {path.parent.relative_to(ROOT).as_posix() for path in MODULES.values()} - {
        "babel_jax",
        "babel_jax/data",
    }:
        name = folder.removeprefix("babel_jax/")
        assert f"`{folder}/`" in page or f"`{name}/`" in page or f"`{name.rpartition('/')[2]}/`" in page, (
            folder
        )


def test_places_of_a_change_are_there():
    page = (ROOT / "docs" / "concepts" / "code.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py)`", page.partition("## What a change touches")[2])
    assert len(named) > 30
    assert not [path for path in named if not (ROOT / "babel_jax" / path).is_file()]


def test_no_name_is_undefined():
    """ruff and mypy do not report undefined names, because the axes of shapes ("batch") look like names."""
    options = ["--isolated", "--select", "F821", "--ignore-noqa", "--output-format", "json"]
    folders = [str(ROOT / name) for name in ("babel_jax", "benchmarks", "tests")]
    command = [sys.executable, "-m", "ruff", "check", *options, *folders]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    undefined = []
    for entry in found:
        path, place = Path(entry["filename"]), entry["location"]
        with tokenize.open(path) as file:
            strings = [
                token for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.STRING
            ]
        at = (place["row"], place["column"] - 1)
        if not any(token.start <= at < token.end for token in strings):
            undefined.append(f"{path.name}:{place['row']}: {entry['message']}")
    assert not undefined


MOST_LINES = 60  # of a function, with its docstring
MOST_CHARACTERS = 110  # of a line
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_no_function_is_long():
    long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES:
                    long.append(f"{module}.{node.name} has {lines} lines")
    assert not long, f"split them where the task changes: {long}"


def test_no_comprehension_is_inside_of_another_one():
    nested = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, COMPREHENSIONS):
                inside = [one for one in ast.walk(node) if isinstance(one, COMPREHENSIONS)]
                if len(inside) > 1:
                    nested.append(f"{module}:{node.lineno}")
    assert not nested, f"write loops, or give the inner one a name: {nested}"


def test_no_line_is_long():
    """ruff allows longer lines that end with a pragma (`# type: ignore`, `# noqa`) or have no space."""
    long = []
    for module, path in MODULES.items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > MOST_CHARACTERS:
                long.append(f"{module}:{number}")
    assert not long
