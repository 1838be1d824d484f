"""What the programs of a run do: the names in `babel plan`'s table.

Apart from the programs, whose imports are those of a whole run.
"""

STEP, READING, INITIAL, EXPANSION, OPTIMIZER = (
    "step",
    "reading the folder",
    "initial parameters",
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
ORBAX_PROGRAM = (
    "slice"  # Orbax's, by which each of several copies of an array is cut to the part that it writes
)
RECHECK, REPLICAS = "gradients twice", "comparing replicas"
LOG_LIKELIHOODS, GENERATION = "log-likelihoods", "generation"
PREFILL, NEW_TOKEN = "prefill", "a new token"
