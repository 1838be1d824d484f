"""Checks before the first step of a run: its text and its mixtures against the files of its run folder."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.run_files import StageMixture, TextRead, read_as
from babel_jax.training.stages import PlannedStage

log = logging.getLogger("babel")


def note_text(path: Path, fingerprint: str, step: int) -> None:
    """Writes down which prepared text the steps from `step` on read. Warns where a run resumes with other
    text than before.
    """
    # Steps after a lost checkpoint are taken again, so what they read is forgotten.
    before = read_as(path, TextRead)["text"] if step and path.is_file() else []
    known = [entry for entry in before if entry["from_step"] < step]
    if known and known[-1]["fingerprint"] != fingerprint:
        log.warning(
            "the text was prepared anew, from other text or with other settings, since step %d: the steps "
            "from %d on read other windows, "
            "and the result is not that of a run without a stop (%s keeps it)",
            known[-1]["from_step"],
            step,
            path,
        )
    # One entry for each change of the text, and not for each start.
    if not known or known[-1]["fingerprint"] != fingerprint:
        known.append({"from_step": step, "fingerprint": fingerprint})
    write_text(path, json.dumps({"text": known}, indent=2) + "\n")


def check_totals(stages: Sequence[PlannedStage], run_folder: Path) -> None:
    """Raises BadInput for a run that an earlier version began: there `curated` was added to a language's
    share.
    """
    path = run_folder / "mixture.json"
    before = read_as(path, dict[str, StageMixture]) if path.is_file() else {}
    for plan in stages:
        # A run of an earlier version has more of the language than its config says now.
        rows = before.get(plan.stage.name, {}).get("rows", [])
        for code in plan.stage.mixture.curated if rows else ():
            # A language has one row for each kind of its text.
            had = sum(row["share"] for row in rows if row["language"] == code)
            has = plan.mixture.languages.get(code, 0.0)
            if abs(had - has) > 1e-6:
                raise BadInput(
                    f"{run_folder}: stage {plan.stage.name} was begun with {had:.1%} {code}, and curated = "
                    f"{{ {code} = "
                    f"{plan.stage.mixture.curated[code]:g} }} now gives {has:.1%}: earlier versions added "
                    "it to the language's own part; "
                    f"write curated_extra for curated in the config and in {run_folder / 'config.toml'}, or "
                    "give another out"
                )
