"""Disks that fail and processes that end, at the n-th call by which a command changes the disk: what came of
each.

`benchmarks/hostile.py --faults N` runs this. Each fault is a run of a command in a process of its own, below
a library in C (disk_faults.c, made by `cc`) that counts the calls of all libraries; then the same command
runs again, undisturbed.
"""

import collections
import ctypes
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.cli import main
from babel_jax.digests import check_sums, is_list, lists_below
from babel_jax.files import PARTIAL
from benchmarks.fault_scenarios import SCENARIOS, make_inputs

LIBRARY = "LD_PRELOAD"
KILLED = 9  # exit status of a process that disk_faults.c ends
HARD_SECONDS = 600  # of a clock, also beside other work
TELL_EVERY = 20  # faults
CLASSES = ("open", "write", "rename", "link", "fsync", "unlink", "mkdir", "room")
ERRORS = {"killed": 0, "EIO": 5, "ENOSPC": 28, "EACCES": 13, "EINVAL": 22}
NOT_COMPARED = ("params/files.json", "goodput.json")  # sizes of files of which some hold times; seconds
# In keys of JSON: a run that was disturbed has lost some.
TIMES = re.compile(r"\.(time_spent|goodput|seconds)\b")
UNFINISHED = (".partial", "orbax-checkpoint-tmp")  # in names of what is being written
SECRET = "sk-planted-0123456789abcdef"


@dataclasses.dataclass(frozen=True)
class Fault:
    """The call numbered `at` (from 1) of a command, which is of a class, fails in a way of ERRORS."""

    scenario: str
    at: int
    kind: str  # of CLASSES
    error: str  # of ERRORS

    def __str__(self) -> str:
        return f"{self.scenario}, {self.error} at call {self.at} ({self.kind})"


@dataclasses.dataclass
class Ended:
    """How a run of a command ended."""

    status: int
    said: str
    seconds: float  # of processors
    mebibytes: float

    @property
    def in_one_line(self) -> bool:
        """Whether it was refused as bad input is."""
        lines = [line for line in self.said.splitlines() if line.startswith("babel: ")]
        return (
            self.status == 2 and len(lines) == 1 and lines[0].isprintable() and "Traceback" not in self.said
        )


@dataclasses.dataclass
class Outcome:
    """What came of a fault: `first` is of OUTCOMES, `wrong` names what must not be ({} where all is well)."""

    fault: Fault
    first: str
    wrong: dict[str, str]
    seconds: float
    mebibytes: float


OUTCOMES = ("killed", "refused", "tolerated", "not met", "other")
WRONG = ("status", "half-written", "lost", "silent", "left behind", "secret")


def build(folder: Path) -> Path:
    """The library of disk_faults.c, made into a folder. It must be in LD_PRELOAD when Python starts."""
    library, source = folder / "disk_faults.so", Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def run(
    arguments: list[str], work: Path, at: int = 0, error: str = "killed", calls: Path | None = None
) -> Ended:
    """Runs a command in a forked process, in the folder `work`. This process has no threads, so that it may
    fork.

    With `at`, that call fails. With `calls`, the classes of all calls are written there, a byte each.
    """
    said = work.with_name(f"{work.name}.said")
    child = os.fork()
    if not child:
        status = 99
        try:
            signal.alarm(HARD_SECONDS)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(work)
            if at or calls:
                library = ctypes.CDLL(os.environ[LIBRARY])
                library.fault_arm(
                    f"{work}/".encode(), ctypes.c_long(at), ERRORS[error], int(error == "ENOSPC")
                )
            status = main(arguments)
            sys.stderr.flush()
            if calls:
                number = library.fault_calls()
                calls.write_bytes(bytes(library.fault_class(ctypes.c_long(one + 1)) for one in range(number)))
        except BaseException as problem:  # what a user would see as a traceback
            os.write(
                2, ("Traceback\n" + "".join(traceback.format_exception(problem))).encode("utf-8", "replace")
            )
        finally:
            os._exit(status)
    _, status, used = os.wait4(child, 0)
    text = said.read_text(errors="replace")
    return Ended(
        os.waitstatus_to_exitcode(status), text, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    )


def command_of(name: str, base: Path) -> list[str]:
    """The arguments of a scenario."""
    return [part.format(base=base) for part in SCENARIOS[name].arguments]


def finish(name: str, work: Path) -> str | None:
    """Runs what follows a scenario, where its files must be brought into a form to compare; gives what went
    wrong.
    """
    then = SCENARIOS[name].then
    if not then:
        return None
    ended = run(list(then), work)
    return f"{then}: {ended.status}: {ended.said[-1500:]}" if ended.status else None


