"""One process of transformers for all folders that tests write. The program starts one for each folder,
which imports transformers anew: about five seconds each time.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babel_jax.errors import one_line
from babel_jax.model_folders import transformers_check

Ask = Callable[[Path], tuple[dict[str, Any], str]]

# Runs the program's own text for each folder, with its output and the last line of its traceback.
LOOP = """
import contextlib, io, json, sys, traceback
program, answers = json.loads(sys.stdin.readline()), sys.stdout
for folder in map(json.loads, sys.stdin):
    sys.argv = ["-c", folder]
    printed, failure = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {})
    except BaseException as error:
        failure = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
    print(json.dumps([printed.getvalue(), failure]), file=answers, flush=True)
"""


def shared_by(ask: Ask) -> Ask:
    """Asks one process. Children of this process, which a test may kill, ask by `ask`."""
    owner, started = os.getpid(), []

    def process() -> Any:
        if not started:
            offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
            command = [sys.executable, "-c", LOOP]
            started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env={**os.environ, **offline},
                    start_new_session=True,
                )
            )
            atexit.register(started[0].kill)
            print(json.dumps(transformers_check._PROGRAM), file=started[0].stdin, flush=True)
        return started[0]

    def answered(folder: Path) -> tuple[dict[str, Any], str]:
        if os.getpid() != owner:
            return ask(folder)
        # A test may have changed the working folder since the process was started.
        print(json.dumps(os.path.abspath(folder)), file=process().stdin, flush=True)
        printed, failure = json.loads(process().stdout.readline())
        if failure:
            return {}, one_line(failure, 300)
        return json.loads(printed.splitlines()[-1]), ""

    return answered
