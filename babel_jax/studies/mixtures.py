"""The mixtures of a run's stages side by side, before anything is trained: what each language and kind has,
gets, and would want.
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
from babel_jax.languages import LANGUAGES, Resource
from babel_jax.plots import saved_figure
from babel_jax.training.stages import plan_stages

_WITHOUT_CAP = 1e15  # passes


@dataclasses.dataclass(frozen=True)
class DatasetPart:
    """What one dataset gets in a stage: its share of the tokens, the share it would get were there no cap,
    its passes, and whether the cap holds it."""

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
        """The share of several datasets together."""
        return sum(getattr(self.parts[key], of) for key in datasets if key in self.parts)


def stage_mixtures(config: Config) -> list[StageMixture]:
    """The mixtures of a run's stages, by its prepared data.

    Raises BadInput as `plan_stages` does, and where there is no stage.
    """
    if not config.stages:
        raise BadInput("stages is empty; name at least one stage with its mixture")
    available = open_prepared(config.data.folder).available
    stages = []
    for plan in plan_stages(config):
        settings, budget = plan.stage.mixture, plan.tokens
        uncapped = make_mixture(available, settings.model_copy(update={"max_epochs": _WITHOUT_CAP}), budget)
        wanted = {(row.language, row.kind): row.share for row in uncapped.rows}
        parts = {
            (row.language, row.kind): _part(
                row, wanted.get((row.language, row.kind), 0.0), settings.max_epochs
            )
            for row in plan.mixture.rows
        }
        stages.append(
            StageMixture(plan.stage.name, budget, settings.max_epochs, parts, plan.mixture.warnings)
        )
    return [dataclasses.replace(stage, warnings=(*stage.warnings, *_short(stage))) for stage in stages]


def mixture_report(config: Config, out: Path) -> dict[str, Any]:
    """Writes mixture.md, .csv, .json and .png into the folder `out`, and gives what mixture.json holds, with
    the table as `summary`.
    """
    stages = stage_mixtures(config)
    available = open_prepared(config.data.folder).available
    make_folder(out)
    rows = sorted(available, key=lambda key: (list(LANGUAGES).index(key[0]), key[1]))
    warnings = [f"{stage.name}: {warning}" for stage in stages for warning in stage.warnings]
    text = "\n".join(
        [
            "# Mixtures of " + ", ".join(f"{stage.name} ({stage.tokens:,} tokens)" for stage in stages),
            "",
            mixtures_table(stages, rows, available),
            "",
            (
                "Uncapped: the share were there no cap on epochs. `=` marks what the cap holds: its text "
                "is read max_epochs times, and what it"
            ),
            "cannot take goes to the others.",
            *(f"warning: {warning}" for warning in warnings),
            "",
            f"Plot: {out / 'mixture.png'}",
        ]
    )
    result = {
        "data": config.data.folder,
        "out": str(out),
        "available": [
            {"language": language, "kind": kind, "tokens": available[language, kind]}
            for language, kind in rows
        ],
        "stages": {
            stage.name: {
                "tokens": stage.tokens,
                "max_epochs": stage.max_epochs,
                "rows": [
                    {
                        "language": key[0],
                        "kind": key[1],
                        "tokens": available[key],
                        **dataclasses.asdict(stage.parts[key]),
                    }
                    for key in rows
                    if key in stage.parts
                ],
                "classes": {str(resource): stage.share(_of_class(rows, resource)) for resource in Resource},
                "warnings": list(stage.warnings),
            }
            for stage in stages
        },
    }
    plot_mixtures(out / "mixture.png", stages, rows, available)
    write_text(out / "mixture.csv", _csv(stages, rows, available))
    write_text(out / "mixture.md", text + "\n")
    write_text(out / "mixture.json", json.dumps(result, indent=2) + "\n")
    return {**result, "summary": text}


def mixtures_table(
    stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]
) -> str:
    """Markdown: a row for each dataset and for each class of languages; for each stage its share, its share
    without the cap, and epochs.
    """
    columns = [f"{stage.name} {column}" for stage in stages for column in ("share %", "uncapped %", "epochs")]
    lines = [
        "| language | class | kind | tokens | " + " | ".join(columns) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(columns) + 1),
    ]
    for key in rows:
        cells: list[str] = []
        for stage in stages:
            part = stage.parts.get(key)
            cells += (
                ["", "", ""]
                if part is None
                else [
                    f"{100 * part.share:.3f}",
                    f"{100 * part.uncapped_share:.3f}",
                    f"{part.epochs:.2f}{' =' if part.at_cap else ''}",
                ]
            )
        language = LANGUAGES[key[0]]
        lines.append(
            f"| {language.name} ({key[0]}) | {language.resource} | {key[1]} | {available[key]:,} | "
            f"{' | '.join(cells)} |"
        )
    for resource in Resource:
        own = _of_class(rows, resource)
        tokens = sum(available[key] for key in own)
        cells = []
        for stage in stages:
            share = stage.share(own)
            passes = share * stage.tokens / tokens if tokens else 0.0
            cells += [
                f"{100 * share:.3f}",
                f"{100 * stage.share(own, 'uncapped_share'):.3f}",
                f"{passes:.2f}",
            ]
        lines.append(f"| **all {resource}-resource** | | | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_mixtures(
    path: Path, stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]
) -> None:
    """A PNG with a panel for each stage: the share of each language by kind, how far its text reaches, and
    its share without the cap.
    """
    codes = [code for code in LANGUAGES if any(code == key[0] for key in rows)]
    kinds = sorted({kind for _, kind in rows})
    with saved_figure(path, len(stages), (13, 1 + 4 * len(stages))) as panels:
        for stage, axes in zip(stages, [panels] if len(stages) == 1 else panels, strict=True):
            own = {code: [key for key in rows if key[0] == code] for code in codes}
            below = [0.0] * len(codes)
            for kind in kinds:
                heights = [100 * stage.share([(code, kind)]) for code in codes]
                axes.bar(range(len(codes)), heights, 0.7, bottom=below, label=kind)
                below = [so_far + height for so_far, height in zip(below, heights, strict=True)]
            wanted = [100 * stage.share(own[code], "uncapped_share") for code in codes]
            reach = [
                100 * stage.max_epochs * sum(available[key] for key in own[code]) / stage.tokens
                for code in codes
            ]
            axes.scatter(
                range(len(codes)),
                wanted,
                marker="o",
                facecolors="none",
                edgecolors="black",
                zorder=3,
                label="without the cap",
            )
            axes.scatter(
                range(len(codes)),
                reach,
                marker="_",
                s=220,
                color="red",
                zorder=3,
                label=f"its text {stage.max_epochs:g} times",
            )
            axes.set_ylim(0, 1.15 * max(*below, *wanted))
            axes.set_ylabel("% of the tokens")
            axes.set_title(f"{stage.name}, {stage.tokens:,} tokens (* low-resource)")
            names = [
                f"{LANGUAGES[code].name}{' *' if LANGUAGES[code].resource is Resource.LOW else ''}"
                for code in codes
            ]
            axes.set_xticks(range(len(codes)), names, rotation=45, ha="right")
            axes.legend(ncols=len(kinds) + 2)


def _part(row: MixtureRow, wanted: float, max_epochs: float) -> DatasetPart:
    return DatasetPart(row.share, wanted, row.epochs, row.epochs >= max_epochs * (1 - 1e-6))


def _short(stage: StageMixture) -> list[str]:
    """A line for each language that the cap on epochs keeps below its part."""
    lines = []
    for code in dict.fromkeys(code for code, _ in stage.parts):
        own = [key for key in stage.parts if key[0] == code]
        share, wanted = stage.share(own), stage.share(own, "uncapped_share")
        if share < wanted * (1 - 1e-6) and any(stage.parts[key].at_cap for key in own):
            lines.append(
                f"too little text in {LANGUAGES[code].name} ({code}): it gives {100 * share:.3g}% of the "
                "tokens in "
                f"{max(stage.parts[key].epochs for key in own):.3g} passes, and its part would be "
                f"{100 * wanted:.3g}%"
            )
    return lines


def _of_class(rows: Sequence[Dataset], resource: Resource) -> list[Dataset]:
    return [key for key in rows if LANGUAGES[key[0]].resource is resource]


def _csv(stages: Sequence[StageMixture], rows: Sequence[Dataset], available: dict[Dataset, int]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    fields = [field.name for field in dataclasses.fields(DatasetPart)]
    lines.writerow(
        [
            "language",
            "class",
            "kind",
            "tokens",
            *(f"{stage.name}_{field}" for stage in stages for field in fields),
        ]
    )
    for key in rows:
        values = [getattr(stage.parts.get(key), field, "") for stage in stages for field in fields]
        lines.writerow([key[0], LANGUAGES[key[0]].resource, key[1], available[key], *values])
    return text.getvalue()
