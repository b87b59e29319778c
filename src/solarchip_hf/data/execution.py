"""Running many tasks on Dask: local processes by default, a cluster by its address."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)

_DEATHS = 3  # of workers at one task with its files read apart: then it is not the files


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[Any],
    settings: Any,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Calls `function(task, settings, isolate)` for every task and yields (task, result) as they come.

    Args:
        function: At the top level of an importable module. With `isolate` true it must survive inputs that kill the
            process that touches them; a task whose worker has died is called so.
        tasks: Picklable; each has a `name`.
        settings: Picklable and small: sent with every task, since what is scattered dies with the workers that hold it.
        workers: Local processes; by default the number of cores, at most one a task. 0 works in this process.
        scheduler: Address of a running Dask cluster.

    Yields:
        Pairs (task, result). An exception of a task is raised here. A worker that dies costs its task a second run; a
        task fails with `KilledWorker` only when its workers have died at it four times.
    """
    if not tasks:
        return
    if workers == 0 and scheduler is None:
        for task in tasks:
            yield task, function(task, settings, False)
        return
    import dask
    from dask.distributed import Client, LocalCluster

    count = min(len(tasks), (os.cpu_count() or 1) if workers is None else max(1, workers))
    # The first death makes a task the suspect: reading its files in a process apart costs little, another worker more.
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        if scheduler:
            with Client(scheduler) as client:
                count = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
                yield from _on_cluster(client, function, tasks, settings, count)
        else:
            options = {
                "threads_per_worker": 1,
                "processes": True,
                "dashboard_address": "127.0.0.1:0",
                "memory_limit": 0,
            }
            with LocalCluster(n_workers=count, **options) as cluster, Client(cluster) as client:
                yield from _on_cluster(client, function, tasks, settings, count)


def _on_cluster(
    client: Any, function: Callable[..., Any], tasks: Sequence[Any], settings: Any, count: int
) -> Iterator[tuple[Any, Any]]:
    from dask.distributed import KilledWorker, as_completed

    waiting = iter(tasks)
    submitted: dict[str, tuple[Any, int]] = {}

    def submit(task: Any, deaths: int = 0) -> Any:
        future = client.submit(function, task, settings, deaths > 0, pure=False)
        submitted[future.key] = (task, deaths)
        return future

    # No more in flight than there are workers: a worker that dies had one task only, which is then the suspect.
    running = as_completed([submit(task) for _, task in zip(range(count), waiting, strict=False)])
    for future in running:
        task, deaths = submitted.pop(future.key)
        try:
            result = future.result()
        except KilledWorker:
            if deaths == _DEATHS:
                raise
            logger.warning("%s: its worker died: it is done again, its files read in a process apart", task.name)
            running.add(submit(task, deaths + 1))
            continue
        following = next(waiting, None)
        if following is not None:
            running.add(submit(following))
        yield task, result


__all__ = ["run_tasks"]
