"""The mixtures of a run's stages side by side, before training: the tokens that each language and kind has,
its share, and its share without the cap.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import Config
from babel_jax.data.batches.mixture import Dataset, MixtureRow, make_mixture
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.errors import BadInput
from babel_jax.files import make_folder, write_text
from babel_jax.languages import LANGUAGES, Resource, position
from babel_jax.pages.charts import Figure, Table, bars
from babel_jax.pages.document import Section, page_text
from babel_jax.plots import BAD, INK, saved_figure
from babel_jax.training.stages import plan_stages

_WITHOUT_CAP = 1e15  # passes


@dataclasses.dataclass(frozen=True)
class DatasetPart:
    """The part of one dataset in a stage: its share of the tokens, its share without the cap on epochs, its
    passes, and True if the cap limits it.
    """

    share: float
    uncapped_share: float
    epochs: float
    at_cap: bool


@dataclasses.dataclass(frozen=True)
class StageMixture:
    """The mixture of one stage of `tokens` tokens; `parts` is by language and kind."""

    name: str
    tokens: int
    max_epochs: float
    parts: dict[Dataset, DatasetPart]
    warnings: tuple[str, ...]

    def share(self, datasets: Iterable[Dataset], of: str = "share") -> float:
        """The sum of the shares of several datasets."""
        result: float = sum(getattr(self.parts[key], of) for key in datasets if key in self.parts)
        return result


def stage_mixtures(config: Config) -> list[StageMixture]:
    """The mixtures of a run's stages, for its prepared data.

    Raises BadInput as `plan_stages` does, and if there is no stage.
    """
    if not config.stages:
        raise BadInput("stages is empty; name at least one stage with its mixture")
    available = open_prepared(config.data.folder).available
    stages = []
    for plan in plan_stages(config):
        settings, budget = plan.stage.mixture, plan.tokens
        # The same mixture without the cap on epochs, to show what the cap changes.
        uncapped = make_mixture(available, settings.model_copy(update={"max_epochs": _WITHOUT_CAP}), budget)
        wanted = {(row.language, row.kind): row.share for row in uncapped.rows}
        parts = {}
        for row in plan.mixture.rows:
            dataset = row.language, row.kind
            parts[dataset] = _part(row, wanted.get(dataset, 0.0), settings.max_epochs)
        stage = StageMixture(plan.stage.name, budget, settings.max_epochs, parts, plan.mixture.warnings)
        stages.append(dataclasses.replace(stage, warnings=(*stage.warnings, *_shortages(stage))))
    return stages


def mixture_report(config: Config, out: Path) -> dict[str, Any]:
    """Writes mixture.md, .csv, .json, .png and .html into the folder `out`. Returns the content of
    mixture.json, with the table as `summary`.
    """
    stages = stage_mixtures(config)
    available = open_prepared(config.data.folder).available
    make_folder(out)
    rows = sorted(available, key=lambda key: (position(key[0]), key[1]))
    titles, warnings = [], []
    for stage in stages:
        titles.append(f"{stage.name} ({stage.tokens:,} tokens)")
        warnings += [f"warning: {stage.name}: {warning}" for warning in stage.warnings]
    text = "\n".join(
        [
            f"# Mixtures of {', '.join(titles)}",
            "",
            mixtures_table(stages, rows, available),
            "",
            "Uncapped: the share without the cap on epochs. `=` marks text that the cap limits: it is read",
            "max_epochs times, and the others get the tokens that it cannot take.",
            *warnings,
            "",
            f"Page: {out / 'mixture.html'}. Plot: {out / 'mixture.png'}",
        ]
    )

    # The figures of the table as plain values, for programs.
    result = {
        "data": config.data.folder,
        "out": str(out),
        "available": [_dataset_fields(key, available) for key in rows],
        "stages": {stage.name: _stage_fields(stage, rows, available) for stage in stages},
    }
    plot_mixtures(out / "mixture.png", stages, rows, available)
    write_text(out / "mixture.html", _page(config.out, stages, rows, available))
    write_text(out / "mixture.csv", _csv(stages, rows, available))
    write_text(out / "mixture.md", text + "\n")
    write_text(out / "mixture.json", json.dumps(result, indent=2) + "\n")
    return {**result, "summary": text}


def _dataset_fields(key: Dataset, available: dict[Dataset, int]) -> dict[str, Any]:
    language, kind = key
    return {"language": language, "kind": kind, "tokens": available[key]}


def _stage_fields(
    stage: StageMixture, rows: Sequence[Dataset], available: dict[Dataset, int]
) -> dict[str, Any]:
    """The figures of the table as plain values."""
    stage_rows = []
    for key in rows:
        if key in stage.parts:
            stage_rows.append({**_dataset_fields(key, available), **dataclasses.asdict(stage.parts[key])})
    return {
        "tokens": stage.tokens,
        "max_epochs": stage.max_epochs,
        "rows": stage_rows,
        "classes": {str(resource): stage.share(_of_class(rows, resource)) for resource in Resource},
        "warnings": list(stage.warnings),
    }


def mixtures_table(
    stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]
) -> str:
    """Markdown: a row for each dataset and for each class of languages; for each stage its share, its share
    without the cap, and epochs.
    """
    columns = []
    for stage in stages:
        columns += [f"{stage.name} {column}" for column in ("share %", "uncapped %", "epochs")]
    lines = [
        "| language | class | kind | tokens | " + " | ".join(columns) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(columns) + 1),
    ]
    for key in rows:
        cells: list[str] = []
        for stage in stages:
            part = stage.parts.get(key)
            if part is None:
                cells += ["", "", ""]
                continue
            epochs = f"{part.epochs:.2f}{' =' if part.at_cap else ''}"
            cells += [f"{100 * part.share:.3f}", f"{100 * part.uncapped_share:.3f}", epochs]
        language = LANGUAGES[key[0]]
        lines.append(
            f"| {language.name} ({key[0]}) | {language.resource} | {key[1]} | {available[key]:,} | "
            f"{' | '.join(cells)} |"
        )

    # Below: sums over the languages of each class.
    for resource in Resource:
        members = _of_class(rows, resource)
        tokens = sum(available[key] for key in members)
        cells = []
        for stage in stages:
            share, uncapped = stage.share(members), stage.share(members, "uncapped_share")
            passes = share * stage.tokens / tokens if tokens else 0.0
            cells += [f"{100 * share:.3f}", f"{100 * uncapped:.3f}", f"{passes:.2f}"]
        lines.append(f"| **all {resource}-resource** | | | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_mixtures(
    path: Path, stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]
) -> None:
    """A PNG with a panel for each stage: the share of each language by kind, the most that its text allows,
    and its share without the cap.
    """
    datasets_of = _by_language(rows)
    codes, kinds = list(datasets_of), sorted({kind for _, kind in rows})
    with saved_figure(path, len(stages), (13, 1 + 4 * len(stages))) as panels:
        for stage, axes in zip(stages, [panels] if len(stages) == 1 else panels, strict=True):
            # Bars: the kinds of a language, one on another.
            below = [0.0] * len(codes)
            for kind in kinds:
                heights = [100 * stage.share([(code, kind)]) for code in codes]
                axes.bar(range(len(codes)), heights, 0.7, bottom=below, label=kind)
                below = [so_far + height for so_far, height in zip(below, heights, strict=True)]

            # Marks: the share without the cap, and the share that the cap allows.
            wanted, reach = [], []
            for datasets in datasets_of.values():
                tokens = sum(available[key] for key in datasets)
                wanted.append(100 * stage.share(datasets, "uncapped_share"))
                reach.append(100 * stage.max_epochs * tokens / stage.tokens)
            axes.scatter(
                range(len(codes)),
                wanted,
                marker="o",
                facecolors="none",
                edgecolors=INK,
                zorder=3,
                label="without the cap",
            )
            axes.scatter(
                range(len(codes)),
                reach,
                marker="_",
                s=220,
                color=BAD,
                zorder=3,
                label=f"its text {stage.max_epochs:g} times",
            )
            axes.set_ylim(0, 1.15 * max(*below, *wanted))
            axes.set_ylabel("% of the tokens")
            axes.set_title(f"{stage.name}, {stage.tokens:,} tokens (* low-resource)")
            names = []
            for code in codes:
                language = LANGUAGES[code]
                names.append(language.name + (" *" if language.resource is Resource.LOW else ""))
            axes.set_xticks(range(len(codes)), names, rotation=45, ha="right")
            axes.legend(ncols=len(kinds) + 2)


def _page(
    name: str, stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]
) -> str:
    """One HTML page: for each stage the share of each language, with the cap and without it."""
    figures = []
    for index, stage in enumerate(stages):
        groups: dict[str, dict[str, list[float]]] = {}
        for code, datasets in _by_language(rows).items():
            shares = [100 * stage.share(datasets), 100 * stage.share(datasets, "uncapped_share")]
            title = f"{LANGUAGES[code].resource.capitalize()}-resource"
            groups.setdefault(title, {})[LANGUAGES[code].name] = shares
        table = []
        for key in rows:
            if (part := stage.parts.get(key)) is not None:
                figures_of_part = [f"{100 * part.share:.2f}", f"{100 * part.uncapped_share:.2f}"]
                passes = f"{part.epochs:.2f}{' (cap)' if part.at_cap else ''}"
                language = LANGUAGES[key[0]]
                table.append([language.name, *figures_of_part, passes, key[1], f"{available[key]:,}"])
        series = {"share": 2, "without the cap": 0}
        heads = ["Language", "Share, %", "Without the cap, %", "Passes", "Kind", "Tokens there are"]
        figures.append(
            Figure(
                f"stage-{index}",
                f"{stage.name}: {stage.tokens:,} tokens",
                f"Share of the stage's tokens. A text is read at most {stage.max_epochs:g} times (the cap)."
                + "".join(f" Warning: {warning}." for warning in stage.warnings),
                [("", "", bars(groups, series, "% of the stage's tokens"))],
                Table(heads, table),
                series,
                open_table=True,
            )
        )
    tokens = f"{sum(available.values()):,} tokens of text"
    facts = [tokens, f"{len(_by_language(rows))} languages", f"{len(stages)} stages"]
    return page_text("mixture of a babel-jax run", name, facts, [Section("stages", "Stages", figures)])


def _part(row: MixtureRow, wanted: float, max_epochs: float) -> DatasetPart:
    return DatasetPart(row.share, wanted, row.epochs, row.epochs >= max_epochs * (1 - 1e-6))


def _shortages(stage: StageMixture) -> list[str]:
    """A line for each language that the cap on epochs keeps below its share."""
    lines = []
    for code, datasets in _by_language(stage.parts).items():
        share, wanted = stage.share(datasets), stage.share(datasets, "uncapped_share")
        # Below its share because its own text is too short, and not because another language took more.
        if share < wanted * (1 - 1e-6) and any(stage.parts[key].at_cap for key in datasets):
            passes = max(stage.parts[key].epochs for key in datasets)
            lines.append(
                f"too little text in {LANGUAGES[code].name} ({code}): it gives {100 * share:.3g}% of the "
                f"tokens in {passes:.3g} passes, and its part would be {100 * wanted:.3g}%"
            )
    return lines


def _by_language(datasets: Iterable[Dataset]) -> dict[str, list[Dataset]]:
    """The datasets of each language; languages in the registry's order."""
    by_language: dict[str, list[Dataset]] = {}
    for key in sorted(datasets, key=lambda key: position(key[0])):
        by_language.setdefault(key[0], []).append(key)
    return by_language


def _of_class(rows: Sequence[Dataset], resource: Resource) -> list[Dataset]:
    return [key for key in rows if LANGUAGES[key[0]].resource is resource]


def _csv(stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(DatasetPart)]
    heads = ["language", "class", "kind", "tokens"]
    for stage in stages:
        heads += [f"{stage.name}_{field}" for field in fields]
    lines.writerow(heads)
    for key in rows:
        # A dataset without a part in a stage has empty cells there.
        values = []
        for stage in stages:
            values += [getattr(stage.parts.get(key), field, "") for field in fields]
        lines.writerow([key[0], LANGUAGES[key[0]].resource, key[1], available[key], *values])
    return text.getvalue()
