"""Time and memory of a step, on a CPU or a GPU; what the benchmarks of losses and training steps share."""

import time
from pathlib import Path

import torch


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step, device, repeats):
    """Seconds of every one of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def memory_of(process_field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(process_field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {process_field}: the memory measurement needs Linux, or a GPU.")


def peak_growth(step, device):
    """Bytes by which memory rose above what was allocated before `step`, at its peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak (VmHWM) back to the present
    before = memory_of("VmRSS")
    step()
    return memory_of("VmHWM") - before
