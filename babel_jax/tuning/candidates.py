"""The settings that `babel tune` compares: changes of `training` that change results at most by rounding."""

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from babel_jax.config import AttentionKernel, Config, ModelConfig, Remat
from babel_jax.config.file import parse_settings
from babel_jax.errors import BadInput
from babel_jax.model.attention_kernels import kernel_for
from babel_jax.model.parallel import GPU

# The settings of `training` that decide the program of a step, and leave its results as they are.
TUNABLE = (
    "remat",
    "scan_layers",
    "attention",
    "gradient_accumulation",
    "offload_optimizer_state",
    "mesh",
    "compiler_options",
)
MOST_CANDIDATES = 64  # each one is compiled
_MOST_WRITTEN_OUT = 40  # layers, without a scan: the time to compile grows with them
_AS_CONFIGURED = "today's settings"


class Candidate(NamedTuple):
    """A config to measure. `changes` has what differs from the user's config, by the name of the setting in
    `training`; it is empty for that config itself.
    """

    changes: Mapping[str, Any]
    config: Config

    @property
    def key(self) -> str:
        """Equal for equal changes."""
        return json.dumps(self.changes, sort_keys=True)

    @property
    def name(self) -> str:
        """The changes as text: `remat=full, scan_layers=false`."""
        return ", ".join(options_of(self.changes)) or _AS_CONFIGURED


def options_of(changes: Mapping[str, Any]) -> list[str]:
    """Changes in the form that --set takes, without `training.`."""
    return [f"{name}={_as_toml(value)}" for name, value in changes.items()]


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_as_toml(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def candidate_of(config: Config, changes: Mapping[str, Any]) -> Candidate:
    """The config with other values of `training`. Raises BadInput for a value that no setting takes."""
    # Through the text of all settings, so that changed values are checked like those of a config file.
    values = json.loads(config.model_dump_json(exclude_none=True))
    before = dict(values["training"])
    values["training"] |= changes
    changed = parse_settings(Config, values, "--try")
    after = json.loads(changed.training.model_dump_json(exclude_none=True))
    return Candidate({name: after[name] for name in changes if after[name] != before.get(name)}, changed)


def asked_candidates(config: Config, tries: Sequence[str]) -> list[Candidate]:
    """The config itself, then all combinations of the values of `tries`, each of the form
    `training.remat=mlp,full`.

    Raises BadInput for settings that are not tuned, for values that no setting takes, and if there is no
    other candidate than the config itself.
    """
    values: dict[str, list[Any]] = {}
    for text in tries:
        name, listed = _values_of(text)
        values.setdefault(name, []).extend(listed)
    found = [candidate_of(config, {})]
    for combination in itertools.product(*values.values()):
        found.append(candidate_of(config, dict(zip(values, combination, strict=True))))
        if len(found) > MOST_CANDIDATES:
            raise BadInput(f"--try: more than {MOST_CANDIDATES} combinations; name fewer values")
    # A combination may be the config itself, or the same as another one after its values are read.
    unique = list({candidate.key: candidate for candidate in found}.values())
    if len(unique) == 1:
        raise BadInput("--try: no candidates: these are the settings of the config; name other values too")
    return unique


def _values_of(text: str) -> tuple[str, list[Any]]:
    """The setting and the values of `training.remat=mlp,full`."""
    key, equals, listed = text.partition("=")
    name = key.strip().removeprefix("training.")
    if not equals or not listed.strip() or "." not in key:
        raise BadInput(f"--try {text}: not of the form training.remat=mlp,full")
    if not key.strip().startswith("training.") or name not in TUNABLE:
        names = ", ".join(f"training.{one}" for one in TUNABLE)
        raise BadInput(f"--try {text}: {key.strip()} is not a setting to tune; valid: {names}")
    try:
        values = list(tomllib.loads(f"values = [{listed}]")["values"])
    except tomllib.TOMLDecodeError:
        # Words need no quotes, as in --set.
        values = [value.strip() for value in listed.split(",") if value.strip()]
    return name, values


class Possible(NamedTuple):
    """The limits of the candidates of a config on the devices of this job.

    - shape: the model of the stage
    - platform: of JAX, such as tpu
    - tokens: of a window, or of the part of it that a device computes
    - micro_batches: the values of gradient_accumulation that batch and mesh allow
    """

    shape: ModelConfig
    platform: str
    tokens: int
    micro_batches: Sequence[int]


def default_candidates(config: Config, possible: Possible) -> list[Candidate]:
    """The config itself, then candidates that differ from it in one setting."""
    found = [candidate_of(config, {})]
    for changes in _single_changes(config, possible):
        found.append(candidate_of(config, changes))
    return list({candidate.key: candidate for candidate in found}.values())


def _single_changes(config: Config, possible: Possible) -> Iterator[dict[str, Any]]:
    training = config.training
    # The number of candidates is small: each is compiled and visited several times.
    for remat in Remat:
        yield {"remat": str(remat)}
    if not training.scan_layers or possible.shape.num_hidden_layers <= _MOST_WRITTEN_OUT:
        yield {"scan_layers": not training.scan_layers}
    # Twice and half as many pieces: a step further each way.
    for count in possible.micro_batches:
        if count in (2 * training.gradient_accumulation, training.gradient_accumulation / 2):
            yield {"gradient_accumulation": count}
    for kernel in _other_kernels(config, possible):
        yield {"attention": str(kernel)}


def _other_kernels(config: Config, possible: Possible) -> list[AttentionKernel]:
    """Kernels of attention on this platform, except the kernel that the config chooses."""
    own = {"tpu": AttentionKernel.SPLASH} | dict.fromkeys(GPU, AttentionKernel.CUDNN)
    kernels = [AttentionKernel.XLA]
    if possible.platform in own:
        kernels.append(own[possible.platform])

    def meant(kernel: AttentionKernel) -> AttentionKernel:
        dtype = config.training.compute_dtype
        return kernel_for(kernel, possible.shape, possible.tokens, possible.platform, dtype)

    found = []
    for kernel in kernels:
        try:
            if meant(kernel) is not meant(config.training.attention):
                found.append(kernel)
        except BadInput:  # this kernel does not take such a model or window
            continue
    return found


def later_candidates(
    config: Config, possible: Possible, winners: Mapping[str, Any], too_large: Sequence[str]
) -> list[Candidate]:
    """Candidates that follow from the measurements of single changes: the changes that made the step faster,
    all together; and the policy that was just too large, with smaller pieces of the batch.

    too_large: the remat policies that did not fit.
    """
    # The changes of each setting were found alone; together they may help more, or cancel out.
    found = []
    if len(winners) > 1:
        found.append(candidate_of(config, winners))
    # Half as many rows at once need about half of the activations.
    smaller = 2 * config.training.gradient_accumulation
    if too_large and smaller in possible.micro_batches:
        # Policies are in the order of what they keep: the last one keeps least.
        nearest = [str(remat) for remat in Remat if remat in too_large][-1]
        found.append(candidate_of(config, {"remat": nearest, "gradient_accumulation": smaller}))
    return found
