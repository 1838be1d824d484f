"""The figures of a run's report, each a chart with its table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from babel_jax.config import Init
from babel_jax.evaluation.benchmarks.tables import TITLES
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.points import BITS_PER_BYTE, LOWER_IS_BETTER, point_names, scores_of
from babel_jax.evaluation.suite import CHANCE, CHOICE_TASKS, TRANSLATION_TASKS, Results
from babel_jax.expansion.card import initial_state
from babel_jax.languages import CODES, LANGUAGES, Resource
from babel_jax.report.charts import Curve, Figure, Table, averaged, bars, dots, layers, lines, number, spark
from babel_jax.report.record import RunRecord

_MEANS = "Means"
GROUPS = {Resource.HIGH: "High-resource", Resource.LOW: "Low-resource"}
# Base and expanded come before the results of the stages, which have the colours of their results.
_STAGES = 2
_IN_SHORT = {
    Init.COPY: "copy of {}",
    Init.NOISE: "{} with noise",
    Init.ZERO: "zeros",
    Init.AVERAGE: "mean of {} and next",
}
_TASKS = {
    BITS_PER_BYTE: ("Bits per byte", "bits to predict a byte of held-out text; fewer are better"),
    "continuation": ("Continuation", "which of four sentences goes on a held-out passage, % right"),
    "cloze": ("Cloze", "which of four words fills a gap in a held-out sentence, % right"),
    "to_english": ("Translation to English", "held-out sentences after one example, chrF++"),
    "from_english": ("Translation from English", "held-out sentences after one example, chrF++"),
}


def evaluation_figures(record: RunRecord) -> list[Figure]:
    """For each task a dot for each point of the run in each language, with the means."""
    tasks = list(dict.fromkeys(task for results in record.points.values() for task in results))
    found = []
    for task in tasks:
        points = {name: results for name, results in record.points.items() if results.get(task)}
        if points:
            series = {name: [*record.points].index(name) for name in points}
            found.append(_task_figure(task, points, series, point_names(record.config)))
    return found


def _task_figure(
    task: str, points: Mapping[str, Results], series: Mapping[str, int], run: Sequence[str]
) -> Figure:
    """`run` are the points of the run itself, over which a change is given."""
    title, words = _TASKS.get(task, (TITLES.get(task, task), "score; more is better"))
    scores = {name: scores_of(results, task) for name, results in points.items()}
    means = {name: class_means(values) for name, values in scores.items()}
    names = list(points)
    codes = [code for code in CODES if any(code in values for values in scores.values())]
    groups: dict[str, dict[str, list[float | None]]] = {_MEANS: {}}
    for group, label in (("all", "all"), ("high", "high-resource"), ("low", "low-resource")):
        groups[_MEANS][label] = [means[name][group] for name in names]
    for resource, label in GROUPS.items():
        own = {
            LANGUAGES[code].name: [scores[name].get(code) for name in names]
            for code in codes
            if LANGUAGES[code].resource is resource
        }
        if own:
            groups[label] = own
    groups[_MEANS] = {
        label: row for label, row in groups[_MEANS].items() if any(value is not None for value in row)
    }
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

    places = 3 if percent else 1
    codes_by_name = {LANGUAGES[code].name: code for code in codes}
    rows = []
    for group, of_group in groups.items():
        for label, row in of_group.items():
            cells = ["" if value is None else f"{value:.{places}f}" for value in row]
            asked = items.get(codes_by_name.get(label, ""))
            rows.append(
                [
                    label,
                    "mean" if group == _MEANS else group.removesuffix("-resource").lower(),
                    *cells,
                    change(row),
                    "" if asked is None else str(asked),
                ]
            )
    return Figure(
        task,
        title,
        words[0].upper()
        + words[1:]
        + (f". The dashed line is chance ({CHANCE[task]:.0f}%)." if marks else "."),
        [
            (
                "",
                "",
                dots(groups, series, words.rsplit(", ", 1)[-1] if not percent else "bits per byte", marks),
            )
        ],
        Table(["Language", "Class", *names, "Change", "Items"], rows),
        series,
        open_table=percent,
    )


def loss_figure(record: RunRecord) -> Figure | None:
    """Training loss by stage."""
    curves = _by_stage(record.steps, lambda step: step["loss"])
    if not curves:
        return None
    series = {name: place for place, name in enumerate(curves, _STAGES)}
    smooth = {name: averaged(curve, 25) for name, curve in curves.items()}
    rows = []
    for name, curve in curves.items():
        few = averaged(curve, 6)
        rows += [[name, f"{step:.0f}", f"{loss:.3f}"] for step, loss in few]
    shown = {name: averaged(curve, 400) for name, curve in curves.items()}
    return Figure(
        "loss",
        "Training loss by stage",
        "Nats per token of each step's batch, thin, and its running mean. Stages read other mixtures, so "
        "that their losses do not compare.",
        [("", "", lines(smooth, series, "step", "nats per token", shown))],
        Table(["Stage", "Step (mean of a sixth)", "Loss"], rows),
        series,
    )


def during_figure(record: RunRecord) -> Figure | None:
    """Bits per byte measured between steps, in the mean."""
    measured = [
        (line["step"], class_means(scores_of(line["tasks"], BITS_PER_BYTE))) for line in record.during
    ]
    labels = {"all": "all languages", "high": "high-resource", "low": "low-resource"}
    curves = {
        label: [(step, mean) for step, means in measured if (mean := means[group]) is not None]
        for group, label in labels.items()
    }
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    series = {label: place for place, label in enumerate(curves, _STAGES)}
    best = (
        f" The best is after step {record.best['step']}: {record.best['bits_per_byte']:.3f}."
        if record.best
        else ""
    )
    rows = [
        [f"{step}", *("" if means[group] is None else f"{means[group]:.3f}" for group in labels)]
        for step, means in measured
    ]
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
    curves = {
        code: [
            (step["step"], step["loss_by_language"][code])
            for step in record.steps
            if step["loss_by_language"].get(code) is not None
        ]
        for code in CODES
    }
    curves = {code: curve for code, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    few = {code: averaged(curve, 5) for code, curve in curves.items()}
    cells = []
    for code, curve in curves.items():
        smooth = averaged(curve, 30)
        cells.append((LANGUAGES[code].name, f"{smooth[0][1]:.2f} → {smooth[-1][1]:.2f}", spark(smooth)))
    most = max(len(values) for values in few.values())
    return Figure(
        "language-loss",
        "Training loss by language",
        "Nats per token over the run, each language on its own scale; the first and the last mean stand "
        "above.",
        cells,
        Table(
            ["Language", *(f"part {part + 1} of {most}" for part in range(most))],
            [[LANGUAGES[code].name, *(f"{loss:.2f}" for _, loss in values)] for code, values in few.items()],
        ),
    )


def mixture_figures(record: RunRecord) -> Iterator[Figure]:
    """What share of each stage's tokens each language has, and how often its text is read by the end."""
    if record.mixtures:
        names = list(record.mixtures)
        series = {name: place for place, name in enumerate(names, _STAGES)}
        shares = {name: _shares(mixture["rows"]) for name, mixture in record.mixtures.items()}
        groups = _grouped(
            lambda code: [100 * shares[name].get(code, 0.0) for name in names] if _any(shares, code) else None
        )
        rows = [
            [
                LANGUAGES[row["language"]].name,
                name,
                row["kind"],
                f"{row['tokens']:,}",
                f"{100 * row['share']:.2f}",
                f"{row['epochs']:.2f}",
            ]
            for name in names
            for row in record.mixtures[name]["rows"]
        ]
        warnings = [warning for mixture in record.mixtures.values() for warning in mixture["warnings"]]
        yield Figure(
            "mixture",
            "Mixture of each stage",
            "Share of a stage's tokens by language."
            + "".join(f" Warning: {warning}." for warning in dict.fromkeys(warnings)),
            [("", "", bars(groups, series, "% of the stage's tokens"))],
            Table(["Language", "Stage", "Kind", "Tokens there are", "Share, %", "Passes"], rows),
            series,
        )
    last = record.steps[-1] if record.steps else {}
    if last.get("tokens_by_language"):
        tokens, epochs = last["tokens_by_language"], last["epochs_by_language"]
        yield Figure(
            "tokens",
            "Tokens and passes by language",
            f"Tokens trained on up to step {last['step']}, and how often each language's text was read (in "
            "the table).",
            [
                (
                    "",
                    "",
                    bars(
                        _grouped(lambda code: [tokens[code]] if code in tokens else None),
                        {"tokens": _STAGES + 1},
                        "tokens",
                    ),
                )
            ],
            Table(
                ["Language", "Tokens", "Passes"],
                [
                    [
                        LANGUAGES[code].name,
                        f"{tokens[code]:,}",
                        f"{epochs[code]:.2f}" if code in epochs else "",
                    ]
                    for code in CODES
                    if code in tokens
                ],
            ),
        )


