"""Before a run: plan, rehearse, tune."""

import argparse
import shlex
from pathlib import Path

from babel_jax.commands.parsing import Commands, Result, add_config, positive
from babel_jax.errors import BadInput


def _plan(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.tpu.compiling import Which
    from babel_jax.tpu.plan import plan
    from babel_jax.tpu.search import search

    config = load_config(options.config, tuple(options.set))
    if options.device is not None:
        # The plan of one machine would ignore these options.
        if options.search or options.evaluate or options.slices != 1 or options.kernels is not None:
            raise BadInput(
                "babel plan: --search, --evaluate, --slices and --kernels are for --topology; leave them out"
            )
        from babel_jax.tpu.machine import plan_machine

        programs = Which.STEP if options.step_only else Which.TRAIN
        return plan_machine(config, options.device, options.devices, Path(options.config).parent, programs)
    kernels = None if options.kernels is None else Path(options.kernels)
    if options.search:
        return search(config, options.topology, options.slices)
    which = Which.TRAIN
    if options.evaluate:
        which = Which.EVALUATE
    elif options.step_only:
        which = Which.STEP
    configs = Path(options.config).parent
    return plan(config, options.topology, options.slices, which, configs, kernels)


def _rehearse(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.recipe.rehearsal import rehearse

    config = load_config(options.config, tuple(options.set))
    out = None if options.out is None else Path(options.out)
    return rehearse(config, options.devices, options.slices, Path(options.config).parent, out)


def _tune(options: argparse.Namespace) -> Result:
    from babel_jax.config.file import load_config
    from babel_jax.distributed import cluster
    from babel_jax.distributed.stopping import preempted_by_sigterm
    from babel_jax.places import on_disk

    config = load_config(options.config, tuple(options.set))
    out = on_disk(options.out, "the folder of measurements")
    # Before the imports that use JAX: it cannot join other processes after it has been used.
    cluster.join()
    from babel_jax.tuning.tune import tune

    # The summary has the command that applies the result, so values are quoted for a shell.
    overrides = [f"--set {shlex.quote(one)}" for one in options.set]
    with preempted_by_sigterm():
        return tune(
            config,
            out,
            options.stage,
            options.tries,
            options.steps,
            options.rounds,
            Path(options.config).parent,
            " ".join([options.config, *overrides]),
        )


def declare(command: Commands) -> None:
    """Adds the commands of this file."""
    _declare_plan(command)
    _declare_rehearse(command)
    _declare_tune(command)


def _declare_plan(command: Commands) -> None:
    plan = command(
        "plan",
        _plan,
        "memory, time and cost of a run: on a TPU pod by its compiled programs, or on one machine",
        "babel plan configs/babel-9b.toml --topology v5e:16x16 --set training.gradient_accumulation=4",
        "babel plan my-run.toml --topology v5e:2x2 --step-only",
        "babel plan configs/babel-9b.toml --device h100 --devices 8",
    )
    add_config(plan, "data.seq_len=32768")
    target = plan.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--device",
        choices=["h100", "h200", "a100", "l4", "rtx4090", "cpu"],
        help="devices of one machine: memory, tokens/s at most and days; compiled for the card if the extra "
        "gpu is installed, else by a model of memory",
    )
    plan.add_argument(
        "--devices", type=positive, default=1, metavar="N", help="number of devices (default %(default)s)"
    )
    target.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="v5e:16x16, v6e:8x8, v5p:8x8x8, v4:4x4x4, tpu7x:4x4x4 ...",
    )
    plan.add_argument(
        "--slices", type=positive, default=1, help="number of slices, joined by the data centre's network"
    )
    plan.add_argument(
        "--kernels", metavar="FILE", help="write the kernels of the compiler's forecast, the longest first"
    )
    programs = plan.add_mutually_exclusive_group()
    programs.add_argument(
        "--step-only",
        action="store_true",
        help="compile the last train step alone: one program instead of about ten",
    )
    programs.add_argument(
        "--evaluate",
        action="store_true",
        help="the programs of babel evaluate on the model that CONFIG trains",
    )
    programs.add_argument(
        "--search",
        action="store_true",
        help="try meshes, pieces of the batch and remat policies, and rank those that fit",
    )


def _declare_rehearse(command: Commands) -> None:
    rehearse = command(
        "rehearse",
        _rehearse,
        "the whole run of a config on CPU devices in minutes: the same mesh axes, small widths and budgets",
        "babel rehearse my-run.toml --devices 4",
    )
    add_config(rehearse)
    rehearse.add_argument(
        "--devices", type=positive, default=16, help="CPU devices to make (default %(default)s)"
    )
    rehearse.add_argument(
        "--slices",
        type=positive,
        default=1,
        help="slices of the pod: the data axis, unless the mesh names it",
    )
    rehearse.add_argument("--out", help="a new folder to keep the rehearsal in (default: a temporary one)")


def _declare_tune(command: Commands) -> None:
    tune = command(
        "tune",
        _tune,
        "the fastest settings of the train step on the devices at hand, by measurement",
        "babel tune my-run.toml",
        "babel tune my-run.toml --try training.remat=mlp,full --try training.scan_layers=true,false",
        resumes=True,
    )
    add_config(tune, "training.global_batch_size=16")
    tune.add_argument("--stage", metavar="NAME", help="the stage whose step is measured (default: the last)")
    tune.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of a setting, such as training.remat=mlp,full; may be repeated: all combinations are "
        "measured (default: each remat policy, loop or no loop over layers, more and fewer pieces of the "
        "batch, other kernels of attention, then the faster ones together)",
    )
    tune.add_argument(
        "--steps",
        type=positive,
        default=3,
        metavar="N",
        help="steps that count, a visit (default %(default)s)",
    )
    tune.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="visits of each candidate (default %(default)s)",
    )
    tune.add_argument(
        "--out",
        default="runs/tune",
        help="folder; the same command resumes in it (default %(default)s)",
    )
