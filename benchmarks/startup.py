"""CPU seconds of `import babel_jax` and `babel --help`, each in fresh processes, beside an empty Python and
`import jax`.

python benchmarks/startup.py [--rounds 5]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import babel_jax": ["-c", "import babel_jax"],
    "babel --help": ["-m", "babel_jax.cli", "--help"],
    "babel train --help": ["-m", "babel_jax.cli", "train", "--help"],
    "import jax": ["-c", "import jax"],
    "import for expand": ["-c", "import babel_jax.cli, babel_jax.expansion.folders"],
    "import for train": ["-c", "import babel_jax.cli, babel_jax.recipe.recipe"],
}
LIMIT = 0.5
# As on a user's machine: without compiled files, Python compiles this project's files at each start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command))
    print(f"{'CPU seconds':<20} {'median':>7} {'most':>7}  of the limit of {LIMIT} s")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:<20} {median:>7.3f} {max(each):>7.3f}  {median / LIMIT:.2f}")


if __name__ == "__main__":
    main()
