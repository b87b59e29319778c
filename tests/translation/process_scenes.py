"""Two processes on gloo that play several scenes, one process group a scene, so that everything is imported once."""

import faulthandler
import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Scene = Callable[[Path, int], None]
_TIMEOUT = 200.0  # seconds


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _play(scenes: list[Scene], folder: Path, rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    stuck = open(folder / f"error_{rank}.txt", "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(_TIMEOUT - 20, file=stuck)
    try:
        from accelerate.state import AcceleratorState

        for scene, port in zip(scenes, ports, strict=True):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                scene(folder, rank)
            finally:
                gc.collect()  # DDP's reducer goes before its group
                if dist.is_initialized():
                    dist.destroy_process_group()
                AcceleratorState._reset_state(reset_partial_state=True)
    except BaseException:
        traceback.print_exc(file=stuck)
        stuck.flush()
        raise
    faulthandler.cancel_dump_traceback_later()


def play(scenes: list[Scene], folder: Path) -> None:
    """Runs `scene(folder, rank)` of every scene in two processes.

    Raises:
        RuntimeError: One of them failed or hangs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["solarchip_hf.translation.diffusion_training", "solarchip_hf.data"])
    ports = _free_ports(len(scenes))
    started = [context.Process(target=_play, args=(scenes, folder, rank, ports)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(_TIMEOUT)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    if codes != [0, 0]:
        said = "\n".join(path.read_text() for path in folder.glob("error_*.txt"))
        raise RuntimeError(f"exit codes {codes}\n{said}")
