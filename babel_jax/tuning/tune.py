"""`babel tune`: measures candidates in turns, keeps each visit, and writes the fastest settings.

Candidates are visited in rounds, every other round backwards, so that a machine that becomes slower (heat,
neighbours) makes no candidate look better than another. The fastest one and today's settings are then
measured once more, in turns, and these visits decide. The spread between visits of the same candidate says
how much the machine itself varies.
"""

import contextlib
import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import SIGINT
from typing import Any

import jax
import tomli_w

from babel_jax.claims import is_begun
from babel_jax.config import AttentionKernel, Config, Stage
from babel_jax.distributed.agreement import agreed
from babel_jax.distributed.stopping import Stopped, stop_requests
from babel_jax.errors import BadInput, Preempted
from babel_jax.files import make_folder, read_text, write_text
from babel_jax.hardware import name_of_kind
from babel_jax.locks import only_process_in
from babel_jax.model.parallel import GPU
from babel_jax.model.sharding import parallelism_on
from babel_jax.progress import Work
from babel_jax.recipe.claim import check_same
from babel_jax.tpu.programs import planned_parts
from babel_jax.tpu.shapes import base_of, models_of
from babel_jax.training.compilation import compiled_in
from babel_jax.training.deepening import Depth, depth_at
from babel_jax.training.mesh import check_batch, make_mesh
from babel_jax.training.parts import check_trained
from babel_jax.tuning.bench import OUT_OF_MEMORY, Bench, Failed
from babel_jax.tuning.candidates import (
    Candidate,
    Possible,
    asked_candidates,
    default_candidates,
    later_candidates,
    options_of,
)
from babel_jax.tuning.journal import MEASUREMENTS, Journal, described_device, described_step, mark_of
from babel_jax.tuning.table import table_of, verdict_lines
from babel_jax.tuning.verdict import MeasuredCandidate, Verdict, measured, verdict_of, winners_of

log = logging.getLogger("babel")

SETTINGS = "settings.toml"


def tune(
    config: Config,
    out: Path,
    stage_name: str | None = None,
    tries: Sequence[str] = (),
    steps: int = 3,
    rounds: int = 3,
    configs: Path | None = None,
    config_name: str = "CONFIG",
) -> dict[str, Any]:
    """{"device", "step", "chosen", "apply", "gain", "spread", "candidates", "measurements", "settings",
    "summary"} of the train step of one stage, by default the last.

    tries: settings with values, as `training.remat=mlp,full`; all combinations are measured. Without, the
    candidates differ from the config in one setting each, and the ones that are faster are measured together.
    steps: counted in each visit; rounds: visits of each candidate. configs: see `base_of`. Raises BadInput if
    the devices are not those of the config, and if nothing runs on them.
    """
    check_same(config)
    stage, model = _stage_of(config, stage_name, configs)
    _check_devices(config)
    possible = _possible(config, model)
    candidates = asked_candidates(config, tries) if tries else default_candidates(config, possible)
    with contextlib.ExitStack() as held:
        with agreed():
            if jax.process_index() == 0:
                _begin(out, held)
        about = {"device": described_device(), "step": described_step(config, stage, model)}
        journal = Journal(out, mark_of(config, stage, model), about)
        if len(journal):
            log.info("tune: %d measurements are there already", len(journal))
        held.enter_context(_compiling(config, out))
        # A stop comes between two visits: XLA's compiler must not be interrupted.
        stopped = held.enter_context(stop_requests(lambda: len(journal)))
        turns = Turns(Bench(stage, model), journal, steps, stopped)
        turns.visit_all(candidates, range(rounds))
        if not tries:
            # What follows from them is measured beside today's settings again.
            found = [measured(journal, one) for one in candidates]
            winners, known = winners_of(found[0], found[1:]), {one.key for one in candidates}
            more = []
            for one in later_candidates(config, possible, winners, _too_large(found)):
                if one.key not in known:
                    more.append(one)
            if more:
                turns.visit_all([candidates[0], *more], range(rounds, 2 * rounds))
            candidates += more
        verdict = _confirmed(turns, candidates, rounds)
        found = [measured(journal, one) for one in candidates]
        if verdict is None:
            reasons = "; ".join(dict.fromkeys(one.failure or "" for one in found))
            raise BadInput(
                f"none of {len(found)} candidates runs on {about['device']['devices']} x "
                f"{about['device']['kind']} ({reasons}); {out / MEASUREMENTS} has each"
            )
        return _result(config, out, config_name, about, found, verdict)


