"""How dense the code is, by revision: a Markdown table with a column for each one.

python benchmarks/density.py [REVISION ...] [--below babel_jax] [--by-folder] [--strict]

Without a revision, reads the files as they are now. Lengths of functions and files are in lines. A line of
code is a line that is neither blank, nor a comment, nor in a docstring; nested comprehensions have another
one inside. --by-folder prints a row for each folder of the last revision. --strict also counts the errors of
`mypy --strict` (a minute for each revision).
"""

import argparse
import ast
import dataclasses
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOW = "now"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)


@dataclasses.dataclass
class Counts:
    """Sums over files."""

    files: list[int] = dataclasses.field(default_factory=list)
    functions: list[int] = dataclasses.field(default_factory=list)
    code: int = 0
    comments: int = 0
    expressions: int = 0
    comprehensions: int = 0
    nested: int = 0
    over_100: int = 0
    over_110: int = 0

    def add(self, text: str) -> None:
        """Counts a file."""
        tree, lines = ast.parse(text), text.splitlines()
        in_docstrings = set(docstring_lines(tree))
        for number, line in enumerate(lines, 1):
            stripped = line.strip()
            self.comments += stripped.startswith("#")
            self.code += bool(stripped) and not stripped.startswith("#") and number not in in_docstrings
            self.over_100 += len(line) > 100
            self.over_110 += len(line) > 110
        self.files.append(len(lines))
        for node in ast.walk(tree):
            self.expressions += isinstance(node, ast.expr)
            if isinstance(node, FUNCTIONS):
                assert node.end_lineno is not None
                self.functions.append(node.end_lineno - node.lineno + 1)
            if isinstance(node, COMPREHENSIONS):
                self.comprehensions += 1
                inside = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
                self.nested += len(inside) > 1

    def values(self) -> dict[str, str]:
        """The rows of the table."""
        return {
            "files": str(len(self.files)),
            "lines of code": f"{self.code:,}",
            "file: median, longest": f"{statistics.median(self.files):.0f}, {max(self.files)}",
            "files over 400 lines": str(sum(length > 400 for length in self.files)),
            "function: median, 90%, longest": three_lengths(self.functions),
            "functions over 60 lines": str(sum(length > 60 for length in self.functions)),
            "expressions a line of code": f"{self.expressions / max(1, self.code):.2f}",
            "comprehensions in 1,000 lines of code": f"{1000 * self.comprehensions / max(1, self.code):.1f}",
            "nested comprehensions": str(self.nested),
            "comment lines for 100 lines of code": f"{100 * self.comments / max(1, self.code):.1f}",
            "lines over 100 characters": f"{self.over_100:,}",
            "lines over 110 characters": f"{self.over_110:,}",
        }


