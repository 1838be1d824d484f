"""Hostile input through the commands, and disks that fail under them.

    python benchmarks/hostile.py --inputs 2000 --faults 1000

Each input is a good one with seeded changes (those of tests/hostile), and each runs in a process of its own
with a bound on memory and time: how many were used, refused in one line, or neither; the worst processor
seconds and memory. The processes are forked from one that has imported everything; one input in FRESH_EVERY
runs once more as a user starts it, by a new Python, and must end with the same words.

Of faults see disk_faults.py: how many were met, and after how many of them something was lost, half-written
or wrong without a word. Exit status 1 where one ended otherwise than it should.
"""

import argparse
import collections
import dataclasses
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from babel_jax.cli import main
from babel_jax.config import Family
from benchmarks import disk_faults
from tests.data.tokens.test_special_tokens import byte_level
from tests.hostile import test_model_folders as folders
from tests.hostile import test_text as text

SECONDS, MEMORY = 10.0, 2**30  # the bounds that an input should keep
HARD_SECONDS, HARD_MEMORY = 60, 6 * 2**30  # of processors; those at which it is ended
CLOCK_SECONDS = 300  # at which a process that waits is ended, also beside other work
# Imported before processes are forked: what commands import when they need it.
PRELOADED = (
    "array_record.python.array_record_module",
    "babel_jax.data.windows.prepare",
    "babel_jax.model_folders.folder",
    "babel_jax.model_folders.transfer",
    "babel_jax.recipe.recipe",
    "pandas",
    "pyarrow.parquet",
    "tensorflow_datasets.rlds",
    "transformers",
)
FRESH_EVERY = 19  # inputs, of which one runs by a new Python too: no divisor of the number of kinds
TALK = [{"role": "user", "content": "Habari?"}, {"role": "assistant", "content": "Nzuri."}]
TEMPLATE = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content | trim + '</s>\n' }}{% endfor %}"
PIECES = (
    "{% for a in range(99999) %}",
    "{{ 'a' * 10**10 }}",
    "{{ 9**9**9 }}",
    "{%",
    "}}",
    "{{ x.y.z }}",
    "{{ m.__class__ }}",
    "\ud7ff",
)


def model_case(name: str, draw: random.Random, place: Path) -> list[str]:
    """A changed file of a model folder."""
    source = folders.folder(place / "source", draw.choice((Family.QWEN2, Family.LLAMA, Family.MISTRAL)))
    folders.CHANGES[name](draw, source / name)
    if draw.random() < 0.5:
        return ["convert", str(source), str(place / "out")]
    return ["expand", str(source), str(place / "out"), "--insert-after", "1"]


def plan_case(_: str, draw: random.Random, place: Path) -> list[str]:
    """A changed plan."""
    source = folders.folder(place / "source", Family.LLAMA)
    (place / "plan.json").write_text(
        json.dumps({"layers": [{"source": 0}, {"source": 1}, {"source": 1, "init": "zero"}, {"source": 2}]})
    )
    folders.change_json(draw, place / "plan.json")
    return ["expand", str(source), str(place / "out"), "--plan", str(place / "plan.json")]


def text_case(name: str, draw: random.Random, place: Path) -> list[str]:
    """A changed file of text."""
    (place / name).write_bytes(text.mutated(text.FILES[name](), draw))
    return prepared(place, place / name, byte_level(place / "tokenizer"), draw)


def tokenizer_case(name: str, draw: random.Random, place: Path) -> list[str]:
    """A changed file of a tokenizer."""
    folder = byte_level(place / "tokenizer", begin="<s> $A")
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 258, "<|turn|>": 259}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "pad_token": {"content": "<|end|>"}})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    folders.change_json(draw, folder / name)
    (place / "en.jsonl").write_bytes(text.jsonl())
    return prepared(place, place / "en.jsonl", folder, draw)


