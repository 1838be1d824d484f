"""The page of a study of layers: how much each one matters, for all languages and by class."""

from collections.abc import Mapping, Sequence

from babel_jax.evaluation.bits_per_byte import class_mean, class_means
from babel_jax.languages import LANGUAGES, groups_with_means
from babel_jax.pages.charts import Figure, Table, lines
from babel_jax.pages.document import Section, page_text
from babel_jax.studies.sensitivity import LANGUAGES_IN_TABLE, ByLanguage, Sensitivity

_WORST = 100.0  # percent: the chart ends here, because some layers cost a thousand times as much


def sensitivity_page(model: str, result: Sensitivity) -> str:
    """One HTML page: the cosine similarity, and the change of bits per byte with a layer removed or
    doubled.
    """
    labels = groups_with_means(result.model) or {"all": LANGUAGES[next(iter(result.model))].name}
    series = dict(zip(labels.values(), (2, 3, 1), strict=False))
    figures = [
        _cosine_figure(result, labels, series),
        _change_figure("doubled", "Each layer passed twice", result, result.doubled, labels, series),
        _change_figure("removed", "Each layer removed", result, result.removed, labels, series),
    ]
    means = class_means(result.model)
    facts = [f"{len(result.cosine)} layers"]
    facts += [f"{label}: {means[group]:.3f} bits per byte" for group, label in labels.items()]
    return page_text("sensitivity of layers", model, facts, [Section("layers", "Layers", figures)])


def _cosine_figure(result: Sensitivity, labels: Mapping[str, str], series: Mapping[str, int]) -> Figure:
    curves, cells = {}, {}
    for group, label in labels.items():
        means = [class_mean(values, group) for values in result.cosine]
        curves[label] = list(enumerate(means))
        cells[label] = [f"{mean:.3f}" for mean in means]
    return Figure(
        "cosine",
        "Similarity of each layer's input and output",
        "Cosine of the residual stream before and after a layer, the mean over tokens. A layer near 1 "
        "changes little.",
        [("", "", lines(curves, series, "layer", "cosine"))],
        _table(cells),
        series,
    )


def _change_figure(
    name: str,
    title: str,
    result: Sensitivity,
    values_by_layer: Sequence[ByLanguage],
    labels: Mapping[str, str],
    series: Mapping[str, int],
) -> Figure:
    """The change of bits per byte by layer, for groups; in the table also for languages, if they are few."""
    curves, cells = {}, {}
    for group, label in labels.items():
        whole = class_mean(result.model, group)
        changes = [100 * (class_mean(values, group) / whole - 1) for values in values_by_layer]
        curves[label] = [(layer, min(change, _WORST)) for layer, change in enumerate(changes)]
        cells[label] = [f"{change:+.1f}%" for change in changes]
    # A few languages fit into the table, each with a column.
    if 1 < len(result.model) <= LANGUAGES_IN_TABLE:
        for code, whole in result.model.items():
            changes = [100 * (values[code] / whole - 1) for values in values_by_layer]
            cells[LANGUAGES[code].name] = [f"{change:+.1f}%" for change in changes]
    return Figure(
        name,
        title,
        f"Change of bits per byte in percent; the chart ends at {_WORST:.0f}%, the table does not.",
        [("", "", lines(curves, series, "layer", "%"))],
        _table(cells),
        series,
    )


def _table(columns: dict[str, list[str]]) -> Table:
    """A row for each layer."""
    rows = []
    for layer, cells in enumerate(zip(*columns.values(), strict=True)):
        rows.append([str(layer), *cells])
    return Table(["Layer", *columns], rows)
