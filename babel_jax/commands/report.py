"""The report of a run: report."""

import argparse
import sys
from collections.abc import Callable

from babel_jax.commands.parsing import Commands, Result, percent, positive


def _report(options: argparse.Namespace) -> Result:
    from babel_jax.places import on_disk, place
    from babel_jax.report.run_report import report_run

    return report_run(
        place(options.run_folder),
        on_disk(options.out, "the page") if options.out else None,
        options.tolerance,
    )


def _status(options: argparse.Namespace) -> Result:
    from babel_jax.places import place
    from babel_jax.report.run_status import run_status

    return run_status(place(options.run_folder))


def _watch(options: argparse.Namespace) -> Result:
    from babel_jax.places import place
    from babel_jax.report.page import PAGE, write_report
    from babel_jax.report.run_watch import on_terminal, watch_run, with_page

    run_folder = place(options.run_folder)
    shows = sys.stdout.isatty() and not options.json and not options.once
    show: Callable[[str], object] | None = on_terminal if shows else None
    if options.page and not options.once:
        show = with_page(run_folder, options.every, show)
    state = watch_run(run_folder, options.every, show)
    if options.page:
        # Without a refresh: nobody writes the page again.
        write_report(run_folder, run_folder / PAGE)
        state["summary"] += f"\npage: {run_folder / PAGE}"
    return state


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    report = command(
        "report",
        _report,
        "one HTML page about a run, and the languages that got worse",
        "babel report runs/my-run/run",
    )
    report.add_argument("run_folder", metavar="RUN", help="a run folder, or a demo's")
    report.add_argument("--out", metavar="FILE", help="where to write the page (default: report.html in RUN)")
    report.add_argument(
        "--tolerance",
        type=percent,
        default=0.0,
        metavar="PERCENT",
        help="how much worse a language may be (default 0)",
    )
    status = command(
        "status",
        _status,
        "whether a run is finished, and how many steps it has done",
        "babel status runs/my-run/run",
    )
    status.add_argument("run_folder", metavar="RUN", help="a run folder, on disk or in a bucket")

    watch = command(
        "watch",
        _watch,
        "loss, rate, tokens/s, time left and each language of a run while it runs",
        "babel watch runs/my-run/run",
        "babel watch runs/my-run/run --every 60 --page",
    )
    watch.add_argument("run_folder", metavar="RUN", help="a run folder, on disk or in a bucket")
    watch.add_argument(
        "--every", type=positive, default=5, metavar="SECONDS", help="between looks (default %(default)s)"
    )
    watch.add_argument(
        "--page", action="store_true", help="also write report.html each time; a browser loads it again"
    )
    watch.add_argument("--once", action="store_true", help="show it once and exit, as without a terminal")