def begin(name: str, base: Path, work: Path) -> None:
    """Makes the folder in which a scenario runs."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for copied in SCENARIOS[name].copied:
        shutil.copytree(base / copied, work / Path(copied).name)


class Expected:
    """What a command leaves on disk, told from two undisturbed runs: what differs between them (times, random
    names) is not compared.
    """

    def __init__(self, one: Path, two: Path):
        first, second = _files(one), _files(two)
        both = first.keys() & second.keys()
        self.random_names = {_without_numbers(name) for name in first.keys() ^ second.keys()}
        self._bytes = {
            name: hashlib.sha256(first[name]).digest() for name in both if first[name] == second[name]
        }
        self._leaves: dict[str, Mapping[str, Any]] = {}
        for name in both - self._bytes.keys():
            ours, theirs = (
                ({}, {}) if name.endswith(NOT_COMPARED) else (_leaves(first[name]), _leaves(second[name]))
            )
            agree = {key: value for key, value in ours.items() if theirs.get(key, ...) == value}
            self._leaves[name] = {key: value for key, value in agree.items() if not TIMES.search(key)}

    def compared(self) -> tuple[int, int]:
        """The number of files that are compared to the bit, and of files of which some values are."""
        return len(self._bytes), sum(bool(leaves) for leaves in self._leaves.values())

    def difference(self, work: Path, below: str = "") -> str | None:
        """The first difference of the files of a folder (of those whose names begin with `below`) to those
        expected.
        """
        found = _files(work)
        for name in self._bytes.keys() | self._leaves.keys():
            if not name.startswith(below):
                continue
            if name not in found:
                return f"{name} is missing"
            if name in self._bytes and hashlib.sha256(found[name]).digest() != self._bytes[name]:
                return f"{name} has other bytes"
            leaves = _leaves(found[name]) if name in self._leaves else {}
            for key, value in self._leaves.get(name, {}).items():
                if leaves.get(key, ...) != value:
                    return f"{name}: {key} is {leaves.get(key)!r}, not {value!r}"
        return None

    def left(self, work: Path) -> str | None:
        """A file that no undisturbed run leaves."""
        known = self._bytes.keys() | self._leaves.keys()
        others = (
            name
            for name in _files(work)
            if name not in known and _without_numbers(name) not in self.random_names
        )
        # NAME.partial may be of another process; `write_bytes` removes it once it is old.
        return next((name for name in others if name.removesuffix(PARTIAL) not in known), None)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9a-f]{8,}|[0-9]+", "#", name)


def _leaves(data: bytes) -> dict[str, Any]:
    """The numbers and strings of JSON or JSON lines, by where they are; none of another file."""
    try:
        values = [json.loads(data)]
    except ValueError:
        try:
            values = [json.loads(line) for line in data.splitlines()]
        except ValueError:
            return {}
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [(str(number), value) for number, value in enumerate(values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{key}.{name}", one) for name, one in inner]
        else:
            found[key] = value
    return found


def half_written(work: Path) -> str | None:
    """What has its final name and is not whole: against the lists of digests, and as JSON."""
    lists = [path for path in lists_below(work) if not any(part in str(path) for part in UNFINISHED)]
    damaged = check_sums(lists, work).damaged
    if damaged:
        return str(next(iter(damaged.items())))
    for path in work.rglob("*.json"):
        if not any(part in str(path) for part in UNFINISHED) and not is_list(path):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                return f"{path}: no JSON"
    return None


def outcome_of(fault: Fault, base: Path, work: Path, expected: Expected) -> Outcome:
    """Meets a fault, then runs the same command again, and judges both."""
    begin(fault.scenario, base, work)
    arguments, whole = command_of(fault.scenario, base), SCENARIOS[fault.scenario].whole
    wrong: dict[str, str] = {}
    one = run(arguments, work, fault.at, fault.error)
    first = "other"
    if one.status == KILLED and fault.error == "killed":
        first = "killed"
    elif one.status == 0:
        first = "not met" if fault.error == "killed" else "tolerated"
    elif one.in_one_line:
        first = "refused"
    else:
        wrong["status"] = f"{one.status}: {one.said[-1500:]}"
    if one.status == 0 and (difference := finish(fault.scenario, work) or expected.difference(work)):
        wrong["silent"] = difference
    if broken := half_written(work):
        wrong["half-written"] = broken
    if whole and (work / whole).exists() and (difference := expected.difference(work, whole)):
        wrong["half-written"] = difference
    shutil.rmtree(work / "back", ignore_errors=True)
    two = run(arguments, work)
    finished = whole is not None and two.in_one_line and "exists already" in two.said
    if two.status != 0 and not finished:
        wrong["lost"] = f"again {two.status}: {two.said[-1500:]}"
    elif difference := finish(fault.scenario, work) or expected.difference(work):
        wrong["silent"] = f"again: {difference}"
    elif left := expected.left(work):
        wrong["left behind"] = left
    texts = [one.said.encode(), two.said.encode(), *_files(work).values()]
    if any(SECRET.encode() in text for text in texts):
        wrong["secret"] = "in what it wrote"
    return Outcome(fault, first, wrong, max(one.seconds, two.seconds), max(one.mebibytes, two.mebibytes))


def drawn(classes: Mapping[str, bytes], number: int, seed: int) -> list[Fault]:
    """So many faults: each scenario by its weight, each class of its calls alike, each error alike."""
    draw = random.Random(seed)
    names = [name for name, scenario in SCENARIOS.items() if name in classes for _ in range(scenario.weight)]
    faults = []
    for one in range(number):
        name = names[one % len(names)]
        kinds = sorted(set(classes[name]))
        kind = draw.choice(kinds)
        at = draw.choice([place for place, found in enumerate(classes[name], 1) if found == kind])
        faults.append(Fault(name, at, CLASSES[kind], draw.choice(list(ERRORS))))
    return faults


def inputs_in(base: Path, names: Iterable[str]) -> None:
    """Makes the inputs of some scenarios."""

    def undisturbed(arguments: list[str], folder: Path) -> None:
        ended = run(arguments, folder)
        if ended.status:
            raise RuntimeError(f"{arguments}: status {ended.status}: {ended.said}")

    make_inputs(base, undisturbed, names)


def undisturbed_runs(name: str, base: Path, place: Path) -> tuple[Expected, bytes, Ended]:
    """What a scenario leaves, and the classes of its calls."""
    for number in range(2):
        work = place / f"undisturbed{number}"
        begin(name, base, work)
        ended = run(command_of(name, base), work, calls=place / "calls")
        failed = ended.said if ended.status else finish(name, work)
        if failed:
            raise RuntimeError(f"{name}: {failed}")
    expected = Expected(place / "undisturbed0", place / "undisturbed1")
    return expected, (place / "calls").read_bytes(), ended


def outcomes(place: Path, number: int, seed: int, names: Sequence[str], at_a_time: int) -> Iterator[Outcome]:
    """The outcomes of so many faults of some scenarios, as they come."""
    base = place / "base"
    base.mkdir()
    os.environ |= {"HF_TOKEN": SECRET, "OPENAI_API_KEY": SECRET}
    inputs_in(base, names)
    known = {name: undisturbed_runs(name, base, place) for name in names}
    for name, (expected, classes, ended) in known.items():
        exact, partly = expected.compared()
        counts = ", ".join(
            f"{count} {CLASSES[kind]}" for kind, count in sorted(collections.Counter(classes).items())
        )
        print(
            f"{name}: {ended.seconds:.1f} s; calls: {counts}; compared: {exact} files to the bit, {partly} "
            "in values",
            flush=True,
        )
    faults = drawn({name: classes for name, (_, classes, _) in known.items()}, number, seed)
    before = {name: hashlib.sha256(data).digest() for name, data in _files(base).items()}
    read, write = os.pipe()
    for worker in range(at_a_time):
        if not os.fork():
            try:
                os.close(read)
                for fault in faults[worker::at_a_time]:
                    outcome = outcome_of(fault, base, place / f"work{worker}", known[fault.scenario][0])
                    os.write(write, json.dumps(dataclasses.asdict(outcome)).encode()[:4000] + b"\n")
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as lines:
        for line in lines:
            values = json.loads(line)
            yield Outcome(**values | {"fault": Fault(**values["fault"])})
    assert {name: hashlib.sha256(data).digest() for name, data in _files(base).items()} == before, (
        "an input was changed"
    )


def table(place: Path, number: int, seed: int, names: Sequence[str], at_a_time: int) -> int:
    """Prints what came of so many faults of some scenarios; gives the number of those that went wrong."""
    found: dict[str, list[Outcome]] = collections.defaultdict(list)
    for met, outcome in enumerate(outcomes(place, number, seed, names, at_a_time), 1):
        found[outcome.fault.scenario].append(outcome)
        if met % TELL_EVERY == 0:
            print(f"{met} faults met", flush=True)
        if outcome.wrong:
            print(f"{outcome.fault}: {outcome.wrong}", flush=True)
    print(
        f"{'command':18} {'faults':>6} "
        + " ".join(f"{name:>12}" for name in (*OUTCOMES, *WRONG))
        + f" {'worst s':>8} {'MiB':>6}"
    )
    for name, results in [*found.items(), ("all", [one for some in found.values() for one in some])]:
        first = collections.Counter(one.first for one in results)
        wrong = collections.Counter(kind for one in results for kind in one.wrong)
        counts = [*(first[kind] for kind in OUTCOMES), *(wrong[kind] for kind in WRONG)]
        worst = max(one.seconds for one in results), max(one.mebibytes for one in results)
        print(
            f"{name:18} {len(results):6} "
            + " ".join(f"{count:12}" for count in counts)
            + f" {worst[0]:8.1f} {worst[1]:6.0f}"
        )
    return sum(bool(one.wrong) for some in found.values() for one in some)
