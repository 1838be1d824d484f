"""Figures as PNG files, in the colours of the pages (babel_jax/pages/page.css in light mode)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel_jax.disk_errors import explain_os_errors

# Grey, orange, green, blue, purple: the series of page.css; and its colours of text and lines.
SERIES = ("#8a8f99", "#c26a00", "#0f8a7e", "#3a45c9", "#a3257d")
BAD = "#b3261e"
INK, SOFT, GRID, GROUND = "#1d1f24", "#5c626e", "#eceae3", "#ffffff"


@contextlib.contextmanager
def saved_figure(path: Path, rows: int, size: tuple[float, float]) -> Iterator[Any]:
    """The axes of a figure with `rows` rows and a size in inches. After the block, the figure is written as a
    PNG in one step.
    """
    import matplotlib

    # No window: this back end only writes files.
    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_style()):
        figure, axes = pyplot.subplots(rows, 1, figsize=size, layout="constrained")
        try:
            yield axes
            # Written beside its final name and then renamed, like every other file.
            partial = path.with_name(f"{path.stem}.partial{path.suffix}")
            with explain_os_errors(path):
                figure.savefig(partial, dpi=110)
                partial.replace(path)
        finally:
            pyplot.close(figure)


def _style() -> Any:
    """Matplotlib's settings."""
    from cycler import cycler

    return {
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.edgecolor": SOFT,
        "axes.labelcolor": SOFT,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
