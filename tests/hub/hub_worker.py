"""Processes that take a `LocalHub` for the Hub: each runs pieces of code that a test sends, and says what they printed.

An import of torch and transformers takes seconds, so that one process serves many tests. It is started with the
variables that `huggingface_hub` reads at its import.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

# Reads code from the standard input, a JSON string a line; answers with a line of JSON.
LOOP = """
import contextlib, io, json, sys, traceback

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    printed, failure = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(json.loads(line), "<sent>", "exec"), {"__name__": "sent"})
    except BaseException as error:
        failure = [type(error).__name__, str(error), traceback.format_exc()]
    print(json.dumps([printed.getvalue(), failure]), file=answers, flush=True)
"""

# As if some packages were not installed: no finder finds them, and nobody else is disturbed.
BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in {blocked!r}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


class SentError(Exception):
    """An error in the other process: its type's name, its text, and its traceback."""

    def __init__(self, kind: str, text: str, trace: str):
        super().__init__(f"{kind}: {text}\n{trace}")
        self.kind, self.text = kind, text


class Worker:
    """A process of its own.

    Args:
        variables: Added to the environment.
        blocked: Packages that it cannot import.
    """

    def __init__(self, variables: dict[str, str], blocked: tuple[str, ...] = ()):
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.process = subprocess.Popen(
            [sys.executable, *(["-I"] if blocked else []), "-c", BLOCK.format(blocked=blocked) + LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**plain, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **variables},
        )

    def run(self, code: str, **values: str | Path | int | None) -> str:
        """What code prints, with values as global names; its error is raised as `SentError`."""
        head = "".join(
            f"{name} = {(str(value) if isinstance(value, Path) else value)!r}\n" for name, value in values.items()
        )
        self.process.stdin.write(json.dumps(head + textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        printed, failure = json.loads(line)
        if failure is not None:
            raise SentError(*failure)
        return printed

    def close(self) -> None:
        """Ends the process, which has nothing to put in order."""
        self.process.kill()
        self.process.communicate()
