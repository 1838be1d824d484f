"""The report of a run: report."""

import argparse

from babel_jax.commands.parsing import Commands, Result, percent


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
