"""Checkpoints of a run by Orbax, written while training goes on: the train state, by step."""

import dataclasses
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from babel_jax.config import ModelConfig
from babel_jax.digests import SUMS, lists_below, unlisted, write_sums
from babel_jax.disk_errors import explain_storage_errors
from babel_jax.distributed.agreement import agreed, shared_out
from babel_jax.distributed.cluster import lost_process
from babel_jax.errors import BadInput
from babel_jax.places import listing, native, path_of, pull, url_of
from babel_jax.run_files import Line, read_lines
from babel_jax.sending import move
from babel_jax.training.saved_steps import STATE, SUCCESS, check_state, is_note, noted_in, to_note
from babel_jax.training.spikes import no_recent
from babel_jax.training.step import TrainState

log = logging.getLogger("babel")


class Checkpoints:
    """The folder `checkpoints/` of a run folder.

    The context manager waits for the last write at its end, unless another process was lost.
    """

    def __init__(
        self,
        folder: Path,
        model_after: Callable[[int], ModelConfig],
        keep: int,
        keep_every: int | None,
        best_step: Callable[[], int | None] = lambda: None,
        languages: Sequence[str] | None = None,
    ):
        """Keeps the newest `keep` steps, the multiples of `keep_every`, and the step that `best_step` returns
        at the time.

        `model_after(steps)` is the model after that many steps, `languages` the order of the run, in which
        states count; None reads the counts as they were saved.
        """
        self._languages = None if languages is None else tuple(languages)
        self._folder, self._model_after, self._failed = folder.absolute(), model_after, False
        self._begun = self._saved_before = 0  # steps of the last two saves
        self._native = native(self._folder)  # for Orbax, which writes into a bucket itself
        with agreed(), explain_storage_errors(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        # A step is deleted when none of these policies keeps it.
        kept: list[PreservationPolicy] = [LatestN(keep), _Named(best_step)]
        if keep_every is not None:
            kept.append(EveryNSteps(keep_every))
        # Another thread writes while training goes on. Where a process cannot write, the barrier fails at
        # once.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_for_others),
            cleanup_tmp_directories=True,
        )
        # With a handler, because Orbax would else look for one in the newest folder, which may be damaged.
        with explain_storage_errors(folder):
            self._manager = ocp.CheckpointManager(self._native, options=options, item_handlers=_Digested())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if lost_process(error):
            # The last write would wait for the lost process, until JAX aborts this one with a stack trace.
            return
        with explain_storage_errors(self._folder):
            self._manager.close()

    def save(self, step: int, state: TrainState, stage: str) -> None:
        """Begins to write the state after `step` steps, with the name of the stage. Does nothing if this step
        is saved already.
        """
        if self.newest() == step:
            return
        with explain_storage_errors(self._folder):
            note = to_note(stage, self._model(step), self._languages or ())
            self._manager.save(step, args=_DigestedSave(dict(vars(state))), custom_metadata=note)
        self._saved_before, self._begun = self._begun, step

    @property
    def saved(self) -> int:
        """The steps in the newest checkpoint that is written whole; 0 if there is none."""
        if url_of(self._folder) is None:
            return newest_step(self._folder)
        # A bucket may take long to answer.
        return self._saved_before if self._manager.is_saving_in_progress() else self._begun

    def newest(self) -> int | None:
        """The newest step that is saved or being written."""
        found: int | None = self._manager.latest_step()
        return found

    def check(self) -> None:
        """Raises the error of the last write, if it failed. Does not wait for a write that is under way."""
        if self._failed:
            self.wait()

    def wait(self) -> None:
        """Returns when all writes that were begun are on disk."""
        with explain_storage_errors(self._folder):
            self._manager.wait_until_finished()

    def restore(self, abstract: Callable[[int, str], TrainState]) -> tuple[int, str, TrainState] | None:
        """The newest readable checkpoint: its step, the name of its stage, and the state. None if there is
        none.

        `abstract(steps, stage)` gives shapes, types and shardings of the state. Its mesh and number of
        processes may differ from those that saved the state. A newer checkpoint that one of the processes
        cannot read is renamed to STEP.damaged, with a warning. If none can be read, raises BadInput and
        renames nothing: the reason may be full memory or a missing disk, and to begin anew would lose the
        run. Raises BadInput for a checkpoint of another model too.
        """
        unreadable: dict[int, str] = {}
        # Newest first. A step that one process cannot read is taken by none: all must have the same state.
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with agreed():
                    pull(self._folder / str(step), is_note)
                    stage, model, languages = noted_in(self._folder / str(step))
            except Exception as error:  # Orbax and TensorStore raise what they like for damaged files
                unreadable[step] = _first_line(error)
                continue
            # Not damage but a wrong config or a wrong folder: an older step would not fit either.
            ours = self._model(step)
            if changed := [name for name, value in model.items() if value != ours.get(name)]:
                differences = ", ".join(f"{name} {model[name]}, here {ours.get(name)}" for name in changed)
                raise BadInput(
                    f"{self._folder / str(step)}: a checkpoint of another model ({differences}); give "
                    "another out"
                )
            # First the digests, in pieces shared by the processes: TensorStore restores a flipped bit in
            # silence.
            wanted = abstract(step, stage)
            try:
                with agreed():
                    self._check_files(step)
                with agreed():
                    state = self._read(step, wanted, languages)
            except Exception as error:
                unreadable[step] = _first_line(error)
                continue
            # Only now, with a step that can be read: the reason for the others is damage, not memory or a
            # missing disk.
            for damaged, reason in unreadable.items():
                log.warning(
                    "checkpoint %d cannot be read (%s); it is set aside, and step %d is taken",
                    damaged,
                    reason,
                    step,
                )
                self._set_aside(damaged)
            self._begun = step
            return step, stage, state
        if unreadable:
            steps, reason = ", ".join(str(step) for step in unreadable), next(iter(unreadable.values()))
            raise BadInput(
                f"{self._folder}: no checkpoint can be read (steps {steps}: {reason}); remove the run "
                "folder to begin anew"
            )
        return None

    def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier. Where this process failed to write, raises instead: the others wait at another
        barrier for its part, and all would wait for 20 minutes.
        """
        if (
            threading.current_thread() is not threading.main_thread()
            and (failure := sys.exc_info()[1]) is not None
        ):
            self._failed = True
            raise failure
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _check_files(self, step: int) -> None:
        """Raises BadInput if a file of the state does not match its digest.

        The processes share the reading.
        """
        checked = check_state(self._folder / str(step), _share)
        if checked is None:
            log.info(
                "checkpoint %d is of an earlier version, without digests of its files; it is taken unchecked",
                step,
            )
        for path, reason in () if checked is None else checked.damaged.items():
            raise BadInput(f"{path.relative_to(self._folder)}: {reason}")

    def _model(self, step: int) -> dict[str, Any]:
        return self._model_after(step).model_dump(mode="json")

    def _read(self, step: int, abstract: TrainState, languages: Sequence[str]) -> TrainState:
        """The state, read by this process alone. Else Orbax would wait for the others, which may have found
        damage. `languages`: the order in which it was saved.
        """
        # The saved counts have one entry for each language of the run that saved them, maybe not of this one.
        counts, saved = abstract.windows_seen, abstract
        if self._languages is not None:
            saved = dataclasses.replace(abstract, windows_seen=counts.update(shape=(len(languages),)))
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"restore-{process}"
        )
        with ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
        ) as reader:
            folder = self._native / str(step) / STATE
            # Earlier versions did not save the losses and gradient norms of the last steps.
            names = reader.metadata(folder).item_metadata
            stored = {name: leaf for name, leaf in vars(saved).items() if name in names}
            fields = reader.restore(folder, args=ocp.args.StandardRestore(stored))
        if "recent" not in fields:
            fields["recent"] = jax.device_put(no_recent(), abstract.recent.sharding)
        if self._languages is not None and tuple(languages) != self._languages:
            # Each count belongs to its language, also where the run has another order, or more languages.
            seen = dict(zip(languages, np.asarray(fields["windows_seen"]).tolist(), strict=True))
            ours = np.array([seen.get(code, 0) for code in self._languages], np.int32)
            fields["windows_seen"] = jax.device_put(ours, counts.sharding)
        return TrainState(**fields)

    def _set_aside(self, step: int) -> None:
        aside = self._folder / f"{step}.damaged"
        with agreed():
            if jax.process_index() == 0:
                move(self._folder / str(step), aside)
        self._manager.reload()


class _Digested(ocp.StandardCheckpointHandler):  # type: ignore[misc]
    """Writes digests beside the files of a state, before the folder of the step gets its final name.

    Each process reads its own files, in Orbax's thread, while training goes on. Process 0 adds the rest,
    which is small.
    """

    async def async_save(self, directory: Any, *arguments: Any, **names: Any) -> list[Any]:
        futures = await super().async_save(directory, *arguments, **names)
        return [*(futures or []), _OwnSums(path_of(getattr(directory, "path", directory)))]

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = path_of(directory)
        write_sums(folder, unlisted(folder, lists_below(folder)))


@ocp.args.register_with_handler(_Digested, for_save=True)
@dataclasses.dataclass
class _DigestedSave(ocp.args.StandardSave):  # type: ignore[misc]
    """Names the handler that saves, for Orbax."""


@ocp.args.register_with_handler(_Digested, for_restore=True)
@dataclasses.dataclass
class _DigestedRestore(ocp.args.StandardRestore):  # type: ignore[misc]
    """Orbax needs a restore class beside each save class."""


@dataclasses.dataclass
class _OwnSums:
    """A future that Orbax waits for, after the files of this process are written: their digests."""

    folder: Path

    def result(self, timeout: float | None = None) -> None:
        process = jax.process_index()
        own = list(listing(self.folder / f"ocdbt.process_{process}"))
        write_sums(self.folder, own, f"{SUMS}.process_{process}")

    def cancel(self) -> None:
        pass


def _share(sizes: Mapping[Path, int]) -> list[Path]:
    """The files that this process is to read."""
    owners = shared_out({str(path): size for path, size in sizes.items()})
    return [path for path in sizes if owners[str(path)] == jax.process_index()]


@dataclasses.dataclass
class _Named(PreservationPolicy):  # type: ignore[misc]
    """Keeps the step that `step()` returns at the time."""

    step: Callable[[], int | None]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        named = self.step()
        return [checkpoint.step == named for checkpoint in checkpoints]


def _first_line(error: Exception) -> str:
    line = "".join(str(error).splitlines()[:1])
    return line if isinstance(error, BadInput) else f"{type(error).__name__}: {line}"[:200]


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, types and shardings of a state, for `restore`."""
    abstract: TrainState = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    return abstract


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in a folder; 0 if there is none."""
    if url_of(folder) is None:
        steps = [path.name for path in folder.glob("*")]
    else:
        # In a bucket a step has its final name while it is being written: its mark is what counts.
        steps = []
        for path in listing(folder):
            if path.name == SUCCESS and path.parent.parent == folder:
                steps.append(path.parent.name)
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file by step; see `read_lines`."""
    return read_lines(path, Line)
