"""Gradient cache: the exact gradient of a large batch in the memory of one chunk.

The contrastive terms couple all observations and modalities of a batch, but only through the embeddings. So a step runs
in three passes (Gao et al. 2021, arXiv 2101.06983; here with terms of each chunk's own, missing data, many processes):

1. every chunk (some observations of one modality) is embedded without a graph;
2. the contrastive terms and their gradient with respect to the embeddings are computed, over all processes;
3. every chunk runs again, with its graph and the same random numbers; its embeddings receive the gradient of pass 2,
   and its own terms (reconstruction, divergence) are added with their share of the whole batch's mean.

The sum of the chunks' gradients is the gradient of the whole objective, to rounding. What grows with the batch are the
images and the embeddings with their gradient; activations are those of one chunk.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..models.distributed import all_reduce_sum, gather_sizes, world_size
from ..models.losses import kl_loss, reconstruction_loss


@dataclass(frozen=True)
class _Chunk:
    """Some observations of one modality: which, the tower that serves it, its place there, and its random seed."""

    rows: slice
    modality: int
    tower: str
    position: int
    seed: int


def _plan(module: Any, observed: torch.Tensor, chunk_size: int) -> list[_Chunk]:
    # As many chunks, of the same towers, on all processes (FSDP waits for each): a shorter batch ends with empty ones.
    batch, longest = len(observed), max(gather_sizes(observed))
    base = int(torch.randint(2**62, ()))  # the one draw of a step, so that a resumed run draws the same
    chunks: list[_Chunk] = []
    for tower, served in module.config.towers().items():
        for position, name in enumerate(served):
            modality = list(module.config.modalities).index(name)
            for start in range(0, longest, chunk_size):
                rows = slice(min(start, batch), min(start + chunk_size, batch))
                chunks.append(_Chunk(rows, modality, tower, position, base + len(chunks)))
    return chunks


@contextlib.contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


def _call_through(model: torch.nn.Module, module: Any, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` as the forward of `module` within its wrapper `model`, so that DDP and FSDP see it so."""
    shadowed = module.__dict__.get("forward")  # Accelerate puts one there
    module.forward = function
    try:
        return model(*inputs)
    finally:
        if shadowed is None:
            del module.forward
        else:
            module.forward = shadowed


def _images(
    chunk: _Chunk, pixel_values: torch.Tensor, observed: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, H, H) images of a chunk on the device, missing ones blank, with their marks (n,); never empty."""
    seen = observed[chunk.rows, chunk.modality].to(device)
    images = pixel_values[chunk.rows, chunk.modality].to(device)
    if not len(images):
        images, seen = images.new_zeros(1, *images.shape[1:]), seen.new_zeros(1)
    return torch.where(seen[:, None, None], images, 0.0)[:, None], seen


def _run_tower(module: Any, chunk: _Chunk, images: torch.Tensor) -> tuple[Any, torch.Tensor]:
    ids = torch.full((len(images),), chunk.position, device=images.device)
    return module.solarchip.towers[chunk.tower](images, ids, return_dict=True), ids


def _embed(images: torch.Tensor, *, module: Any, chunk: _Chunk) -> torch.Tensor:
    return _run_tower(module, chunk, images)[0].projections


def _contrast(
    *, module: Any, embeds: torch.Tensor, observed: torch.Tensor, image_size: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The contrastive terms, and the gradients of their weighted sum by the embeddings and by the temperatures."""
    with torch.enable_grad():
        leaves = [embeds.requires_grad_(), *([module.logit_scales] if module.logit_scales.requires_grad else [])]
        terms = module.contrastive_terms(embeds, observed, image_size=image_size)
        grads = torch.autograd.grad(module.weigh(terms), leaves)
    return {name: term.detach() for name, term in terms.items()}, grads[0], grads[1] if len(grads) > 1 else None


