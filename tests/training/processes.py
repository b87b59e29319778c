"""Processes for the tests of this folder: forked from a server that has imported everything once."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def work(function: Callable, folder: Path, options: dict[str, Any], rank: int, world_size: int, port: int) -> None:
    """What a process does; what goes wrong is written to the folder."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        function(folder, **options)
    except BaseException:
        Path(folder, f"error_{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        gc.collect()  # DDP's reducer goes before its group
        if dist.is_initialized():
            dist.destroy_process_group()


def start(function: Callable, folder: Path, world_size: int, **options: Any) -> list:
    """Starts `function(folder, **options)` on gloo processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "solarchip_hf.training.trainer", "solarchip_hf.data"])
    folder.mkdir(exist_ok=True, parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        context.Process(target=work, args=(function, folder, options, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    return started


def run(function: Callable, folder: Path, world_size: int, **options: Any) -> list[int | None]:
    """Runs `function(folder, **options)` on gloo processes; gives their exit codes, None for one that hangs."""
    started = start(function, folder, world_size, **options)
    codes = []
    for process in started:
        process.join(timeout=150)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def errors(folder: Path) -> str:
    """What went wrong in a run."""
    return "\n".join(file.read_text() for file in folder.glob("error_*.txt"))