def expansion_figures(record: RunRecord) -> Iterator[Figure]:
    """Each expansion drawn as layers."""
    for place, (_, plan) in enumerate(record.plans):
        new = {target: initial_state(plan, target) for target in plan.new_layers}
        drawn = {
            target: _IN_SHORT[plan.layers[target].init].format(plan.layers[target].source) for target in new
        }
        begins = (
            f" New layers are filled; they begin as {' or '.join(dict.fromkeys(new.values()))}."
            if new
            else ""
        )
        yield Figure(
            f"expansion-{place}",
            f"Expansion: {plan.depth} layers become {len(plan.layers)}",
            f"Where each layer of the deeper model is taken from, the input at the bottom.{begins}",
            [("", "", layers(plan.source_layers, drawn, plan.depth))],
            Table(
                ["Layer", "Taken from", "State"],
                [
                    [str(target), str(layer.source), f"new: {new[target]}" if target in new else "kept"]
                    for target, layer in enumerate(plan.layers)
                ],
            ),
        )


def goodput_figure(record: RunRecord) -> Figure | None:
    """What the wall time went to."""
    total = sum(record.goodput.values())
    if not total:
        return None
    parts = sorted(record.goodput.items(), key=lambda pair: -pair[1])
    return Figure(
        "goodput",
        "Where the time went",
        (
            f"{record.goodput.get('step', 0.0) / total:.1%} of {number(total)} s of wall time, restarts "
            "included, went to steps that count."
        )
        + _devices(record.steps),
        [
            (
                "",
                "",
                bars(
                    {"Wall time": {name: [100 * seconds / total] for name, seconds in parts}},
                    {"share": _STAGES},
                    "% of wall time",
                ),
            )
        ],
        Table(
            ["What", "Seconds", "Share, %"],
            [[name, f"{seconds:,.1f}", f"{100 * seconds / total:.1f}"] for name, seconds in parts],
        ),
    )