def template_case(_: str, draw: random.Random, place: Path) -> list[str]:
    """A changed chat template."""
    folder = byte_level(place / "tokenizer")
    at = draw.randrange(len(TEMPLATE))
    (folder / "chat_template.jinja").write_text(
        TEMPLATE[:at] + draw.choice(PIECES) + TEMPLATE[at + draw.choice((0, 0, 3)) :]
    )
    (place / "en.jsonl").write_text(
        "".join(json.dumps({"id": str(number), "messages": TALK}) + "\n" for number in range(4))
    )
    return prepared(place, place / "en.jsonl", folder, draw, 'text_key = "messages"', "conversations = true")


def config_case(_: str, draw: random.Random, place: Path) -> list[str]:
    """A changed config."""
    (place / "en.jsonl").write_bytes(text.jsonl())
    arguments = prepared(place, place / "en.jsonl", byte_level(place / "tokenizer"), draw)
    config = place / "config.toml"
    config.write_bytes(text.mutated(config.read_bytes(), draw))
    return arguments


def prepared(
    place: Path, file: Path, tokenizer: Path, draw: random.Random, source: str = "", data: str = ""
) -> list[str]:
    """The arguments that prepare one file."""
    cleaning = "" if data or draw.random() < 0.5 else "\n[data.cleaning]\nmin_characters = 10\n"
    (place / "config.toml").write_text(
        f'out = "{place}/run"\n[model]\nfolder = "none"\n[data]\nfolder = "{place}/data"\ntokenizer = '
        f'"{tokenizer}"\nseq_len = 64\n'
        f'heldout_fraction = 0.0\nbad_rows = "{draw.choice(("skip", "refuse"))}"\n{data}\n{cleaning}'
        f'[[data.sources]]\nlanguage = "en"\npath = "{file}"\n{source}\n'
    )
    return ["prepare", str(place / "config.toml")]


KINDS = {
    **dict.fromkeys(folders.CHANGES, model_case),
    "plan.json": plan_case,
    **dict.fromkeys(text.FILES, text_case),
    "tokenizer.json of prepare": tokenizer_case,
    "tokenizer_config.json": tokenizer_case,
    "special_tokens_map.json": tokenizer_case,
    "added_tokens.json": tokenizer_case,
    "chat_template.jinja": template_case,
    "config.toml": config_case,
}


def ended_of(code: int, said: str) -> str:
    """How an input ended."""
    lines = _lines(said)
    if disk_faults.SECRET in said:
        return "secret told"
    if code == 0:
        return "used"
    if code == 2 and len(lines) == 1 and "Traceback" not in said and lines[0].isprintable():
        return "refused"
    return f"status {code}"


@dataclasses.dataclass
class Ended:
    """How a process ended that ran one input."""

    how: str
    seconds: float  # of processors
    mebibytes: float
    said: str  # with its folder as "PLACE"


