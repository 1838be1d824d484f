"""The figures of a run's report, each a chart with its table."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from babel_jax.config import Init
from babel_jax.evaluation.benchmarks.tables import TITLES
from babel_jax.evaluation.bits_per_byte import class_means, common_to
from babel_jax.evaluation.items import BITS_PER_BYTE, FEWEST_ITEMS, changes, differences
from babel_jax.evaluation.points import LOWER_IS_BETTER, scores_of
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS
from babel_jax.evaluation.tables import TOO_LITTLE, Interval, percent_text
from babel_jax.expansion.card import initial_state
from babel_jax.languages import LANGUAGES, Resource, groups_with_means, in_order
from babel_jax.pages.charts import Figure, Table, bars, dots, layers, number
from babel_jax.report.curves import STAGES
from babel_jax.report.record import RunRecord

_MEANS = "Means"
_CANNOT_TRANSLATE = 5  # chrF++; unrelated text of one script has more
GROUPS = {Resource.HIGH: "High-resource", Resource.LOW: "Low-resource"}
_SHORT_INITS = {
    Init.COPY: "copy of {}",
    Init.NOISE: "{} with noise",
    Init.ZERO: "zeros",
    Init.AVERAGE: "mean of {} and next",
}
_TASKS = {
    BITS_PER_BYTE: ("Bits per byte", "bits to predict a byte of held-out text; fewer are better"),
    "continuation": ("Continuation", "which of four sentences continues a held-out passage, % correct"),
    "cloze": ("Cloze", "which of four words fills a gap in a held-out sentence, % correct"),
    "to_english": ("Translation to English", "held-out sentences after one example, chrF++"),
    "from_english": ("Translation from English", "held-out sentences after one example, chrF++"),
}


def evaluation_figures(record: RunRecord) -> list[Figure]:
    """For each task, a dot for each point of the run in each language, with the means."""
    tasks: dict[str, None] = {}  # a dict keeps the order
    for results in record.points.values():
        tasks |= dict.fromkeys(results)
    figures = []
    for task in tasks:
        has_scores = any(of_point.get(task) for of_point in record.points.values())
        if has_scores:
            figures.append(_task_figure(record, task))
    return figures


def _task_figure(record: RunRecord, task: str) -> Figure:
    """The figure of one task. The change is that over the points of the run itself."""
    # Only points that have this task; a point keeps its colour over all figures.
    points = {name: results for name, results in record.points.items() if results.get(task)}
    series = {name: [*record.points].index(name) for name in points}
    title, words = _TASKS.get(task, (TITLES.get(task, task), "score; more is better"))
    scores = {name: scores_of(results, task) for name, results in points.items()}
    names = list(points)
    codes = in_order(set[str]().union(*scores.values()))
    is_bits = task in LOWER_IS_BETTER
    groups = _rows_by_group(scores, codes)

    # Rows of the table: those of the chart, with the change after the name, where a phone still shows it.
    digits = 3 if is_bits else 1
    intervals = _intervals(record, task, [name for name in names if name in record.own_points])
    sizes = next(iter(points.values()))[task]
    rows: list[list[str]] = []
    tones: dict[int, str] = {}
    for group, of_group in groups.items():
        for key, (label, row) in of_group.items():
            language_class = "mean" if group == _MEANS else str(LANGUAGES[key].resource)
            cells = ["" if value is None else f"{value:.{digits}f}" for value in row]
            size = sizes.get(key, {})
            counts = [f"{size['n']:,}" if "n" in size else ""]
            if is_bits:
                counts.append(f"{size['bytes']:,}" if size.get("bytes") is not None else "")
            change, tone = _change(record, task, row, names, intervals.get(key))
            if tone or group == _MEANS:
                tones[len(rows)] = f"{tone} mean".strip() if group == _MEANS else tone
            rows.append([label, change, language_class, *cells, *counts])

    marks = {"chance": CHANCE[task]} if task in CHANCE else {}
    sentence = words[0].upper() + words[1:] + "."
    if marks:
        sentence += f" The dashed line is chance ({CHANCE[task]:.0f}%)."
    if any("[?]" in row[1] for row in rows):
        sentence += f" [?]: not enough text to tell; an interval needs {FEWEST_ITEMS} documents."
    # The scores of a model that cannot translate yet would only take room.
    highest = max((max(values.values()) for values in scores.values()), default=0.0)
    is_folded = task in TRANSLATION_TASKS and highest < _CANNOT_TRANSLATE
    if is_folded:
        sentence += f" All scores are below {_CANNOT_TRANSLATE}: the model cannot translate yet."
    unit = "bits per byte" if is_bits else words.rsplit(", ", 1)[-1]
    chart = {}
    for group, of_group in groups.items():
        chart[group] = dict(of_group.values())
    counted = ["Documents", "Bytes"] if is_bits else ["Items"]
    return Figure(
        task,
        title,
        sentence,
        [("", "", dots(chart, series, unit, marks))],
        Table(["Language", "Change [95%]", "Class", *names, *counted], rows, tones),
        series,
        open_table=is_bits,
        is_folded=is_folded,
    )


def _rows_by_group(
    scores: Mapping[str, Mapping[str, float]], codes: Sequence[str]
) -> dict[str, dict[str, tuple[str, list[float | None]]]]:
    """{title: {language or group: (label, values by point)}}: the means, then the languages of each class."""
    common = common_to(scores)
    means = [class_means(values) for values in common.values()]
    groups: dict[str, dict[str, tuple[str, list[float | None]]]] = {}
    labels = groups_with_means(set[str]().union(*common.values()))
    for group in ("all", "high", "low"):
        if group in labels:
            # "all 25" and "14 low": the chart has little room.
            label = labels[group].removesuffix(" languages").removesuffix("-resource")
            groups.setdefault(_MEANS, {})[group] = (label, [of_point[group] for of_point in means])
    for resource, title in GROUPS.items():
        for code in codes:
            if LANGUAGES[code].resource is resource:
                row = [values.get(code) for values in scores.values()]
                groups.setdefault(title, {})[code] = (LANGUAGES[code].name, row)
    return groups


def _intervals(record: RunRecord, task: str, run: Sequence[str]) -> Mapping[str, Interval]:
    """The intervals of the change over the run's points; empty if there is none."""
    if len(run) < 2 or run[0] not in record.items or run[-1] not in record.items:
        return {}
    first, last = record.items[run[0]], record.items[run[-1]]
    if task in LOWER_IS_BETTER:
        return changes(task, last, first)
    return differences({task: last.get(task, {})}, {task: first.get(task, {})}).get(task, {})