def _devices(steps: Sequence[Mapping[str, Any]]) -> str:
    """Memory of the devices, and the slowest of several processes, where the lines of steps say it."""
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
        own, middle = worst["slowest_process_seconds"], worst["median_process_seconds"]
        words += (
            f" The slowest process, {worst['slowest_process']} up to step {worst['step']}, took {own:.3f} s "
            "of its own for a step,"
        )
        words += f" the one in the middle {middle:.3f} s."
    return words


def suite_note(record: RunRecord) -> str:
    """What must be said of the suite's numbers, where there are any."""
    if not any(
        task in results for results in record.points.values() for task in (*CHOICE_TASKS, *TRANSLATION_TASKS)
    ):
        return ""
    return (
        "The offline suite asks a few items of each language, made of the run's own held-out text, in the "
        "forms of the big benchmarks. "
        "It shows large differences and does not rank models."
    )


def _by_stage(steps: Sequence[Mapping[str, Any]], value: Any) -> dict[str, Curve]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in steps:
        if value(step) is not None:
            curves.setdefault(step["stage"], []).append((step["step"], value(step)))
    return dict(curves)


def _grouped(row_of: Any) -> dict[str, dict[str, Sequence[float]]]:
    """Rows of the languages that have one, in their resource classes."""
    found: dict[str, dict[str, Sequence[float]]] = {}
    for resource, label in GROUPS.items():
        for code in CODES:
            if LANGUAGES[code].resource is resource and (row := row_of(code)) is not None:
                found.setdefault(label, {})[LANGUAGES[code].name] = row
    return found


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for row in rows:
        shares[row["language"]] = shares.get(row["language"], 0.0) + row["share"]
    return shares


def _any(shares: Mapping[str, Mapping[str, float]], code: str) -> bool:
    return any(code in of_stage for of_stage in shares.values())
