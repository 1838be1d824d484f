"""The words at the head of a run's page: facts, the most important figures, sources, and what to do next."""

import datetime
import shlex
from pathlib import Path
from typing import Any

from babel_jax.errors import one_line
from babel_jax.evaluation.bits_per_byte import class_means, common_to
from babel_jax.evaluation.tables import bits_of, changes_between, percent_text
from babel_jax.languages import LANGUAGES, groups_with_means
from babel_jax.pages.charts import Figure, Table, number
from babel_jax.pages.document import Tile
from babel_jax.report.gate import PARENT_POINT
from babel_jax.report.record import RunRecord

_CHAT_TEMPLATE = "chat_template.jinja"
_LONGEST_PROMPT = 60  # characters


def facts(record: RunRecord) -> list[str]:
    """The facts about the run, a few words each."""
    config, steps = record.config, record.steps
    words = []
    if record.until is not None:
        date = datetime.datetime.fromtimestamp(record.until, datetime.UTC)
        words.append(f"{date:%Y-%m-%d %H:%M} UTC")
    if not record.summary:
        words.append("under way")
    words.append(f"from {config.model.folder}" if config.model.folder else "from random weights")
    # The model's list of expansions begins with those that its parent had before this run.
    deeper = (config.expansion is not None) + len(config.deepen)
    if deeper and record.plans:
        plans = [plan for _, plan in record.plans[-deeper:]]
        words.append(f"{plans[0].depth} → {len(plans[-1].layers)} layers")
    elif "layers" in record.summary:
        words.append(f"{record.summary['layers']} layers")
    if "parameters" in record.summary:
        words.append(f"{number(record.summary['parameters'])} parameters")
    words.append(f"{len(record.languages)} languages from {len(config.data.sources)} sources")
    if steps:
        tokens = sum(step["tokens"] for step in steps)
        words.append(f"{number(tokens)} tokens in {len(steps):,} steps")
    batch = config.training.global_batch_size
    words.append(f"batch {batch:,} × {config.data.seq_len:,} tokens")
    rates = [stage.schedule.peak for stage in config.stages]
    if rates:
        words.append(f"peak rate {' and '.join(f'{rate:g}' for rate in dict.fromkeys(rates))}")
    if total := sum(record.goodput.values()):
        words.append(f"{duration(total)} of wall time")
    # The median, because single steps may be much slower.
    speeds = sorted(step["tokens_per_second"] for step in steps if step.get("tokens_per_second"))
    if speeds:
        words.append(f"{number(speeds[len(speeds) // 2])} tokens/s")
    return words


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "3 min 5 s", "2 h 10 min", "3 d 4 h"."""
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def tiles(record: RunRecord, gate: dict[str, Any] | None) -> list[Tile]:
    """Bits per byte of the last point, and its change since the parent, with intervals."""
    evaluated = bits_of({name: record.points[name] for name in record.own_points})
    if not evaluated:
        return []
    last = [*evaluated][-1]
    if gate is not None:
        # Only languages that both points have can be compared.
        evaluated = common_to({name: evaluated[name] for name in (PARENT_POINT, last)})
    if not evaluated[last]:
        return []
    means, labels = class_means(evaluated[last]), groups_with_means(evaluated[last])
    only = LANGUAGES[next(iter(evaluated[last]))].name
    words = f"mean of {labels['all']}" if "all" in labels else only
    found = [Tile(f"bits per byte, {last}", f"{means['all']:.3f}", words)]

    # Without a parent there is no change to show.
    if gate is None:
        return found
    before = class_means(evaluated[PARENT_POINT])
    changed = changes_between(record.items, PARENT_POINT, last)
    # A run with few languages has no groups; then "all" stands for its one language.
    for group in ("all", "high", "low"):
        parent, model = before[group], means[group]
        if parent is None or model is None or (group not in labels and group != "all"):
            continue
        interval = changed.get(group)
        change, _, bounds = percent_text(100 * (model / parent - 1), interval).partition(" ")
        tone = ""
        if interval is not None and interval["low"] is not None and interval["high"] is not None:
            tone = "good" if interval["high"] < 0 else "bad" if interval["low"] > 0 else ""
        found.append(
            Tile(
                "against the parent",
                change.replace("-", "−"),
                f"{labels.get(group, only)}: {parent:.3f} → {model:.3f} {bounds.replace('-', '−')}",
                tone,
            )
        )
    return found


def sources_figure(record: RunRecord) -> Figure | None:
    """The sources of the text, with their licences, as a table."""
    rows = []
    for source in record.config.data.sources:
        name = source.label
        rows.append([LANGUAGES[source.language].name, name, source.kind, source.licence or "not named"])
    if not rows:
        return None
    return Figure(
        "sources",
        "Sources",
        "The licence of a text is that of its source, as the config names it.",
        [],
        Table(["Language", "Source", "Kind", "Licence"], rows),
        is_folded=len(rows) > 12,
    )


def next_commands(record: RunRecord, run_folder: Path) -> list[tuple[str, str]]:
    """(purpose, command) of each command to use a finished model; empty for an unfinished run."""
    if not record.summary:
        return []
    hf = shlex.quote(str(run_folder / "hf"))
    commands = []
    if (run_folder / "hf" / _CHAT_TEMPLATE).is_file():
        commands.append(("Talk with the model", f"babel chat {hf}"))
    else:
        # The beginning of a held-out text, as in the samples of the page.
        beginnings = [sample["prompt"] for sample in record.samples.values()]
        prompt = shlex.quote(one_line(beginnings[0], _LONGEST_PROMPT) if beginnings else "Once upon a time")
        commands.append(("Let the model go on with a text", f"babel generate {hf} {prompt}"))
    out = shlex.quote(str(run_folder / "benchmarks"))
    parent = record.config.model.folder
    against = f" --baseline {shlex.quote(parent)}" if parent else ""
    commands.append(
        ("Measure it on the six benchmarks", f"babel evaluate {hf}{against} --tasks all --out {out}")
    )
    commands.append(("Put it on the hub, with its card", f"babel push {hf} OWNER/NAME"))
    return commands
