"""The kinds of programs of a run, as `babel plan`'s table names them.

They are in a separate module because the module of the programs imports as much as a whole run.
"""

STEP, READING, INITIAL, GROWTH, EXPANSION, OPTIMIZER = (
    "step",
    "reading the folder",
    "initial parameters",
    "rows of new tokens",
    "expansion",
    "optimizer state",
)
CARRYING, BITS_PER_BYTE, SUITE, EXPORT, SAMPLES = (
    "carrying moments",
    "bits per byte",
    "suite",
    "export",
    "samples",
)
CHECKPOINT = "saving a checkpoint"
# Orbax's program, which takes from each copy of an array the part to write.
ORBAX_PROGRAM = "slice"
RECHECK, REPLICAS = "gradients twice", "comparing replicas"
LOG_LIKELIHOODS, GENERATION = "log-likelihoods", "generation"
PREFILL, NEW_TOKEN = "prefill", "a new token"