def _change(
    record: RunRecord, task: str, row: Sequence[float | None], names: Sequence[str], interval: Interval | None
) -> tuple[str, str]:
    """The change over the run's points with its interval, and "bad" if the whole interval is worse."""
    values = [value for name, value in zip(names, row, strict=True) if name in record.own_points]
    if len(values) < 2 or values[0] is None or values[-1] is None:
        return "", ""
    # Bits per byte change in percent, scores in points.
    is_bits = task in LOWER_IS_BETTER
    change = values[-1] - values[0]
    if is_bits:
        change = 100 * change / values[0] if values[0] else 0.0
    text = percent_text(change, interval, "%" if is_bits else "").replace(f"[{TOO_LITTLE}]", "[?]")
    if interval is None or interval["low"] is None or interval["high"] is None:
        return text, ""
    is_worse = interval["low"] > 0 if is_bits else interval["high"] < 0
    return text, "bad" if is_worse else ""


def mixture_figures(record: RunRecord) -> Iterator[Figure]:
    """The share of each language in each stage's tokens, and the passes over its text at the end."""
    if record.mixtures:
        names = list(record.mixtures)
        # A stage has the same colour here as in the curves.
        series = {name: index for index, name in enumerate(names, STAGES)}
        shares = {name: _shares(mixture["rows"]) for name, mixture in record.mixtures.items()}
        drawn = set[str]().union(*shares.values())
        groups = _grouped(drawn, lambda code: [100 * shares[name].get(code, 0.0) for name in names])
        rows = []
        warnings: dict[str, None] = {}  # a dict keeps the order
        for name in names:
            warnings |= dict.fromkeys(record.mixtures[name]["warnings"])
            for row in record.mixtures[name]["rows"]:
                figures = [f"{row['tokens']:,}", f"{100 * row['share']:.2f}", f"{row['epochs']:.2f}"]
                rows.append([LANGUAGES[row["language"]].name, name, row["kind"], *figures])
        yield Figure(
            "mixture",
            "Mixture of each stage",
            "Share of a stage's tokens by language."
            + "".join(f" Warning: {warning}." for warning in warnings),
            [("", "", bars(groups, series, "% of the stage's tokens"))],
            Table(["Language", "Stage", "Kind", "Tokens there are", "Share, %", "Passes"], rows),
            series,
        )

    # The last step has the sums over the whole run.
    last = record.steps[-1] if record.steps else {}
    if last.get("tokens_by_language"):
        tokens, epochs = last["tokens_by_language"], last["epochs_by_language"]
        groups = _grouped(tokens, lambda code: [tokens[code]])
        rows = []
        for code in in_order(tokens):
            passes = f"{epochs[code]:.2f}" if code in epochs else ""
            rows.append([LANGUAGES[code].name, f"{tokens[code]:,}", passes])
        yield Figure(
            "tokens",
            "Tokens and passes by language",
            f"Tokens trained on up to step {last['step'] + 1}, and the passes over each language's text (in "
            "the table).",
            [("", "", bars(groups, {"tokens": STAGES + 1}, "tokens"))],
            Table(["Language", "Tokens", "Passes"], rows),
        )


