"""The frame of a page: its head, and sections of figures with their tables. The style is for light and dark
mode, desktop and phone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from babel_jax import __version__
from babel_jax.pages.charts import Figure, shape


@dataclasses.dataclass(frozen=True)
class Tile:
    """A figure in large type. tone: "good", "bad" or empty."""

    label: str
    value: str
    words: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page. name: its anchor, a letter first; body: Markup before the figures."""

    name: str
    title: str
    figures: Sequence[Figure] = ()
    note: str = ""
    tiles: Sequence[Tile] = ()
    body: str = ""


def paired(figures: Sequence[Figure]) -> list[Figure]:
    """The figures, so arranged that no narrow one is alone in a row: its table is shown beside its chart."""
    # Two narrow figures share a row. A wide one begins a new row, and may leave the one before it alone.
    arranged: list[Figure] = []
    has_partner = True
    for figure in figures:
        if figure.is_wide and not has_partner:
            arranged[-1] = dataclasses.replace(arranged[-1], open_table=True)
        has_partner = figure.is_wide or not has_partner
        arranged.append(figure)
    if not has_partner:
        arranged[-1] = dataclasses.replace(arranged[-1], open_table=True)
    return arranged


def page_text(
    kicker: str, name: str, facts: Sequence[str], sections: Sequence[Section], refresh: int | None = None
) -> str:
    """One HTML page. All text is escaped; charts and bodies are Markup.

    kicker: the words above the name. facts: a few words each, below it. refresh: seconds after which a
    browser loads the page again.
    """
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            kicker=kicker,
            name=name,
            facts=facts,
            sections=[dataclasses.replace(section, figures=paired(section.figures)) for section in sections],
            refresh=refresh,
            version=__version__,
        )
    )


@functools.cache
def environment(package: str = "babel_jax.pages") -> jinja2.Environment:
    """The templates of a package; they escape all values."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.globals["mark"] = lambda series: Markup(shape(series, 7, 7))
    return found
