"""Checkpoints on the hosts' own disks, more often than those of the run folder.

Orbax's emergency checkpoint manager writes and reads them. The mesh axis `data` has the replicas of the
state. The processes of replica 0 write nothing here. Each process of another replica writes its part. After a
loss, the processes of one complete replica read their parts, and the other replicas receive them over the
network.

FOLDER/RUN/process_N/KEY/STEP   the part of process N. RUN is the id of the run folder. KEY is a digest of
                                all that the parts depend on: settings, mesh, shapes, and the part of the run.
"""

import contextlib
import hashlib
import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from babel_jax.config import CHANGEABLE, Config
from babel_jax.digests import check_sums, lists_below, write_sums
from babel_jax.disk_errors import explain_storage_errors
from babel_jax.distributed.agreement import agreed, first_text, texts_of_all
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.model.parallel import DATA
from babel_jax.training.step import TrainState

log = logging.getLogger("babel")

RUN_ID = "local_checkpoints.txt"
_KEPT = 2  # newest steps
_ARRAYS = "state"  # Orbax's name
_NEEDS = "orbax-checkpoint 0.12.8"  # private parts are used, which other releases may lack


class LocalCheckpoints:
    """The local checkpoints of one part of a run. In a part, the state keeps its shapes."""

    def __init__(
        self, config: Config, run_folder: Path, mesh: Mesh, first: int, step: int, abstract: TrainState
    ):
        """Finds the newest step after `step` that a replica has complete, and deletes all others of this run.

        `first` is the first step of the part, `abstract` the state in it, and `step` the steps that the run
        folder has. All processes must call this.
        """
        assert config.training.local_checkpoints is not None
        leaves, tree = jax.tree.flatten(abstract)
        self._tree: Any = tree
        # Orbax takes a dict of arrays. Its keys are the numbers of the leaves, in the order of the tree.
        self._abstract = {str(number): leaf for number, leaf in enumerate(leaves)}
        folder = Path(config.training.local_checkpoints)
        self._own = folder / _run_id(run_folder) / f"process_{jax.process_index()}"
        self._steps = self._own / _key(config, mesh, first, leaves)
        # Orbax wants a second folder, for checkpoints that all processes share. It stays empty.
        empty = self._steps / "empty"
        with agreed(), explain_storage_errors(folder):
            empty.mkdir(parents=True, exist_ok=True)
            # Parts of another mesh, of other settings, or of an earlier part of the run are of no use now.
            for other in self._own.iterdir():
                if other != self._steps:
                    shutil.rmtree(other)
            self._delete_unless(lambda found: found > step and self._is_whole(found))
        # Each process has now deleted the steps that it cannot read, so all can agree on one.
        self.newest = self._newest_complete(mesh)
        with agreed(), explain_storage_errors(folder):
            self._delete_unless(lambda found: found == self.newest)
        self._manager = _manager(self._steps, empty, mesh, self._abstract)

    def restore(self) -> TrainState:
        """The state after `newest` steps, on the whole mesh. All processes must call this."""
        assert self.newest is not None
        with explain_storage_errors(self._steps):
            arrays = self._manager.restore(self.newest)[_ARRAYS]
        state: TrainState = self._tree.unflatten([arrays[name] for name in self._abstract])
        return state

    def save(self, step: int, state: TrainState) -> None:
        """Writes the state after `step` steps, and returns when it is on disk. All processes must call this.

        No write of another checkpoint may be under way: see `_same_operation`.
        """
        arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
        with explain_storage_errors(self._steps):
            self._manager.save(step, ocp.args.Composite(**{_ARRAYS: ocp.args.PyTreeSave(arrays)}))
            # The processes of replica 0 write nothing, and have no such folder.
            if (own := self._steps / str(step)).is_dir():
                write_sums(own)
        _same_operation()

    def close(self) -> None:
        """Ends the part, whose last step is in the run folder: deletes the local checkpoints."""
        self._manager.close()
        shutil.rmtree(self._own, ignore_errors=True)

    def _found(self) -> list[int]:
        return [int(path.name) for path in self._steps.iterdir() if path.name.isdecimal()]

    def _is_whole(self, step: int) -> bool:
        """False, with a warning, if a file of this process is not as it was written."""
        folder = self._steps / str(step)
        lists = lists_below(folder)
        # Digests are written last: a process that was killed before has none.
        if lists and not check_sums(lists, folder).damaged:
            return True
        log.warning("%s: damaged or incomplete; it is deleted", folder)
        return False

    def _delete_unless(self, kept: Any) -> None:
        for step in self._found():
            if not kept(step):
                shutil.rmtree(self._steps / str(step))

    def _newest_complete(self, mesh: Mesh) -> int | None:
        """The newest step of which all processes of a replica have their parts."""
        mine = " ".join(map(str, self._found()))
        has = [set(text.split()) for text in texts_of_all(mine)]
        # Replica 0 never has a local checkpoint.
        complete: set[str] = set()
        for processes in _processes_of(mesh)[1:]:
            complete |= set.intersection(*(has[process] for process in processes))
        return max((int(step) for step in complete), default=None)


