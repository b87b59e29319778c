"""Measures what a saved model takes: another process loads it, runs it once, and tells its peak."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .card_facts import kind_of

_TIMEOUT = 1800.0


def measure_memory(folder: str | Path) -> dict[str, Any]:
    """Peak memory of a process that loads a model and runs one observation of random pixels through it.

    Args:
        folder: A saved backbone or flare model.

    Returns:
        `peak_bytes` (resident memory of the process, Python and torch included), `seconds` of the run, `what` was run,
        and the `device`.

    Raises:
        ValueError: The folder holds no model that this can run, or running it failed.
    """
    if kind_of(folder) not in ("backbone", "flare"):
        raise ValueError(f"{folder}: expected a saved model to measure, got a {kind_of(folder)}.")
    call = [sys.executable, "-m", __name__, str(folder)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=_TIMEOUT)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"{folder}: expected a model that runs, got: {last[0]}")
    return json.loads(result.stdout.splitlines()[-1])


def _run(folder: str) -> dict[str, Any]:
    import torch

    from ..models.modeling_solarchip import SolarChipModel
    from ..models.modeling_solarchip_classification import SolarChipForImageClassification

    torch.manual_seed(0)
    flare = kind_of(folder) == "flare"
    model = (SolarChipForImageClassification if flare else SolarChipModel).from_pretrained(folder).eval()
    size, count = model.config.image_size, len(model.config.modalities)
    begin = time.perf_counter()
    with torch.inference_mode():
        if flare:
            model(torch.randn(1, count, size, size))
        else:
            model(torch.randn(count, 1, size, size), list(range(count)))
    seconds = time.perf_counter() - begin
    scale = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        "seconds": seconds,
        "what": f"one observation of {count} channels at {size} px in float32",
        "device": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


__all__ = ["measure_memory"]

if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1])))
