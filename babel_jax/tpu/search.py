"""Searches the best mesh, remat policy and number of pieces of a batch for a pod: candidates are compiled one
after the other, and those that fit are ranked.
"""

from collections.abc import Iterator
from typing import Any

from babel_jax.config import Config, Remat
from babel_jax.config.settings import divisors
from babel_jax.errors import BadInput, one_line
from babel_jax.progress import Work
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.compiling import Which
from babel_jax.tpu.plan import plan

_CONTEXTS, _TENSORS = (2, 4, 8, 16), (2, 4)
# Tokens of a window on one device. Shorter parts save nothing, and more keys and values are gathered.
_LEAST_TOKENS = 1024
# Forecasts within this factor of the shortest count as equal.
_NEAR = 1.02
_OF_CANDIDATES = (
    "fits",
    "forecast_seconds",
    "forecast_mfu",
    "step_seconds_bound",
    "mfu_bound",
    "wire_bytes",
    "bound_by",
)
# From the least recomputation to the most: for one mesh and batch, the first that fits is the fastest.
_POLICIES = (Remat.MLP, Remat.GATE, Remat.PROJECTIONS, Remat.ATTENTION, Remat.FULL)


def search(config: Config, topology: str, slices: int = 1) -> dict[str, Any]:
    """The best plan. `candidates` has all plans that fit, sorted by the compiler's forecast of the time of a
    step (without a forecast, by its bound), and the reasons why others do not fit.

    A forecast ignores latency. So among the plans whose forecast is within 2% of the shortest, the best is
    the one with the fewest bytes on the wire, and of these the one with the smallest temporaries.
    """
    chip_of(topology)
    tried, fits = [], []
    groups: list[Any] = list(_candidates(config))
    for meshes in Work("plans", groups, unit="meshes", keep=True):
        for candidate in meshes:
            settings = {"mesh": candidate.training.mesh, "remat": str(candidate.training.remat)}
            settings["gradient_accumulation"] = candidate.training.gradient_accumulation
            # Candidates of a group are ordered by speed, so the first one that fits ends the group.
            try:
                planned = plan(candidate, topology, slices, Which.STEP)
            # A mesh or batch that does not divide is the same for every policy of the group.
            except BadInput as error:
                tried.append(settings | {"fits": False, "why": str(error)})
                break
            except RuntimeError as error:  # the compiler may fail on one candidate and not on another
                tried.append(settings | {"fits": False, "why": one_line(error, 300)})
                continue
            if planned["fits"]:
                fits.append(planned)
                tried.append(settings | {name: planned[name] for name in _OF_CANDIDATES})
                break
            tried.append(settings | {"fits": False, "why": planned["summary"].splitlines()[-1]})
    if not fits:
        reasons = sorted({candidate["why"] for candidate in tried})
        raise BadInput(f"none of the candidates fits {topology}: {'; '.join(reasons)}")

    best = _best(fits)
    fitting = [candidate for candidate in tried if candidate["fits"]]
    fitting.sort(key=_expected)
    others = [candidate for candidate in tried if not candidate["fits"]]
    lines = [f"{'forecast':>9} {'seconds':>9} {'MFU':>6} {'wire GB':>9}  settings"]
    for row in fitting:
        settings_text = (
            f"mesh {row['mesh']}, remat {row['remat']}, gradient_accumulation "
            f"{row['gradient_accumulation']}; {row['bound_by']} binds"
        )
        lines.append(
            f"{_expected(row):>9.3f} {row['step_seconds_bound']:>9.3f} {row['mfu_bound']:>6.1%} "
            f"{row['wire_bytes'] / 1e9:>9.1f}  {settings_text}"
        )
    return best | {
        "candidates": fitting + others,
        "summary": "\n".join([*lines, "", best["summary"]]),
    }


def _expected(planned: dict[str, Any]) -> float:
    """The forecast of a step's seconds, or their bound where there is no forecast."""
    return float(planned["forecast_seconds"] or planned["step_seconds_bound"])


def _best(fits: list[dict[str, Any]]) -> dict[str, Any]:
    shortest = min(_expected(planned) for planned in fits)
    near = [planned for planned in fits if _expected(planned) <= _NEAR * shortest]
    return min(near, key=lambda planned: (planned["wire_bytes"], planned["hbm_gib"]["temporaries"]))


def _candidates(config: Config) -> Iterator[list[Config]]:
    """For each mesh (the config's own first) and number of pieces, candidates with the policies in the order
    to try.
    """
    contexts = [size for size in _CONTEXTS if config.data.seq_len // size >= _LEAST_TOKENS]
    # The config's own mesh; then FSDP alone, and with a context or a tensor axis.
    meshes = [dict(config.training.mesh)]
    for others in ({}, *({"context": size} for size in contexts), *({"tensor": size} for size in _TENSORS)):
        if (mesh := {"fsdp": -1} | others) not in meshes:
            meshes.append(mesh)

    # Powers of 2, so that few candidates are compiled.
    batch = config.training.global_batch_size
    pieces = [count for count in divisors(batch) if count & (count - 1) == 0][:6]
    for mesh in meshes:
        for count in pieces:
            candidates = []
            for remat in _POLICIES:
                change = {"mesh": dict(mesh), "gradient_accumulation": count, "remat": remat}
                training = config.training.model_copy(update=change)
                candidates.append(config.model_copy(update={"training": training}))
            yield candidates
