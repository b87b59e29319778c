"""Work that the processes of a run do together, so that none waits for long and none waits in vain."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ..models.distributed import rank, world_size

Task = TypeVar("Task")
Result = TypeVar("Result")


def share_tasks(tasks: Sequence[Task], work: Callable[[Task], Result]) -> list[Result]:
    """Does tasks in turn, each in one process; a single process does them all, and the first process a lone task.

    After every round of one task a process, all meet: however long the whole takes, nobody runs into the process
    group's timeout, and an error of one process is raised in all of them.

    Args:
        tasks: The same in every process, in the same order.
        work: What is done; what it returns is pickled and passed on.

    Returns:
        The results in the order of the tasks, in every process.

    Raises:
        ValueError: Another process had a ValueError or an OSError; its own error is raised where it came up.
        RuntimeError: Another process had any other error.
    """
    processes, own = world_size(), rank()
    if processes == 1:
        return [work(task) for task in tasks]
    results: list[Result] = []
    for start in range(0, len(tasks), processes):
        part = tasks[start : start + processes]
        result, caught = None, None
        try:
            result = work(part[own]) if own < len(part) else None
        except Exception as error:  # raised below, once the others know
            caught = error
        said = None if caught is None else (isinstance(caught, ValueError | OSError), str(caught))
        answers: list[Any] = [None] * processes
        dist.all_gather_object(answers, (result, said))
        if caught is not None:
            raise caught
        for process, (_, failure) in enumerate(answers):
            if failure is not None:
                kind = ValueError if failure[0] else RuntimeError
                raise kind(f"process {process}: {failure[1]}")
        results += [answer[0] for answer in answers[: len(part)]]
    return results


__all__ = ["share_tasks"]