def expansion_figures(record: RunRecord) -> Iterator[Figure]:
    """Each expansion, drawn as layers."""
    for index, (_, plan) in enumerate(record.plans):
        new, labels = {}, {}
        # Long words for the table, short ones for the drawing.
        for target in plan.new_layers:
            layer = plan.layers[target]
            new[target] = initial_state(plan, target)
            labels[target] = _SHORT_INITS[layer.init].format(layer.source)
        begins = ""
        if new:
            begins = f" New layers are filled; they begin as {' or '.join(dict.fromkeys(new.values()))}."
        rows = []
        for target, layer in enumerate(plan.layers):
            state = f"new: {new[target]}" if target in new else "kept"
            rows.append([str(target), str(layer.source), state])
        yield Figure(
            f"expansion-{index}",
            f"Expansion: {plan.depth} layers become {len(plan.layers)}",
            f"The source of each layer of the deeper model, with the input at the bottom.{begins}",
            [("", "", layers(plan.source_layers, labels, plan.depth))],
            Table(["Layer", "Taken from", "State"], rows),
        )


def goodput_figure(record: RunRecord) -> Figure | None:
    """The uses of wall time."""
    total = sum(record.goodput.values())
    if not total:
        return None
    shares, rows = {}, []
    for name, seconds in sorted(record.goodput.items(), key=lambda pair: -pair[1]):
        shares[name] = [100 * seconds / total]
        rows.append([name, f"{seconds:,.1f}", f"{100 * seconds / total:.1f}"])
    return Figure(
        "goodput",
        "Where the time went",
        f"{record.goodput.get('step', 0.0) / total:.1%} of {number(total)} s of wall time, restarts "
        f"included, went to steps that count.{_devices(record.steps)}",
        [("", "", bars({"Wall time": shares}, {"share": STAGES}, "% of wall time"))],
        Table(["What", "Seconds", "Share, %"], rows),
    )


def _devices(steps: Sequence[Mapping[str, Any]]) -> str:
    """The memory of the devices, and the slowest process, if the lines of steps have them."""
    words = ""
    if memory := [step for step in steps if "device_memory_peak_gib" in step]:
        fullest = max(memory, key=lambda step: step["device_memory_peak_gib"])
        limit = (
            f" of {fullest['device_memory_limit_gib']:.1f}" if "device_memory_limit_gib" in fullest else ""
        )
        words += f" The fullest device of process 0 held {fullest['device_memory_peak_gib']:.1f}{limit} GiB."
    if compared := [step for step in steps if "slowest_process" in step]:
        # By the difference: in the first steps all processes are slow alike.
        worst = max(
            compared, key=lambda step: step["slowest_process_seconds"] - step["median_process_seconds"]
        )
        slowest, median = worst["slowest_process_seconds"], worst["median_process_seconds"]
        words += (
            f" The slowest process, {worst['slowest_process']} up to step {worst['step'] + 1}, took "
            f"{slowest:.3f} s of its own for a step, the median process {median:.3f} s."
        )
    return words


def suite_note(record: RunRecord) -> str:
    """The note on the suite's scores; empty if there are none."""
    evaluated = set().union(*record.points.values())
    if evaluated.isdisjoint((*CHOICE_TASKS, *TRANSLATION_TASKS)):
        return ""
    return (
        "The offline suite has a few items in each language, made from the run's held-out text in the form "
        "of well-known benchmarks. It shows large differences; it cannot rank models."
    )


def _grouped(codes: Iterable[str], row_of: Any) -> dict[str, dict[str, Sequence[float]]]:
    """The rows of these languages, by resource class."""
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for resource, label in GROUPS.items():
        for code in in_order(codes):
            if LANGUAGES[code].resource is resource:
                groups.setdefault(label, {})[LANGUAGES[code].name] = row_of(code)
    return groups


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for row in rows:
        shares[row["language"]] = shares.get(row["language"], 0.0) + row["share"]
    return shares
