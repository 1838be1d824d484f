"""Figures as PNG files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel_jax.disk_errors import explain_os_errors


@contextlib.contextmanager
def saved_figure(path: Path, rows: int, size: tuple[float, float]) -> Iterator[Any]:
    """The axes of a figure of `size` inches with that many rows, to draw on; then it is written as a PNG, in
    one step.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=size, layout="constrained")
    try:
        yield axes
        # Beside its final name first, like every other write.
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        with explain_os_errors(path):
            figure.savefig(partial, dpi=110)
            partial.replace(path)
    finally:
        pyplot.close(figure)