def _confirmed(turns: "Turns", candidates: Sequence[Candidate], rounds: int) -> Verdict | None:
    """The verdict on the fastest candidate, which is measured beside today's settings once more. Only these
    visits decide: of many candidates, the fastest one has also had luck.
    """
    journal, before, again = turns.journal, range(2 * rounds), range(2 * rounds, 3 * rounds)
    today, *others = (measured(journal, one, before) for one in candidates)
    first = verdict_of(today, others)
    if first is None or first.gain is None or first.fastest is today:
        return first
    both = [today.candidate, first.fastest.candidate]
    turns.visit_all(both, again)
    one, other = (measured(journal, candidate, again) for candidate in both)
    return verdict_of(one, [other])


def _stage_of(config: Config, name: str | None, configs: Path | None) -> tuple[Stage, Depth]:
    """The stage, and its model at its full depth."""
    if not config.stages:
        raise BadInput("stages: the config has none, so there is no step to measure")
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise BadInput(f"--stage {name}: no such stage; the config has {', '.join(names)}")
    models = models_of(config, base_of(config, configs))
    wanted = name or names[-1]
    # The last part of a stage has its full depth: layers may be added during a stage.
    last_parts: dict[str, tuple[Stage, int]] = {}
    for part, first_step, is_last in planned_parts(config, models):
        if is_last:
            last_parts[part.name] = part, first_step
    stage, first = last_parts[wanted]
    if config.data.seq_len > (longest := models[-1].config.max_position_embeddings):
        raise BadInput(f"data.seq_len = {config.data.seq_len} exceeds the model's {longest} positions")
    model = depth_at(models, first)
    # A stage that its model does not fit would fail only after minutes of compilation.
    check_trained(stage, model)
    return stage, model


def _check_devices(config: Config) -> None:
    """Raises BadInput if the config names devices of another kind: by a kernel of attention or by prices."""
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    kernels = {AttentionKernel.SPLASH: ("tpu",), AttentionKernel.CUDNN: GPU}
    kernel = config.training.attention
    if platform not in kernels.get(kernel, (platform,)):
        raise BadInput(
            f"training.attention = {kernel} is for a {kernels[kernel][0]}, and this machine has {kind}; tune "
            "on such a device, or give --set training.attention=auto"
        )
    if config.prices and name_of_kind(kind) not in config.prices:
        raise BadInput(
            f"prices: the config is for {', '.join(config.prices)}, and this machine has {kind}; tune on "
            "such a device, or give --set prices={}"
        )


def _possible(config: Config, model: Depth) -> Possible:
    training, mesh = config.training, make_mesh(config.training.mesh)
    # Every number of pieces that divides the batch evenly on this mesh.
    counts = []
    for count in range(1, training.global_batch_size + 1):
        if training.global_batch_size % count == 0 and _divides(config, mesh, count):
            counts.append(count)
    tokens = config.data.seq_len // parallelism_on(mesh).sequence_chunks
    return Possible(model.config, jax.default_backend(), tokens, counts)


def _divides(config: Config, mesh: jax.sharding.Mesh, pieces: int) -> bool:
    try:
        check_batch(mesh, config.training.global_batch_size, pieces, config.data.seq_len)
    except BadInput:
        return False
    return True


def _begin(out: Path, held: contextlib.ExitStack) -> None:
    """Makes or claims the folder, and keeps other processes out of it until `held` is closed."""
    make_folder(out)
    is_begun(out, MEASUREMENTS, "a folder of babel tune", "--out")
    held.enter_context(only_process_in(out))
    # Whether it can be written is known before anything is measured.
    write_text(out / MEASUREMENTS, _text_of(out / MEASUREMENTS))


