"""Any task, group or tag of lm-evaluation-harness by its name: `lm-eval:afrimmlu_direct_yor`. The harness
reads the rows, from the hub.

The language of a task follows from the harness's own metadata: the configuration of its data set, else its
name. Where neither names one language, the user does: `lm-eval:hellaswag=en`.
"""

import difflib
import functools
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import lm_eval.tasks
from lm_eval.api.task import Task

from babel_jax.errors import BadInput, one_line
from babel_jax.evaluation.benchmarks.data import HARNESS
from babel_jax.evaluation.items import Items, accuracy
from babel_jax.languages import LANGUAGES, known_language, language

log = logging.getLogger("babel")

_LOCALE = re.compile(r"[A-Za-z]{2}_[A-Z]{2}\Z")
_PAIR = re.compile(r"(?:^|_)([a-z]{2,3})-([a-z]{2,3})(?:$|_)")
_WITH_SCRIPT = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_WORD = re.compile(r"[A-Za-z]+")
_NAMED = 8  # names in a message
_SEED = 1234  # the harness's own, for the draw of examples


class Chosen(NamedTuple):
    """The tasks of one language that count as one score."""

    language: str
    tasks: dict[str, Task]


@functools.cache
def _manager() -> lm_eval.tasks.TaskManager:
    log.info("reading the list of the harness's tasks")
    return lm_eval.tasks.TaskManager()


def load_named(
    asked: str, languages: Sequence[str] | None = None, few_shot: int | None = None
) -> list[Chosen]:
    """The tasks of `lm-eval:NAME` or `lm-eval:NAME=LANGUAGE` by language, with their rows.

    Raises BadInput for an unknown name, a task whose language is not known, languages that the task does not
    have, and rows that cannot be loaded.
    """
    name, _, given = asked.removeprefix(HARNESS).partition("=")
    manager = _manager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise BadInput(f"{asked}: the harness has no task of this name: {hint}`lm-eval ls tasks` lists them")
    by_language: dict[str, list[str]] = {}
    # One language for each task: a task whose language is unknown could not be put into a table.
    unknown = []
    for leaf in _leaves(name, set()):
        found = {language(given).code} if given else languages_of_task(leaf)
        if len(found) == 1:
            by_language.setdefault(next(iter(found)), []).append(leaf)
        else:
            unknown.append(leaf)
    if unknown:
        raise BadInput(
            f"{asked}: the harness does not say which language {_few(unknown)} is in; write "
            f"{HARNESS}{name}=en, with the code of its language"
        )
    wanted = set(by_language) if languages is None else {language(code).code for code in languages}
    if not wanted & by_language.keys():
        raise BadInput(f"{asked}: no data for {' '.join(sorted(wanted))}; it has {_few(sorted(by_language))}")
    chosen = []
    for code, leaves in by_language.items():
        if code in wanted:
            chosen.append(Chosen(code, _loaded(asked, leaves, few_shot)))
    return chosen


def languages_of_task(name: str) -> set[str]:
    """Our codes of the languages that the harness's metadata of a task names; English beside another one does
    not count.
    """
    config = _manager().task_index[name].cfg or {}
    metadata = config.get("metadata")
    stated = metadata.get("language") if isinstance(metadata, dict) else None
    for text in (stated, config.get("dataset_name"), name):
        if isinstance(text, str) and (found := _named_in(text)):
            return found - {"en"} or found
    return set()


def _named_in(text: str) -> set[str]:
    """The languages that a name such as `swh_Latn`, `yor`, `Tamil` or `mmlu_prox_sw_law` names."""
    if (whole := _by_any_name(text)) is not None:
        return {whole}
    # A language with a country, as in KO_KR.
    if _LOCALE.match(text):
        known = known_language(text[:2].lower())
        return {known.code} if known is not None else set()
    # Of two languages, both must be known: pcm-en is not English.
    if (pair := _PAIR.search(text)) is not None:
        both = _known_codes(pair.groups())
        return set(both) if len(both) == len(pair.groups()) else set()
    # A code with a script is surer than a word that may be a code.
    with_script = _known_codes(_WITH_SCRIPT.findall(text))
    if with_script:
        return set(with_script)
    found = set()
    for word in _WORD.findall(text):
        code = None if word in _NOT_CODES else _by_any_name(word)
        if code is not None:
            found.add(code)
    return found