def three_lengths(lengths: Sequence[int]) -> str:
    if not lengths:
        return "none"
    ordered = sorted(lengths)
    return f"{statistics.median(ordered):.0f}, {ordered[len(ordered) * 9 // 10]}, {ordered[-1]}"


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """The numbers of the lines in docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            yield from range(docstring.lineno, docstring.end_lineno + 1)


class Imports:
    """The imports between the modules of a package."""

    def __init__(self, root: Path, package: str) -> None:
        self.package = package
        self.trees: dict[str, ast.Module] = {}
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.trees[name] = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(self.trees[name]):
                # Imports for annotations alone are not run.
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    node.body = []

    def of(self, nodes: Sequence[ast.stmt], within_functions: bool) -> set[str]:
        """The modules that these statements import."""
        modules, waiting = set(), list(nodes)
        while waiting:
            node = waiting.pop()
            if isinstance(node, FUNCTIONS) and not within_functions:
                continue
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        return modules & self.trees.keys()

    def loaded_with(self, modules: set[str]) -> set[str]:
        """These modules and all that Python loads with them, the packages above them too."""
        loaded: set[str] = set()
        waiting = list(modules)
        while waiting:
            module = waiting.pop()
            if module in loaded:
                continue
            loaded.add(module)
            waiting += self.of(self.trees[module].body, within_functions=False)
            above = module.rpartition(".")[0]
            waiting += [above] if above in self.trees else []
        return loaded

    def arrows(self) -> int:
        """The pairs of folders of which the first imports from the second. A module at the top of the package
        counts as a folder.
        """
        pairs = set()
        for module, tree in self.trees.items():
            for other in self.of(tree.body, within_functions=True):
                if self.folder(module) != self.folder(other):
                    pairs.add((self.folder(module), self.folder(other)))
        return len(pairs)

    def folder(self, module: str) -> str:
        above = module.rpartition(".")[0]
        has_modules_below = any(name.startswith(f"{module}.") for name in self.trees)
        return module if has_modules_below or above == self.package else above

    def of_commands(self) -> dict[str, int]:
        """For each command, the number of modules that are loaded before it begins."""
        counts = {}
        for module, tree in self.trees.items():
            if not module.startswith(f"{self.package}.commands."):
                continue
            functions = {node.name: node for node in tree.body if isinstance(node, FUNCTIONS)}
            for node in ast.walk(tree):
                # command("train", _train, ...)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "command":
                    name, function = node.args[:2]
                    assert isinstance(name, ast.Constant)
                    assert isinstance(function, ast.Name)
                    body = functions_called(functions, function.id)
                    imports = self.of(body, within_functions=True)
                    counts[name.value] = len(self.loaded_with({f"{self.package}.cli", module} | imports))
        return counts


def functions_called(functions: dict[str, ast.FunctionDef], first: str) -> list[ast.FunctionDef]:
    """A function of a module and all functions of the module that its body names, in any depth."""
    names: list[str] = []
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in names or name not in functions:
            continue
        names.append(name)
        waiting += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    return [functions[name] for name in names]


def unpacked(revision: str, folder: Path) -> Path:
    """The files of a revision, in this folder."""
    if revision == NOW:
        return ROOT
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def column(root: Path, below: str, strict: bool) -> dict[str, str]:
    """The values of one revision by row."""
    counts = Counts()
    for path in sorted((root / below).rglob("*.py")):
        counts.add(path.read_text(encoding="utf-8"))
    values = counts.values()
    imports = Imports(root, below)
    if of_commands := imports.of_commands():
        lengths = sorted(of_commands.values())
        most = max(of_commands, key=of_commands.__getitem__)
        values["arrows between folders"] = str(imports.arrows())
        values["modules that a command loads: median, most"] = (
            f"{statistics.median(lengths):.0f}, {lengths[-1]} (`{most}`)"
        )
    if strict:
        command = [sys.executable, "-m", "mypy", "--strict", below]
        lines = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.splitlines()
        values["errors of mypy --strict"] = str(sum(": error:" in line for line in lines))
    return values


def folder_table(root: Path, below: str) -> str:
    """A row for each folder."""
    by_folder: dict[str, Counts] = {}
    for path in sorted((root / below).rglob("*.py")):
        folder = path.parent.relative_to(root).as_posix()
        by_folder.setdefault(folder, Counts()).add(path.read_text(encoding="utf-8"))
    titles = list(Counts(files=[0]).values())
    lines = ["| folder | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for folder, counts in by_folder.items():
        lines.append(f"| {folder} | " + " | ".join(counts.values().values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", default=[NOW])
    parser.add_argument("--below", default="babel_jax", help="folder to read (default %(default)s)")
    parser.add_argument("--by-folder", action="store_true")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()

    columns = {}
    for revision in options.revisions:
        with tempfile.TemporaryDirectory() as temporary:
            root = unpacked(revision, Path(temporary))
            columns[revision] = column(root, options.below, options.strict)
            if options.by_folder and revision == options.revisions[-1]:
                print(folder_table(root, options.below), end="\n\n")

    titles = Counter(title for values in columns.values() for title in values)
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for title in titles:
        print(f"| {title} | " + " | ".join(values.get(title, "") for values in columns.values()) + " |")


if __name__ == "__main__":
    main()