class Turns:
    """Visits of candidates in turns. `stopped` is the function of `stop_requests`."""

    def __init__(self, bench: Bench, journal: Journal, steps: int, stopped: Stopped):
        self.journal, self._bench, self._steps, self._stopped = journal, bench, steps, stopped
        self._visits = 0

    def visit_all(self, candidates: Sequence[Candidate], visits: Iterable[int]) -> None:
        """Visits the candidates in their order, then backwards, and so on; leaves out what the journal has.

        Raises KeyboardInterrupt after Ctrl-C, and Preempted after SIGTERM or SIGHUP, between two visits.
        """
        turns: list[tuple[Candidate, int]] = []
        for visit in visits:
            # Forwards and backwards: a machine that gets slower with time slows all candidates alike.
            in_order = candidates if visit % 2 == 0 else candidates[::-1]
            turns += [(one, visit) for one in in_order]
        for candidate, visit in Work("tune", turns, unit="measurements", shown=jax.process_index() == 0):
            # A candidate that failed once fails again: what it needs does not change.
            known = self.journal.get(candidate, visit) is not None
            if not known and self.journal.failure(candidate) is None:
                self.journal.add(candidate, visit, self._measured(candidate))
                self._stop_if_asked()

    def _measured(self, candidate: Candidate) -> dict[str, Any]:
        try:
            found = self._bench.visit(candidate, self._steps)
        except Failed as failed:
            log.info("%s: %s", candidate.name, failed)
            return {"step_seconds": [], "failure": str(failed)}
        seconds = statistics.median(found["step_seconds"])
        log.info("%s: %.4g s a step", candidate.name, seconds)
        tokens = candidate.config.training.global_batch_size * candidate.config.data.seq_len
        return found | {"seconds": seconds, "tokens_per_second": tokens / seconds, "failure": None}

    def _stop_if_asked(self) -> None:
        self._visits += 1
        signal = self._stopped(self._visits)
        if signal is None:
            return
        kept = f"kept {len(self.journal)} measurements"
        if signal is SIGINT:
            raise KeyboardInterrupt(kept)
        raise Preempted(f"stopped by {signal.name}: {kept}")


def _text_of(path: Path) -> str:
    """The complete lines of a file; a kill may have cut off the last one."""
    text = read_text(path) if path.is_file() else ""
    return text[: text.rfind("\n") + 1]


def _compiling(config: Config, out: Path) -> contextlib.AbstractContextManager[None]:
    """The cache of compiled programs, as a run has it: in the folder, so that a stopped `babel tune` compiles
    nothing twice.
    """
    return compiled_in(out / "compiled") if config.training.compilation_cache else contextlib.nullcontext()


def _too_large(found: Sequence[MeasuredCandidate]) -> list[str]:
    """The remat policies that did not fit; all candidates change one setting."""
    policies = []
    for one in found:
        if "remat" in one.candidate.changes and (one.failure or "").startswith(OUT_OF_MEMORY):
            policies.append(str(one.candidate.changes["remat"]))
    return policies


def _result(
    config: Config,
    out: Path,
    config_name: str,
    about: dict[str, Any],
    found: Sequence[MeasuredCandidate],
    verdict: Verdict,
) -> dict[str, Any]:
    """The result of `tune`; writes the chosen settings."""
    chosen = verdict.chosen.candidate
    options = [f"training.{option}" for option in options_of(chosen.changes)]
    lines = verdict_lines(verdict, about, options, config_name)
    with agreed():
        if jax.process_index() == 0:
            write_text(out / SETTINGS, _fragment(config, found, chosen, lines))
    summary = [
        table_of(found, config),
        "",
        *lines,
        f"settings: {out / SETTINGS}; all measurements: {out / MEASUREMENTS}",
    ]
    return {
        **about,
        "chosen": {f"training.{name}": value for name, value in chosen.changes.items()},
        "keep": not chosen.changes,
        "apply": options,
        "gain": verdict.gain,
        "spread": verdict.spread,
        "candidates": [one.described(config) for one in found],
        "measurements": str(out / MEASUREMENTS),
        "settings": str(out / SETTINGS),
        "summary": "\n".join(summary),
    }


def _fragment(
    config: Config, found: Sequence[MeasuredCandidate], chosen: Candidate, lines: Sequence[str]
) -> str:
    """The table [training] with the chosen value of every setting that was compared."""
    values = json.loads(chosen.config.training.model_dump_json(exclude_none=True))
    compared = {}
    for one in found:
        for name in one.candidate.changes:
            compared[name] = values[name]
    comments = "".join(f"# {line}\n" for line in lines)
    comments += "# Or: put these lines into [training] of the config.\n"
    return comments + tomli_w.dumps({"training": compared})