def _chunk_terms(
    images: torch.Tensor,
    *,
    module: Any,
    chunk: _Chunk,
    seen: torch.Tensor,
    shares: torch.Tensor,
    embeds_grad: torch.Tensor,
    scales_grad: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A scalar whose gradient is the chunk's part of the whole gradient, and the chunk's part of its own terms."""
    encoded, ids = _run_tower(module, chunk, images)
    latents = module._sample(encoded) if module.training else encoded.latents
    reconstruction = module.decoders[chunk.tower](latents, ids)
    mask = module._pixel_mask(images.shape[-1], images.device)
    mask = None if mask is None else mask[chunk.modality : chunk.modality + 1]
    one = seen[:, None]  # (n, 1): a batch of one modality
    share = seen.sum() * shares[chunk.modality]
    kind = module.config.reconstruction_loss
    terms = {"reconstruction_loss": reconstruction_loss(reconstruction, images, one, kind, mask, gather=False) * share}
    if encoded.latents_logvar is not None:
        terms["kl_loss"] = kl_loss(encoded.latents[:, None], encoded.latents_logvar[:, None], one, gather=False) * share
    objective = module.weigh(terms)
    count = len(embeds_grad)  # none for an empty chunk
    accurate = torch.promote_types(embeds_grad.dtype, torch.float32)
    objective = objective + (encoded.projections[:count].to(accurate) * embeds_grad).sum()
    if scales_grad is not None:
        objective = objective + (module.logit_scales * scales_grad).sum()
    return objective, {name: term.detach() for name, term in terms.items()}


def _check(model: torch.nn.Module, module: Any, pixel_values: torch.Tensor, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 image, got {chunk_size}.")
    many = len(module.config.modalities)
    if pixel_values.dim() != 4 or pixel_values.shape[1] != many:
        raise ValueError(f"pixel_values: expected (B, {many}, H, W), got {tuple(pixel_values.shape)}.")
    if type(model).__name__ == "DeepSpeedEngine":
        raise ValueError(
            "model: expected a plain, DDP or FSDP model, got a DeepSpeed engine, whose ZeRO reduces gradients at every "
            "chunk's backward. Use DDP or FSDP, or no gradient cache."
        )
    if (
        isinstance(model, DistributedDataParallel)
        and not model.find_unused_parameters
        and len(module.config.towers()) > 1
    ):
        raise ValueError(
            "model: expected DistributedDataParallel with find_unused_parameters=True, since a chunk runs one tower "
            "only, got False. Set ddp_find_unused_parameters=True in the training arguments."
        )


def gradient_cache_step(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    observed: torch.Tensor | None = None,
    *,
    chunk_size: int,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> dict[str, torch.Tensor]:
    """Forward and backward of a whole batch, chunk by chunk; gradients are added to the parameters' `grad`.

    Equal to `model(pixel_values, observed).loss.backward()` to rounding, random numbers apart: these are drawn chunk by
    chunk, the same in both passes. Activation checkpointing must be the non-reentrant kind.

    Under `DistributedDataParallel` gradients are synchronised once, in the last chunk's backward; within the caller's
    `model.no_sync()` not at all, for accumulation. Under FSDP every chunk's backward reduces. Accumulation averages the
    micro-steps' gradients; negatives do not reach across them.

    Args:
        model: A `SolarChipForPreTraining`, plain or wrapped by DDP or FSDP.
        pixel_values: (B, M, H, H) scaled images, on any device: chunks move to the model's.
        observed: (B, M) bool; None: all are there.
        chunk_size: The most images in a chunk. Two passes of a few images each cost about a third more arithmetic than
            one pass over all.
        autocast: Gives the context in which the model runs, as `Accelerator.autocast`.
        backward: Called with each chunk's scalar; scale the loss or divide it by the accumulation steps here.

    Returns:
        `loss` and each term by name: detached scalars, this process's part times the number of processes.

    Raises:
        ValueError: A chunk size below 1, images of another shape, or a wrapper under which the gradient would be wrong.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled forward is not the one that runs here
    module = model.module if isinstance(model, DistributedDataParallel) else model
    _check(model, module, pixel_values, chunk_size)
    device = module.logit_scales.device
    if observed is None:
        observed = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=device)
    observed = observed.bool().to(device)
    batch, many = observed.shape
    chunks = _plan(module, observed, chunk_size)

    embeds: torch.Tensor | None = None  # (B, M, 1+L, projection)
    for chunk in chunks:
        images, _ = _images(chunk, pixel_values, observed, device)
        with torch.no_grad(), autocast(), _random_state(chunk.seed, device):
            part = _call_through(model, module, partial(_embed, module=module, chunk=chunk), images)
        if embeds is None:
            # a gradient in float16 would lose what a loss scaler saves
            dtype = torch.float32 if part.dtype == torch.float16 else part.dtype
            embeds = torch.zeros(batch, many, *part.shape[1:], dtype=dtype, device=device)
        embeds[chunk.rows, chunk.modality] = part[: chunk.rows.stop - chunk.rows.start].to(dtype)

    with torch.no_grad(), autocast():
        contrast = partial(
            _contrast, module=module, embeds=embeds, observed=observed, image_size=pixel_values.shape[-1]
        )
        terms, embeds_grad, scales_grad = _call_through(model, module, contrast)
    del embeds, contrast

    # The chunk's mean is over its own observations; its share of the mean over all processes' makes it exact.
    accurate = torch.promote_types(embeds_grad.dtype, torch.float32)
    shares = world_size() / all_reduce_sum(observed.sum(0)).clamp_min(1).to(accurate)
    for chunk in chunks:
        last = chunk is chunks[-1]
        images, seen = _images(chunk, pixel_values, observed, device)
        hold = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
        own_terms = partial(
            _chunk_terms,
            module=module,
            chunk=chunk,
            seen=seen,
            shares=shares,
            embeds_grad=embeds_grad[chunk.rows, chunk.modality],
            scales_grad=scales_grad if last else None,
        )
        with hold, _random_state(chunk.seed, device):
            with autocast():
                objective, parts = _call_through(model, module, own_terms, images)
            backward(objective)
        for name, part in parts.items():
            terms[name] = terms.get(name, 0.0) + part
    return {"loss": module.weigh(terms), **terms}


__all__ = ["gradient_cache_step"]