@contextlib.contextmanager
def closing(local: LocalCheckpoints | None) -> Iterator[None]:
    """Closes local checkpoints at the end of a block. After an error they stay for the next start."""
    yield
    if local is not None:
        local.close()


def check_replicas(mesh: Mesh) -> None:
    """Raises BadInput if no other process has a copy of the state."""
    replicas = _processes_of(mesh)
    # A process that is in two replicas would take both with it.
    if len(replicas) > 1 and sum(map(len, replicas)) == len(set.union(*replicas)):
        return
    raise BadInput(
        "training.local_checkpoints: needs two or more replicas of the state (training.mesh: data), each on "
        f"processes of its own; here data = {len(replicas)}, and processes = {jax.process_count()}; leave it "
        "out, or give another mesh or number of processes"
    )


def _processes_of(mesh: Mesh) -> list[set[int]]:
    """The processes of each replica."""
    by_replica = np.moveaxis(mesh.devices, mesh.axis_names.index(DATA), 0)
    processes: list[set[int]] = []
    for devices in by_replica:
        processes.append({device.process_index for device in devices.flat})
    return processes


def _manager(steps: Path, empty: Path, mesh: Mesh, abstract: dict[str, Any]) -> Any:
    """Orbax's manager, which saves into `steps` alone: its second level, `empty`, stays empty."""
    try:
        from absl import flags
        from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator
        from orbax.checkpoint._src.multihost import multihost
        from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

        # Orbax needs its own tables of processes and devices first, or processes wait for ever.
        if not multihost.is_runtime_to_distributed_ids_initialized():
            multihost.initialize_runtime_to_distributed_ids()
        multihost.initialize_distributed_to_device_ids()
        # Every save is to the local disk. `Checkpoints` alone writes to the run folder.
        options = emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=_KEPT),
            persistent=emergency.PersistentCheckpointOptions(should_save_fn=lambda step, newest: False),
            replica_axis_index=mesh.axis_names.index(DATA),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        # `_same_operation` needs these two names. A release that lacks them must fail here, and not at the
        # first save.
        _ = OperationIdGenerator.next_operation_id, OperationIdGenerator.get_current_operation_id
    except (ImportError, AttributeError, TypeError) as error:
        raise BadInput(
            f"training.local_checkpoints: Orbax {ocp.__version__} lacks a part that is needed ({error}); "
            f"install {_NEEDS}, or leave it out"
        ) from error
    # Orbax reads flags of absl, which has no command line here.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return emergency.CheckpointManager(steps, empty, mesh, abstract, options=options)


def _same_operation() -> None:
    """Gives Orbax's counter of operations the same value in all processes.

    The processes of a checkpoint of the run folder find each other by this counter, and a local save has
    moved it only in the processes that wrote.
    """
    from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

    own = int(OperationIdGenerator.get_current_operation_id())
    for _ in range(int(multihost_utils.process_allgather(np.int32(own)).max()) - own):
        OperationIdGenerator.next_operation_id()


def _run_id(run_folder: Path) -> str:
    """The id of the run folder; made if there is none. A run that begins anew in the same folder has another
    one.
    """
    path = run_folder / RUN_ID
    with agreed():
        if jax.process_index() == 0 and not path.is_file():
            write_text(path, uuid.uuid4().hex + "\n")
    found = first_text(path.read_text(encoding="utf-8").strip() if jax.process_index() == 0 else "")
    if not found.isalnum():
        raise BadInput(f"{path}: not an id; delete this file")
    return found


def _key(config: Config, mesh: Mesh, first: int, leaves: list[Any]) -> str:
    """A digest of all that a local checkpoint depends on."""
    # Settings that a resumed run may change are not in the digest, so changing them loses no checkpoint.
    training = config.training.model_copy(update=dict.fromkeys(CHANGEABLE))
    settings = config.model_copy(update={"training": training}).model_dump(mode="json")
    devices = [(device.process_index, device.id) for device in mesh.devices.flat]
    shapes = [(leaf.shape, str(leaf.dtype), str(leaf.sharding.spec)) for leaf in leaves]
    text = repr((settings, dict(mesh.shape), devices, first, shapes))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
