"""Babel in JAX: grow a pretrained decoder by copying layers, recover it, and train it on in your languages.

    import babel_jax as babel

    babel.expand("Qwen2.5-7B", "babel-9b", {"preset": "babel-9b"})

The names of `babel_jax.api` are here. Each is imported at its first use, so that `babel --help` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from babel_jax.api import *  # noqa: F403

__version__ = "0.1.0"

_NAMES = (
    "BadInput",
    "Config",
    "DataSettings",
    "ExpansionPlan",
    "ExpansionSettings",
    "ModelConfig",
    "ModelFolder",
    "convert",
    "evaluate",
    "expand",
    "generate",
    "load_config",
    "load_params",
    "open_folder",
    "plan",
    "prepare",
    "save_folder",
    "train",
)
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_NAMES)}")
    from babel_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
