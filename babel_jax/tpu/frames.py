"""The lines of Python that the instructions of a compiled program come from, read from its text."""

import re
from collections import defaultdict
from collections.abc import Mapping


def frame_sources(text: str) -> dict[int, str]:
    """File and line of each stack frame, as model/layers.py:62: of the innermost call in this package, or
    else of the innermost call.

    text: the HLO text, which begins with tables of file names, lines and frames.
    """
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    table = ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif table and (numbered := re.match(r"(\d+) (.*)", line)):
            tables[table][int(numbered.group(1))] = numbered.group(2)
        elif line and not line[0].isdigit():
            table = ""
    # Three tables that refer to each other: a frame to its place and its caller, a place to its file.
    names = {number: name.strip('"') for number, name in tables["FileNames"].items()}
    places: dict[int, tuple[str, int]] = {}
    for number, row in tables["FileLocations"].items():
        fields = dict(field.split("=") for field in row.strip("{}").split())
        places[number] = names[int(fields["file_name_id"])], int(fields["line"])
    frames: dict[int, tuple[int, int]] = {}
    for number, row in tables["StackFrames"].items():
        fields = dict(field.split("=") for field in row.strip("{}").split())
        frames[number] = int(fields["file_location_id"]), int(fields.get("parent_frame_id", 0))
    return {number: _innermost(number, frames, places) for number in frames}


def _innermost(
    number: int, frames: Mapping[int, tuple[int, int]], places: Mapping[int, tuple[str, int]]
) -> str:
    # From the innermost call outwards, until a file of this package.
    seen: set[int] = set()
    first = ""
    while number in frames and number not in seen:
        seen.add(number)
        location, number = frames[number]
        path, line = places.get(location, ("", 0))
        short = "/".join(path.split("/")[-2:])
        first = first or f"{short}:{line}"
        if "/babel_jax/" in path:
            return f"{short}:{line}"
    return first
