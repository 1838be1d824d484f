"""The model card of a run's model: its parent, its training data and its evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from babel_jax.config import Config
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.points import point_names, read_items, read_points, scores_of
from babel_jax.evaluation.suite import Results
from babel_jax.evaluation.tables import PointItems, bits_of, points_table, suite_table
from babel_jax.expansion.card import TAG, expansion_section
from babel_jax.languages import CODES, LANGUAGES
from babel_jax.model_folders.model_card import card_files
from babel_jax.places import place

_GROUPS = {"all": "all languages", "high": "high-resource languages", "low": "low-resource languages"}


def run_card(
    config: Config, hf_config: Mapping[str, Any], source: Path | None, mixtures: Mapping[str, Any]
) -> dict[str, str]:
    """The files of `card_files` for the exported model of a run. mixtures: the content of mixture.json.
    source: the base's folder.
    """
    points = read_points(place(config.out), point_names(config))
    items = read_items(place(config.out), point_names(config))
    trained = {row["language"] for mixture in mixtures.values() for row in mixture["rows"]}
    expansion = expansion_section(hf_config)
    return card_files(
        hf_config,
        source,
        [expansion, _mixture_section(config, mixtures), _evaluation_section(points, items)],
        languages=[code for code in CODES if code in trained],
        tags=["multilingual", *([TAG] if expansion else [])],
        results=_results(points),
    )


def _mixture_section(config: Config, mixtures: Mapping[str, Any]) -> str:
    if not mixtures:
        return ""
    lines = [
        "## Training data",
        "",
        "Share of each stage's tokens, and passes over what there is of each language and kind.",
        "",
    ]
    lines += ["| stage | language | kind | share, % | passes |", "| --- | --- | --- | ---: | ---: |"]
    for stage, mixture in mixtures.items():
        for row in mixture["rows"]:
            lines.append(
                f"| {stage} | {LANGUAGES[row['language']].name} | {row['kind']} | {100 * row['share']:.2f} "
                f"| {row['epochs']:.2f} |"
            )
    tokens = config.training.global_batch_size * config.data.seq_len
    return "\n".join([*lines, "", f"A step reads {tokens:,} tokens in windows of {config.data.seq_len}."])


def _evaluation_section(points: Mapping[str, Results], items: PointItems) -> str:
    if not bits_of(points):
        return ""
    parts = [
        "## Evaluation",
        "",
        "Bits per byte on held-out text, by language (lower is better):",
        "",
        points_table(points, items),
        "",
    ]
    # The title of the suite's table becomes a title below "## Evaluation".
    for line in suite_table(points):
        parts.append(line.replace("# ", "### ", 1) if line.startswith("# ") else line)
    return "\n".join(parts).rstrip()


def _results(points: Mapping[str, Results]) -> list[EvalResult]:
    """The means of the last point, for the hub's table."""
    if not points:
        return []
    last = points[[*points][-1]]
    results = []
    for task in last:
        for group, mean in class_means(scores_of(last, task)).items():
            if mean is not None:
                dataset = f"held-out text, {_GROUPS[group]}"
                results.append(
                    EvalResult(
                        "text-generation", "heldout", dataset, task, round(mean, 4), dataset_config=group
                    )
                )
    return results
