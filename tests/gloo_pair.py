"""A function on two real gloo processes, for tests that compare them with one that has the whole batch."""

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank: int, compute: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),  # a deadlock shall fail, not hang
    )
    results = compute(rank)
    # A DDP that outlives the group joins its threads under the GIL, which one of them may be waiting for.
    gc.collect()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_two_processes(compute: Callable, folder: Path) -> list:
    """What `compute(rank)`, a module's function, gives on each of two processes: tensors, in lists and dicts."""
    mp.spawn(_work, args=(compute, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