def ended(kind: str, number: int, seed: int, fresh: bool) -> Ended:
    """Runs one input in a process of its own. This process has no threads of Python, so that it may fork."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        child = os.fork()
        if not child:
            _run_in_child(kind, f"{kind} {number}" + (f" {seed}" if seed else ""), place, fresh)
        _, status, used = os.wait4(child, 0)
        said = (place / "said").read_text(errors="replace").replace(folder, "PLACE")
    how = ended_of(os.waitstatus_to_exitcode(status), said)
    return Ended(how, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, said)


def _run_in_child(kind: str, seed: str, place: Path, fresh: bool) -> NoReturn:
    status = 99
    try:
        resource.setrlimit(resource.RLIMIT_AS, (HARD_MEMORY, HARD_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (HARD_SECONDS, HARD_SECONDS))
        signal.alarm(CLOCK_SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(place / "said", os.O_WRONLY | os.O_CREAT), 2)
        arguments = KINDS[kind](kind.split(" ")[0], random.Random(seed), place)
        if fresh:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "babel_jax.cli", *arguments],
                {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        status = main(arguments)
        sys.stderr.flush()
    except BaseException as error:  # what a user would see as a traceback
        os.write(2, f"Traceback {type(error).__name__}: {error}".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def all_ended(cases: list[tuple[str, int]], seed: int) -> Iterator[tuple[str, int, Ended]]:
    """(kind, number, how it ended) of each input. Where a new Python ends otherwise, that is how it ended."""
    for one, (kind, number) in enumerate(cases):
        found = ended(kind, number, seed, fresh=False)
        if one % FRESH_EVERY == 0:
            again = ended(kind, number, seed, fresh=True)
            if _lines(again.said) != _lines(found.said) or again.how != found.how:
                found.how, found.said = f"by a new Python {again.how}", f"{found.said} ... {again.said}"
            found.seconds = max(found.seconds, again.seconds)
            found.mebibytes = max(found.mebibytes, again.mebibytes)
        yield kind, number, found


def _lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("babel: ")]


def table() -> int:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument(
        "--kinds",
        default="",
        help="only kinds of input, and commands of faults, that have one of these in their name: train,sft",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and the faults")
    parser.add_argument("--processes", type=int, default=2, help="faults at a time")
    options = parser.parse_args()
    failed = inputs_table(options) if options.inputs else 0
    if options.faults:
        with tempfile.TemporaryDirectory() as folder:
            failed += faults_table(options, Path(folder))
    return int(failed > 0)


def chosen(names: Iterable[str], parts: str) -> list[str]:
    """The names that have one of some parts, which commas separate."""
    return [name for name in names if any(part in name for part in parts.split(","))]


def import_all() -> None:
    """Imports what the commands need, so that forked processes need not."""
    for module in PRELOADED:
        importlib.import_module(module)


def faults_table(options: argparse.Namespace, place: Path) -> int:
    """Meets all faults and prints the table, in a Python below the library that counts calls."""
    if disk_faults.LIBRARY not in os.environ:
        library = disk_faults.build(place)
        return subprocess.call(
            [sys.executable, *sys.argv, "--inputs", "0"],
            env={
                **os.environ,
                disk_faults.LIBRARY: str(library),
                # Programs that JAX compiles are shared by all processes, outside of the folder of faults.
                "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            },
        )
    import_all()
    names = chosen(disk_faults.SCENARIOS, options.kinds)
    return disk_faults.table(place, options.faults, options.seed, names, options.processes)


def inputs_table(options: argparse.Namespace) -> int:
    """Runs all inputs and prints the table; gives the number of those that went wrong."""
    kinds = chosen(KINDS, options.kinds)
    cases = [(kinds[number % len(kinds)], number // len(kinds)) for number in range(options.inputs)]
    os.environ |= {"HF_TOKEN": disk_faults.SECRET, "OPENAI_API_KEY": disk_faults.SECRET}
    import_all()
    by_kind: dict[str, list[Ended]] = collections.defaultdict(list)
    failed = 0
    for kind, number, one in all_ended(cases, options.seed):
        by_kind[kind].append(one)
        bounded = one.seconds <= SECONDS and one.mebibytes * 2**20 <= MEMORY
        if one.how not in ("used", "refused") or not bounded:
            failed += 1
            print(
                f"{kind} {number}: {one.how}, {one.seconds:.1f} s, {one.mebibytes:.0f} MiB: "
                f"{one.said[-400:]!r}",
                flush=True,
            )
    print(
        f"{'kind':34} {'inputs':>6} {'used':>6} {'refused':>8} {'other':>6} {'worst s':>8} {'worst MiB':>10}"
    )
    everything = [one for of_kind in by_kind.values() for one in of_kind]
    for kind, found in [*by_kind.items(), ("all", everything)]:
        counts = collections.Counter(one.how for one in found)
        other = len(found) - counts["used"] - counts["refused"]
        seconds, mebibytes = max(one.seconds for one in found), max(one.mebibytes for one in found)
        print(
            f"{kind:34} {len(found):6} {counts['used']:6} {counts['refused']:8} {other:6} {seconds:8.1f} "
            f"{mebibytes:10.0f}"
        )
    return failed


if __name__ == "__main__":
    sys.exit(table())
