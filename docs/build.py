"""Builds the site: python docs/build.py [--out build/docs]. The site is in OUT/site.

The pages of this folder and the generated pages are put together in OUT/pages. Zensical builds them, and a
warning is an error. Generated: the commands (from argparse), the settings (from their classes), the languages
(from the registry).
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from commands_page import commands_page  # noqa: E402
from languages_page import languages_page  # noqa: E402
from settings_page import settings_page  # noqa: E402

MOST_BYTES_OF_A_PICTURE = 200_000
_PICTURE = re.compile(r"!\[[^]]*\]\(([^)\s]+)\)")


def build(out: Path) -> Path:
    """Builds the site into `out`/site, and returns this folder. Raises SystemExit with what is wrong."""
    pages = out / "pages"
    if out.exists():
        shutil.rmtree(out)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "*.toml", "__pycache__"))
    # In docs/reference these three say where the generated pages are.
    (pages / "reference" / "commands.md").write_text(commands_page(), encoding="utf-8")
    (pages / "reference" / "settings.md").write_text(settings_page(), encoding="utf-8")
    (pages / "reference" / "languages.md").write_text(languages_page(), encoding="utf-8")

    settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    (out / "zensical.toml").write_text(settings.replace("REPOSITORY", str(DOCS.parent)), encoding="utf-8")
    wrong = [*_pages_and_navigation(pages, tomllib.loads(settings)), *_pictures(pages)]
    if wrong:
        sys.exit("\n".join(wrong))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", out / "zensical.toml"]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("the site was not built: see above")
    return out / "site"


def _pages_and_navigation(pages: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Every page is in the navigation, and the navigation names no other page. Zensical accepts both."""
    there = {path.relative_to(pages).as_posix() for path in pages.rglob("*.md")}
    named = set(_named(settings["project"]["nav"]))
    for page in sorted(there - named):
        yield f"{page}: this page is not in the navigation of docs/zensical.toml"
    for page in sorted(named - there):
        yield f"docs/zensical.toml: the navigation names {page}, and there is no such page"


def _named(entry: Any) -> Iterator[str]:
    """The pages of a part of the navigation: a page, a table of title and part, or a list of parts."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _named(part)


def _pictures(pages: Path) -> Iterator[str]:
    """Every picture that a page shows is there and is small."""
    for page in sorted(pages.rglob("*.md")):
        for link in _PICTURE.findall(page.read_text(encoding="utf-8")):
            picture = page.parent / link
            name = page.relative_to(pages).as_posix()
            if not picture.is_file():
                yield f"{name}: there is no picture {link}"
            elif picture.stat().st_size > MOST_BYTES_OF_A_PICTURE:
                yield f"{name}: {link} has more than {MOST_BYTES_OF_A_PICTURE} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=DOCS.parent / "build" / "docs", help="a folder to replace"
    )
    print(f"{build(parser.parse_args().out.absolute())}/index.html")


if __name__ == "__main__":
    main()
