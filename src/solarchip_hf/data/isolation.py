"""Calls in worker processes that may die: a file that kills its reader costs one row, never a scan.

`concurrent.futures` breaks a whole pool when one process dies and cannot say which call was at fault. Here every worker
is a plain child process that answers one call at a time over a pipe, so that the call in flight is the culprit. The
children do not import the caller's `__main__`, and may be started from daemonic processes such as Dask's workers.
"""

import importlib
import json
import logging
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
# A worker takes the package's modules without running its `__init__`, which registers models with transformers: that
# takes seconds, and readers need none of it.
_BOOTSTRAP = """
import json, sys, types
sys.path[:] = json.loads(sys.argv[1])
package = types.ModuleType("solarchip_hf")
package.__path__ = [sys.argv[2]]
sys.modules["solarchip_hf"] = package
from solarchip_hf.data.isolation import serve
serve(sys.argv[3])
"""
_PACKAGE = str(Path(__file__).parents[1])
_LONGEST_START = 600.0  # seconds that a process may take to import what it runs


class WorkerDied(RuntimeError):
    """The process that ran a call ended without an answer.

    Args:
        returncode: Exit status of the process, negative for a signal; None where it had to be stopped for taking too
            long.
    """

    def __init__(self, returncode: int | None):
        self.returncode = returncode
        how = "took too long and was stopped" if returncode is None else f"ended with status {returncode}"
        super().__init__(f"the reading process {how}")

    def __reduce__(self):
        return type(self), (self.returncode,)


class IsolatedCaller:
    """Calls a function in a child process that is started when needed and replaced when it has died.

    Args:
        function: A function of one argument at the top level of an importable module. Its module may import submodules
            of this package, but not names from the package itself.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.name = f"{function.__module__}:{function.__qualname__}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "IsolatedCaller":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen:
        """Starts the process and waits until it has loaded the function: on a busy machine that may take longer than a
        call is given, and is no fault of an item.
        """
        # The workers share the machine's cores already: a second level of threads would only contend.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), _PACKAGE, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        timer = threading.Timer(_LONGEST_START, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            _receive(self.process.stdout)
        except EOFError:
            returncode = self.process.wait()
            self.close()
            raise WorkerDied(returncode) from None
        finally:
            timer.cancel()
        return self.process

    def call(self, item: Any, timeout: float | None = 120.0) -> Any:
        """The function's value for an item.

        Args:
            item: The argument, picklable.
            timeout: Seconds after which the call is given up and its process stopped; None for no limit.

        Raises:
            WorkerDied: The process ended, or was stopped, without an answer.
            Exception: Whatever the function raised.
        """
        process, stopped = self.process or self._start(), threading.Event()

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = None if timeout is None else threading.Timer(timeout, stop)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            _send(process.stdin, item)
            status, value = _receive(process.stdout)
        except (BrokenPipeError, EOFError):
            returncode = process.wait()
            self.close()
            raise WorkerDied(None if stopped.is_set() else returncode) from None
        finally:
            if timer is not None:
                timer.cancel()
        if status == "error":
            raise value
        return value

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                try:
                    if stream is not None:
                        stream.close()
                except BrokenPipeError:
                    logger.debug("a reading process had gone before its pipe was closed")
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def map_isolated(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int = 1,
    timeout: float | None = 120.0,
) -> Iterator[tuple[Any, Any]]:
    """Runs a function over items in processes that may die, and yields results as they come.

    Args:
        function: As for `IsolatedCaller`.
        items: Picklable arguments.
        workers: Number of processes.
        timeout: Seconds after which a call is given up and its process stopped; None for no limit.

    Yields:
        Pairs (item, result). A result is the function's value, the exception that it raised, or a `WorkerDied` after
        two processes in a row have died on the item (once could be the machine's fault).
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    total = 0
    for item in items:
        todo.put(item)
        total += 1
    stop = threading.Event()

    def run() -> None:
        worker = IsolatedCaller(function)
        try:
            while not stop.is_set():
                try:
                    item = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    try:
                        value = worker.call(item, timeout)
                    except WorkerDied as death:
                        if death.returncode is None:
                            raise
                        value = worker.call(item, timeout)
                except Exception as error:  # handed to the caller as the item's result
                    value = error
                done.put((item, value))
        finally:
            worker.close()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(max(1, min(workers, total)))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(total):
            yield done.get()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def serve(name: str) -> None:
    """Answers calls read from standard input until it closes; what the function prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, qualname = name.split(":")
    function: Any = importlib.import_module(module)
    for part in qualname.split("."):
        function = getattr(function, part)
    calls = sys.stdin.buffer
    _send(answers, "ready")
    while True:
        try:
            item = _receive(calls)
        except EOFError:
            return
        try:
            answer = ("value", function(item))
        except Exception as error:  # belongs to the item, and is raised on the other side
            answer = ("error", _portable(error))
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return


def _portable(error: Exception) -> Exception:
    """The exception itself where it survives pickling, else its text."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else RuntimeError(repr(error))
    except Exception:  # any failure of a foreign class's pickling means the same: send the text
        return RuntimeError(f"{type(error).__name__}: {error}")


def _send(stream: Any, value: Any) -> None:
    payload = pickle.dumps(value, protocol=5)
    stream.write(_LENGTH.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    payload = stream.read(length)
    if len(payload) < length:
        raise EOFError
    return pickle.loads(payload)


__all__ = ["IsolatedCaller", "WorkerDied", "map_isolated"]
