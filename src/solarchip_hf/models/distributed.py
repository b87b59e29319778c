"""Collectives with exact gradients, for losses that compare the observations of all processes.

Each process computes the part of a loss that belongs to its own observations and calls `backward` on it. The true
gradient is that of the **sum** of all parts, so the adjoint of a gather adds up what every process sends back, and the
adjoint of a sum is again a sum. A loss that is then multiplied by the number of processes gives, after the averaging of
`DistributedDataParallel`, the gradient of one process with the whole batch.

Without `torch.distributed`, or with one process, all functions return their argument.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if _initialized() else 1


def rank() -> int:
    """This process's index within the default group, 0 without one."""
    return dist.get_rank() if _initialized() else 0


def gather_sizes(tensor: torch.Tensor) -> list[int]:
    """Length of the first dimension of `tensor` on every process, in rank order.

    Args:
        tensor: (B, ...); only its first length and its device are read.
    """
    if world_size() == 1:
        return [tensor.shape[0]]
    size = torch.tensor([tensor.shape[0]], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    return torch.cat(sizes).tolist()


def _gather_rows(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    # Collectives want equal shapes: shorter batches travel with zero rows, cut off again on arrival.
    longest = max(sizes)
    padded = F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, longest - tensor.shape[0]]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, sizes):
        ctx.sizes = sizes
        return _gather_rows(tensor, sizes)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.sizes)[rank()], None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad)


def all_gather_with_grad(tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
    """Concatenates a tensor of all processes along the first dimension, differentiably.

    Args:
        tensor: (B, ...) local part, the same trailing shape and dtype on all processes; B may differ, and may be 0.
        sizes: The local lengths in rank order, as `gather_sizes` returns them; asked for when None.

    Returns:
        (sum of all B, ...) in rank order. The gradient that reaches `tensor` is the sum of what all processes send
        back for its rows.
    """
    if world_size() == 1:
        return tensor
    sizes = gather_sizes(tensor) if sizes is None else sizes
    if tensor.dtype == torch.bool:
        return _gather_rows(tensor.to(torch.uint8), sizes).bool()
    return _AllGather.apply(tensor, sizes)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, as a new tensor outside the graph.

    Args:
        tensor: Any shape, equal on all processes.
    """
    total = tensor.detach()
    if world_size() > 1:
        total = total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
    return total


def all_reduce_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, whose gradient is the sum of the gradients of all processes.

    Args:
        tensor: Any shape, equal on all processes.
    """
    return _AllReduce.apply(tensor) if world_size() > 1 else tensor


__all__ = ["all_gather_with_grad", "all_reduce_sum", "all_reduce_with_grad", "gather_sizes", "rank", "world_size"]
