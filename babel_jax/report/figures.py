"""The figures of a run's report, each a chart with its table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from babel_jax.config import Init
from babel_jax.evaluation.benchmarks.tables import TITLES
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.items import BITS_PER_BYTE
from babel_jax.evaluation.points import LOWER_IS_BETTER, point_names, scores_of
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS, Results
from babel_jax.expansion.card import initial_state
from babel_jax.languages import CODES, LANGUAGES, Resource, in_order
from babel_jax.report.charts import Curve, Figure, Table, averaged, bars, dots, layers, lines, number, spark
from babel_jax.report.record import RunRecord

_MEANS = "Means"
GROUPS = {Resource.HIGH: "High-resource", Resource.LOW: "Low-resource"}
# The number of the first stage's series: base and expanded come before. A stage has the colour of its result.
_STAGES = 2
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
        points = {name: results for name, results in record.points.items() if results.get(task)}
        if points:
            series = {name: [*record.points].index(name) for name in points}
            figures.append(_task_figure(task, points, series, point_names(record.config)))
    return figures


def _task_figure(
    task: str, points: Mapping[str, Results], series: Mapping[str, int], run: Sequence[str]
) -> Figure:
    """The figure of one task. run: the points of the run itself, over which the change is computed."""
    title, words = _TASKS.get(task, (TITLES.get(task, task), "score; more is better"))
    scores = {name: scores_of(results, task) for name, results in points.items()}
    means = {name: class_means(values) for name, values in scores.items()}
    names = list(points)
    codes = in_order(code for values in scores.values() for code in values)
    # Rows of values by point: first the means, then the languages of each resource class.
    groups: dict[str, dict[str, list[float | None]]] = {_MEANS: {}}
    for group, label in (("all", "all"), ("high", "high-resource"), ("low", "low-resource")):
        row = [means[name][group] for name in names]
        if any(value is not None for value in row):
            groups[_MEANS][label] = row
    for resource, label in GROUPS.items():
        members = [code for code in codes if LANGUAGES[code].resource is resource]
        if members:
            groups[label] = {}
        for code in members:
            groups[label][LANGUAGES[code].name] = [scores[name].get(code) for name in names]

    marks = {"chance": CHANCE[task]} if task in CHANCE else {}
    items = {code: result["n"] for code, result in next(iter(points.values()))[task].items()}
    percent = task in LOWER_IS_BETTER

    def change(row: Sequence[float | None]) -> str:
        row = [value for name, value in zip(names, row, strict=True) if name in run]
        if len(row) < 2 or row[0] is None or row[-1] is None:
            return ""
        if percent:
            return f"{100 * (row[-1] / row[0] - 1):+.1f}%" if row[0] else ""
        return f"{row[-1] - row[0]:+.1f}"

    digits = 3 if percent else 1
    codes_by_name = {LANGUAGES[code].name: code for code in codes}
    rows = []
    for group, of_group in groups.items():
        for label, row in of_group.items():
            language_class = "mean" if group == _MEANS else group.removesuffix("-resource").lower()
            cells = ["" if value is None else f"{value:.{digits}f}" for value in row]
            count = items.get(codes_by_name.get(label, ""))
            rows.append([label, language_class, *cells, change(row), "" if count is None else str(count)])

    sentence = words[0].upper() + words[1:] + "."
    if marks:
        sentence += f" The dashed line is chance ({CHANCE[task]:.0f}%)."
    unit = "bits per byte" if percent else words.rsplit(", ", 1)[-1]
    return Figure(
        task,
        title,
        sentence,
        [("", "", dots(groups, series, unit, marks))],
        Table(["Language", "Class", *names, "Change", "Items"], rows),
        series,
        open_table=percent,
    )


def loss_figure(record: RunRecord) -> Figure | None:
    """Training loss by stage."""
    curves = _by_stage(record.steps, lambda step: step["loss"])
    if not curves:
        return None
    series = {name: index for index, name in enumerate(curves, _STAGES)}
    # The mean is drawn over the thin line; the table has six rows for each stage.
    smooth = {name: averaged(curve, 25) for name, curve in curves.items()}
    rows = []
    for name, curve in curves.items():
        few = averaged(curve, 6)
        rows += [[name, f"{step:.0f}", f"{loss:.3f}"] for step, loss in few]
    shown = {name: averaged(curve, 400) for name, curve in curves.items()}
    return Figure(
        "loss",
        "Training loss by stage",
        "Nats per token of each step's batch (thin line), and the running mean. Stages read different "
        "mixtures, so their losses cannot be compared.",
        [("", "", lines(smooth, series, "step", "nats per token", shown))],
        Table(["Stage", "Step (mean of a sixth)", "Loss"], rows),
        series,
    )


def during_figure(record: RunRecord) -> Figure | None:
    """The mean of bits per byte, evaluated between steps."""
    labels = {"all": "all languages", "high": "high-resource", "low": "low-resource"}
    all_curves: dict[str, list[tuple[float, float]]] = {label: [] for label in labels.values()}
    rows = []
    for line in record.during:
        means = class_means(scores_of(line["tasks"], BITS_PER_BYTE))
        cells = [str(line["step"])]
        for group, label in labels.items():
            mean = means[group]
            if mean is not None:
                all_curves[label].append((line["step"], mean))
            cells.append("" if mean is None else f"{mean:.3f}")
        rows.append(cells)

    # One point is no curve.
    curves = {label: curve for label, curve in all_curves.items() if len(curve) > 1}
    if not curves:
        return None
    series = {label: index for index, label in enumerate(curves, _STAGES)}
    best = ""
    if record.best:
        best = f" The best is after step {record.best['step']}: {record.best['bits_per_byte']:.3f}."
    return Figure(
        "during",
        "Bits per byte during training",
        f"Means over languages, on held-out text.{best}",
        [("", "", lines(curves, series, "steps", "bits per byte"))],
        Table(["Steps", *labels.values()], rows),
        series,
    )


def language_loss_figure(record: RunRecord) -> Figure | None:
    """Training loss of each language."""
    curves: dict[str, list[tuple[float, float]]] = {code: [] for code in CODES}
    for step in record.steps:
        for code, loss in step["loss_by_language"].items():
            if loss is not None and code in curves:
                curves[code].append((step["step"], loss))

    # One point is no curve.
    drawn = {code: curve for code, curve in curves.items() if len(curve) > 1}
    if not drawn:
        return None

    drawings, rows = [], []
    for code, curve in drawn.items():
        smooth = averaged(curve, 30)
        note = f"{smooth[0][1]:.2f} → {smooth[-1][1]:.2f}"
        drawings.append((LANGUAGES[code].name, note, spark(smooth)))
        rows.append([LANGUAGES[code].name, *(f"{loss:.2f}" for _, loss in averaged(curve, 5))])
    parts = max(map(len, rows)) - 1
    return Figure(
        "language-loss",
        "Training loss by language",
        "Nats per token over the run, each language on its own scale; above each curve are its first and "
        "its last mean.",
        drawings,
        Table(["Language", *(f"part {part + 1} of {parts}" for part in range(parts))], rows),
    )


def mixture_figures(record: RunRecord) -> Iterator[Figure]:
    """The share of each language in each stage's tokens, and the passes over its text at the end."""
    if record.mixtures:
        names = list(record.mixtures)
        series = {name: index for index, name in enumerate(names, _STAGES)}
        shares = {name: _shares(mixture["rows"]) for name, mixture in record.mixtures.items()}
        groups = _grouped(
            lambda code: [100 * shares[name].get(code, 0.0) for name in names] if _any(shares, code) else None
        )
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
        groups = _grouped(lambda code: [tokens[code]] if code in tokens else None)
        rows = []
        for code in CODES:
            if code in tokens:
                passes = f"{epochs[code]:.2f}" if code in epochs else ""
                rows.append([LANGUAGES[code].name, f"{tokens[code]:,}", passes])
        yield Figure(
            "tokens",
            "Tokens and passes by language",
            f"Tokens trained on up to step {last['step']}, and the passes over each language's text (in the "
            "table).",
            [("", "", bars(groups, {"tokens": _STAGES + 1}, "tokens"))],
            Table(["Language", "Tokens", "Passes"], rows),
        )


