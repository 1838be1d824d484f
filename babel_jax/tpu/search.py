"""Which mesh, remat policy and pieces of the batch suit a pod: candidates compiled one after the other, those
that fit ranked.
"""

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from babel_jax.config import Config, Remat
from babel_jax.config.settings import divisors
from babel_jax.errors import BadInput
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.plan import Which, plan

_CONTEXTS, _TENSORS = (2, 4, 8, 16), (2, 4)
_LEAST_TOKENS = (
    1024  # of a window on one device: shorter parts only make the keys and values that are gathered more
)
# From the least recomputation to the most: of one mesh and batch, the first that fits is the fastest.
_POLICIES = (Remat.MLP, Remat.GATE, Remat.PROJECTIONS, Remat.ATTENTION, Remat.FULL)


def search(config: Config, topology: str, slices: int = 1) -> dict[str, Any]:
    """The best plan, and under `candidates` all that fit, the shortest bound on the time of a step first, and
    why others do not.

    A bound counts no latency, so among bounds that are alike within 2% fewer bytes on the wire come first,
    then more memory left.
    """
    chip_of(topology)
    tried, fits = [], []
    groups = list(_candidates(config))
    for meshes in tqdm(groups, desc="plans", unit="mesh"):
        for candidate in meshes:
            settings = {"mesh": candidate.training.mesh, "remat": str(candidate.training.remat)}
            settings["gradient_accumulation"] = candidate.training.gradient_accumulation
            try:
                found = plan(candidate, topology, slices, Which.STEP)
            except BadInput as error:
                tried.append(settings | {"fits": False, "why": str(error)})
                break
            except RuntimeError as error:  # what the compiler cannot do with one, it may with another
                tried.append(settings | {"fits": False, "why": " ".join(str(error).split())[:300]})
                continue
            if found["fits"]:
                fits.append(found)
                tried.append(
                    settings
                    | {
                        name: found[name]
                        for name in ("fits", "step_seconds_bound", "mfu_bound", "wire_bytes", "bound_by")
                    }
                )
                break
            tried.append(settings | {"fits": False, "why": found["summary"].splitlines()[-1]})
    if not fits:
        raise BadInput(
            f"nothing of what was tried fits {topology}: " + "; ".join(sorted({one["why"] for one in tried}))
        )
    best = min(fits, key=_rank)
    order = sorted((one for one in tried if one["fits"]), key=lambda one: one["step_seconds_bound"])
    lines = [f"{'seconds':>9} {'MFU':>6} {'wire GB':>9}  settings"]
    for one in order:
        where = (
            f"mesh {one['mesh']}, remat {one['remat']}, gradient_accumulation "
            f"{one['gradient_accumulation']}; {one['bound_by']} binds"
        )
        lines.append(
            f"{one['step_seconds_bound']:>9.3f} {one['mfu_bound']:>6.1%} {one['wire_bytes'] / 1e9:>9.1f}  "
            f"{where}"
        )
    return best | {
        "candidates": order + [one for one in tried if not one["fits"]],
        "summary": "\n".join([*lines, "", best["summary"]]),
    }


def _rank(found: dict[str, Any]) -> tuple[float, int, float]:
    hbm = found["hbm_gib"]
    return (
        round(found["step_seconds_bound"], 2 - len(str(int(found["step_seconds_bound"])))),
        found["wire_bytes"],
        hbm["temporaries"],
    )


def _candidates(config: Config) -> Iterator[list[Config]]:
    """For each mesh, the config's own first, and number of pieces, the policies in the order to try them."""
    contexts = [size for size in _CONTEXTS if config.data.seq_len // size >= _LEAST_TOKENS]
    meshes = [dict(config.training.mesh)]
    for others in ({}, *({"context": size} for size in contexts), *({"tensor": size} for size in _TENSORS)):
        if (mesh := {"fsdp": -1} | others) not in meshes:
            meshes.append(mesh)
    batch = config.training.global_batch_size
    pieces = [count for count in divisors(batch) if count & (count - 1) == 0][:6]
    for mesh in meshes:
        for count in pieces:
            changes = [
                {"mesh": dict(mesh), "gradient_accumulation": count, "remat": remat} for remat in _POLICIES
            ]
            yield [
                config.model_copy(update={"training": config.training.model_copy(update=change)})
                for change in changes
            ]
