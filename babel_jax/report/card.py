"""The model card of a run's model: its parent, its training and data, its evaluation, and its limits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from babel_jax.config import Config
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.points import point_names, read_items, read_points, scores_of
from babel_jax.evaluation.suite import CHOICE_TASKS, TRANSLATION_TASKS, Results
from babel_jax.evaluation.tables import PointItems, bits_of, points_table, suite_table
from babel_jax.expansion.card import TAG, expansion_section
from babel_jax.languages import LANGUAGES, groups_with_means, in_order
from babel_jax.model_folders.model_card import card_files, markdown_text
from babel_jax.places import place
from babel_jax.report.gate import gate_text, regression_gate
from babel_jax.report.record import run_name
from babel_jax.vocabulary.card import TAG as VOCABULARY_TAG
from babel_jax.vocabulary.card import vocabulary_section

_MOST_ROWS = 30
# The names that the hub knows: metrics by task.
_METRICS = {**dict.fromkeys(CHOICE_TASKS, "accuracy"), **dict.fromkeys(TRANSLATION_TASKS, "chrf")}


def run_card(
    config: Config,
    hf_config: Mapping[str, Any],
    source: Path | None,
    mixtures: Mapping[str, Any],
    prompt: str = "",
) -> dict[str, str]:
    """The files of `card_files` for the exported model of a run. mixtures: the content of mixture.json.
    source: the base's folder. prompt: a text for the model to continue, in the code that loads it.
    """
    names = point_names(config)
    points, items = read_points(place(config.out), names), read_items(place(config.out), names)
    trained = in_order(_languages_of(mixtures))
    expansion, vocabulary = expansion_section(hf_config), vocabulary_section(hf_config)
    sections = [
        _intended_use(config, trained),
        vocabulary,
        expansion,
        _training_section(config, mixtures),
        _data_section(config, mixtures),
        _evaluation_section(points, items),
        _limits_section(points, items),
    ]
    return card_files(
        hf_config,
        source,
        sections,
        name=run_name(Path(config.out)),
        languages=trained,
        tags=["multilingual", *([TAG] if expansion else []), *([VOCABULARY_TAG] if vocabulary else [])],
        results=_results(points),
        prompt=prompt,
    )


def _languages_of(mixtures: Mapping[str, Any]) -> set[str]:
    languages: set[str] = set()
    for mixture in mixtures.values():
        languages.update(row["language"] for row in mixture["rows"])
    return languages


def _intended_use(config: Config, trained: Sequence[str]) -> str:
    languages = ", ".join(LANGUAGES[code].name for code in trained)
    if config.data.conversations:
        use = "Conversations by the chat template of this folder"
    else:
        use = (
            "Text that continues a beginning, and further training, such as chat fine-tuning. It was not "
            "trained to follow instructions"
        )
    return f"## Intended use\n\n{use}. Languages: {languages}." if languages else f"## Intended use\n\n{use}."


def _training_section(config: Config, mixtures: Mapping[str, Any]) -> str:
    """The budget, the rate and the schedule of each stage."""
    batch = config.training.global_batch_size
    lines = [
        "## Training",
        "",
        "| stage | tokens | peak rate | schedule | trained |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for stage in config.stages:
        rows = mixtures.get(stage.name, {}).get("rows", [])
        tokens = sum(_tokens(row) for row in rows)
        size = f"{tokens:,.0f}" if tokens else ""
        trained = str(stage.train).replace("_", " ")
        lines.append(
            f"| {stage.name} | {size} | {stage.schedule.peak:g} | {stage.schedule.kind} | {trained} |"
        )
    words = (
        f"A batch has {batch:,} windows of {config.data.seq_len:,} tokens. Optimizer: AdamW; activations and "
        f"products in {config.training.compute_dtype}, parameters and moments in float32."
    )
    return "\n".join([*lines, "", words])


def _tokens(row: Mapping[str, Any]) -> float:
    """The tokens that a stage reads of a dataset."""
    return float(row["tokens"] * row["epochs"])


def _data_section(config: Config, mixtures: Mapping[str, Any]) -> str:
    """Tokens and passes by language over all stages, and the sources with their licences."""
    if not mixtures:
        return ""
    # What is read adds up over the stages; what there is does not: all stages read the same text.
    read: dict[str, float] = {}
    available: dict[str, dict[str, int]] = {}
    for mixture in mixtures.values():
        for row in mixture["rows"]:
            read[row["language"]] = read.get(row["language"], 0.0) + _tokens(row)
            available.setdefault(row["language"], {})[row["kind"]] = row["tokens"]
    total = sum(read.values()) or 1.0
    lines = [
        "## Training data",
        "",
        "Tokens over all stages, their share, and passes over the text that there is.",
        "",
        "| language | tokens | share, % | passes |",
        "| --- | ---: | ---: | ---: |",
    ]
    for code in in_order(read)[:_MOST_ROWS]:
        passes = read[code] / max(1, sum(available[code].values()))
        lines.append(
            f"| {LANGUAGES[code].name} | {read[code]:,.0f} | {100 * read[code] / total:.2f} | {passes:.2f} |"
        )
    return "\n".join([*lines, *_sources(config)])


def _sources(config: Config) -> list[str]:
    """A table of the sources with their licences; a file is named without its folder."""
    languages: dict[tuple[str, str], list[str]] = {}
    for source in config.data.sources:
        # A path of this machine says nothing to readers of the card.
        name = source.label if source.name or source.path is None else Path(source.path).name
        languages.setdefault((name, source.licence or "not named"), []).append(source.language)
    if not languages:
        return []
    lines = ["", "| source | licence | languages |", "| --- | --- | --- |"]
    for (name, licence), codes in list(languages.items())[:_MOST_ROWS]:
        unique = ", ".join(dict.fromkeys(codes))
        lines.append(f"| {markdown_text(name)} | {markdown_text(licence)} | {unique} |")
    if len(languages) > _MOST_ROWS:
        lines += ["", f"And {len(languages) - _MOST_ROWS} more sources."]
    return [*lines, "", "The licence of a text is that of its source."]


def _evaluation_section(points: Mapping[str, Results], items: PointItems) -> str:
    if not bits_of(points):
        return ""
    parts = [
        "## Evaluation",
        "",
        "Bits per byte on held-out text, by language (lower is better). Intervals are of the paired "
        "bootstrap over documents.",
        "",
        points_table(points, items),
        "",
    ]
    # The title of the suite's table becomes a title below "## Evaluation".
    for line in suite_table(points):
        parts.append(line.replace("# ", "### ", 1) if line.startswith("# ") else line)
    return "\n".join(parts).rstrip()


def _limits_section(points: Mapping[str, Results], items: PointItems) -> str:
    """The section on limits: the comparison with the parent, and the languages that were not measured."""
    lines = ["## Limits", ""]
    gate = regression_gate(points, items, [*points][-1] if points else None)
    if gate is not None:
        lines.append(f"- {gate_text(gate)}")
    lines += [
        "- It may write text that is false, offensive or unsafe; nothing was done to prevent this.",
        "- Held-out text is from the same sources as the training text, so the figures above say little "
        "about other text.",
        "- Languages that are not in the table of training data were not evaluated.",
    ]
    return "\n".join(lines)


def _results(points: Mapping[str, Results]) -> list[EvalResult]:
    """The results of the last point for the hub's model-index: means of groups, and each language."""
    if not points:
        return []
    last = points[[*points][-1]]
    results = []
    # The hub's model-index has one entry for each figure.
    for task in last:
        scores = scores_of(last, task)
        means = class_means(scores)
        rows: list[tuple[str, str, float | None]] = []
        for group, label in groups_with_means(scores).items():
            rows.append((group, label, means[group]))
        for code, score in scores.items():
            rows.append((code, LANGUAGES[code].name, score))
        for config_name, label, value in rows:
            if value is not None:
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type="heldout",
                        dataset_name=f"held-out text, {label}",
                        dataset_config=config_name,
                        metric_type=_METRICS.get(task, task),
                        metric_name=task.replace("_", " "),
                        metric_value=round(value, 4),
                    )
                )
    return results