def expansion_figures(record: RunRecord) -> Iterator[Figure]:
    """Each expansion, drawn as layers."""
    for index, (_, plan) in enumerate(record.plans):
        new, labels = {}, {}
        for target in plan.new_layers:
            layer = plan.layers[target]
            new[target] = initial_state(plan, target)
            labels[target] = _SHORT_INITS[layer.init].format(layer.source)
        begins = ""
        if new:
            begins = f" New layers are filled; they begin as {' or '.join(dict.fromkeys(new.values()))}."
        yield Figure(
            f"expansion-{index}",
            f"Expansion: {plan.depth} layers become {len(plan.layers)}",
            f"The source of each layer of the deeper model, with the input at the bottom.{begins}",
            [("", "", layers(plan.source_layers, labels, plan.depth))],
            Table(
                ["Layer", "Taken from", "State"],
                [
                    [str(target), str(layer.source), f"new: {new[target]}" if target in new else "kept"]
                    for target, layer in enumerate(plan.layers)
                ],
            ),
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
        [("", "", bars({"Wall time": shares}, {"share": _STAGES}, "% of wall time"))],
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
        worst = max(
            compared, key=lambda step: step["slowest_process_seconds"] - step["median_process_seconds"]
        )
        slowest, median = worst["slowest_process_seconds"], worst["median_process_seconds"]
        words += (
            f" The slowest process, {worst['slowest_process']} up to step {worst['step']}, took "
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


def _by_stage(steps: Sequence[Mapping[str, Any]], value: Any) -> dict[str, Curve]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        if value(step) is not None:
            curves.setdefault(step["stage"], []).append((step["step"], value(step)))
    return dict(curves)


def _grouped(row_of: Any) -> dict[str, dict[str, Sequence[float]]]:
    """The rows of the languages that have one, by resource class."""
    groups: dict[str, dict[str, Sequence[float]]] = {}
    for resource, label in GROUPS.items():
        for code in CODES:
            if LANGUAGES[code].resource is resource and (row := row_of(code)) is not None:
                groups.setdefault(label, {})[LANGUAGES[code].name] = row
    return groups


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for row in rows:
        shares[row["language"]] = shares.get(row["language"], 0.0) + row["share"]
    return shares


def _any(shares: Mapping[str, Mapping[str, float]], code: str) -> bool:
    return any(code in of_stage for of_stage in shares.values())
