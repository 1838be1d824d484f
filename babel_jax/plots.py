"""Figures as PNG files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel_jax.disk_errors import explain_os_errors


@contextlib.contextmanager
def saved_figure(path: Path, rows: int, size: tuple[float, float]) -> Iterator[Any]:
    """The axes of a figure with `rows` rows and a size in inches. After the block, the figure is written as a
    PNG in one step.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

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