def _known_codes(parts: Iterable[str]) -> list[str]:
    """Our codes of the parts that are codes of languages."""
    codes = []
    for part in parts:
        known = known_language(part)
        if known is not None:
            codes.append(known.code)
    return codes


# Words of names that are codes of languages too.
_NOT_CODES = frozenset(("is", "no", "in", "to", "or", "as", "am", "be", "he", "it", "my", "so", "el", "sc"))


def _by_any_name(word: str) -> str | None:
    known = known_language(word) if word.islower() or "_" in word else None
    return known.code if known is not None else _english_names().get(word.lower())


@functools.cache
def _english_names() -> dict[str, str]:
    return {one.name.lower(): code for code, one in LANGUAGES.items()} | {"tagalog": "tl"}


def _leaves(name: str, seen: set[str]) -> Iterator[str]:
    """The names of the tasks of a group or tag, or of one task. Raises BadInput for tasks within a group that
    have no name of their own.
    """
    manager = _manager()
    # A group may contain a task twice, directly and by another group.
    if name in seen:
        return
    seen.add(name)
    if name in manager.all_tags:
        for leaf in manager.all_subtasks:
            if name in manager.task_index[leaf].tags:
                yield leaf
        return
    if name not in manager.all_groups:
        yield name
        return
    for member in (manager.task_index[name].cfg or {}).get("task", []):
        within = member if isinstance(member, str) else member.get("task") or member.get("group")
        if not isinstance(within, str) or within not in manager.task_index:
            raise BadInput(f"{HARNESS}{name}: a group whose tasks have no names; name its tasks one by one")
        yield from _leaves(within, seen)


def _loaded(asked: str, leaves: Collection[str], few_shot: int | None) -> dict[str, Task]:
    loaded: dict[str, Task] = {}
    for leaf in leaves:
        try:
            task = _manager().load([leaf])["tasks"][leaf]
        # The harness and `datasets` raise errors of all kinds: of the network, of moved names, of scripts.
        except Exception as error:
            raise BadInput(f"{asked}: {leaf} cannot be had: {one_line(error, 200)}") from error
        # The harness's own number of examples, unless the user gives another.
        shots = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=shots if few_shot is None else few_shot)
        task.set_fewshot_seed(seed=_SEED)
        loaded[leaf] = _explained(asked, task)
    return loaded


def _explained(asked: str, task: Task) -> Task:
    """The task, whose errors about its items are BadInput."""
    build = task.build_all_requests

    def build_all_requests(*arguments: Any, **settings: Any) -> None:
        try:
            build(*arguments, **settings)
        # A template may fail in any way on a value of another type.
        except Exception as error:
            raise BadInput(
                f"{asked}: an item of {task.task_name} gives no prompt: {one_line(error, 200)}; its data set "
                "has another form than the harness's task"
            ) from error

    task.build_all_requests = build_all_requests
    return task


def items_of(asked: str, tasks: Collection[Task], samples: Sequence[Sequence[dict[str, Any]]]) -> Items:
    """The items of all tasks of a language together: percent of the first metric that is a mean over items.

    Raises BadInput if the tasks have no such metric.
    """
    values: list[float] = []
    for task, of_task in zip(tasks, samples, strict=True):
        metric = _metric(asked, task)
        # A task with several filters has each item once for each filter; the first one counts.
        first = of_task[0]["filter"] if of_task else None
        kept = [sample for sample in of_task if sample["filter"] == first]
        for sample in sorted(kept, key=lambda sample: sample["doc_id"]):
            value = sample.get(metric)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise BadInput(f"{asked}: {metric} of an item is {value!r}, not a number from 0 to 1")
            values.append(float(value))
    return accuracy(values)


def _metric(asked: str, task: Task) -> str:
    of_items = []
    for metric, aggregation in task.aggregation().items():
        if getattr(aggregation, "__name__", "") == "mean" and task.higher_is_better().get(metric, True):
            of_items.append(metric)
    if not of_items:
        raise BadInput(
            f"{asked}: {task.task_name} has no metric that is a mean over items (it has "
            f"{', '.join(task.aggregation())}), so there is no interval for it"
        )
    return str(of_items[0])


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
