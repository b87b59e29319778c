"""The arithmetic of the contrastive terms: cross-entropies in slices, value and gradient in one pass.

A slice of the logits lives only until its part of the loss and of the gradient has been added up: nothing of their size
is kept for the backward, and nothing is computed twice. What is kept has the size of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .distributed import all_gather_with_grad, gather_sizes, rank, world_size

# Norms are bounded from below, so that a vector of zeros (a centred batch of one) gives zeros.
NORM_EPS = 1e-8
# Finite, so that a row without any candidate stays free of NaN; so far below any logit that its exponential is 0.
_MASKED = -1e30


@dataclass(frozen=True)
class _Problems:
    """Cross-entropy problems of the same shape: for each pair of modalities G of them, n rows against m columns.

    Attributes:
        rows: (M, G, n, P) unit vectors.
        columns: (M, G, m, P) unit vectors; the same object as `rows` where rows and columns are the same.
        scales: (G,) factor of the logits.
        weights: (pairs, G or 1, n or 1) weight of each row's cross-entropy, in each direction.
        valid: (pairs, m) bool, which columns are candidates; None where all are.
        start: The column of the first row's positive.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scales: torch.Tensor
    weights: torch.Tensor
    valid: torch.Tensor | None = None
    start: int = 0

    def solve(
        self, pairs: Sequence[tuple[int, int]], max_logits: int, with_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss of each problem, added up over pairs, rows and directions, with its gradients.

        Returns:
            Losses (G,); their derivatives by the scales (G,); the gradients of `rows` and of `columns` (the same object
            where these are the same), None without `with_grad`.
        """
        rows, columns = self.rows, self.columns
        alone = columns is rows
        problems, height, width = rows.shape[1], rows.shape[2], columns.shape[2]
        losses, by_scale = rows.new_zeros(problems), rows.new_zeros(problems)
        by_rows: Any = rows.new_zeros(rows.shape) if with_grad else None
        by_columns: Any = columns.new_zeros(columns.shape) if with_grad and not alone else by_rows
        if not problems or not height:  # a process may have no observation
            return losses, by_scale, by_rows, by_columns

        step = min(problems, max(1, max_logits // (height * width)))
        row_step = min(height, max(1, max_logits // width))
        for index, pair in enumerate(pairs):
            masked = None if self.valid is None else ~self.valid[index]
            for first in range(0, problems, step):
                g = slice(first, first + step)
                weights = self.weights[index].expand(problems, height)[g]
                if alone and row_step == height:  # one product serves both directions
                    one, other = pair
                    values, slopes, grad = _two_way(
                        rows[one, g], rows[other, g], self.scales[g], weights, masked, with_grad
                    )
                    losses[g] += values
                    if with_grad:
                        by_scale[g] += slopes
                        by_rows[one, g].baddbmm_(grad, rows[other, g])
                        by_rows[other, g].baddbmm_(grad.mT, rows[one, g])
                        del grad  # before the next slice comes
                    continue
                for one, other in (pair, pair[::-1]):
                    for top in range(0, height, row_step):
                        r = slice(top, top + row_step)
                        values, slopes, grad = _one_way(
                            rows[one, g, r],
                            columns[other, g],
                            self.scales[g],
                            weights[:, r],
                            masked,
                            self.start + top,
                            with_grad,
                        )
                        losses[g] += values
                        if with_grad:
                            by_scale[g] += slopes
                            by_rows[one, g, r].baddbmm_(grad, columns[other, g])
                            by_columns[other, g].baddbmm_(grad.mT, rows[one, g, r])
                            del grad
        return losses, by_scale, by_rows, by_columns


def _softmax_terms(logits, dim, weights, out=None):
    # The log-sum-exp along `dim`, and the softmax times the rows' weights, written into `out` if given.
    peak = logits.amax(dim, keepdim=True)
    softmax = torch.sub(logits, peak, out=out).exp_()
    total = softmax.sum(dim, keepdim=True)
    return (peak + total.log()).squeeze(dim), softmax.mul_(weights.unsqueeze(dim) / total)


def _two_way(left, right, scales, weights, masked, with_grad):
    """Both directions of square problems (g, n, n): losses (g,), slopes by scale (g,), gradient by <left, right>."""
    scales = scales[:, None, None]
    logits = torch.bmm(left, right.mT).mul_(scales)
    if masked is not None:
        logits.masked_fill_(masked[:, None], _MASKED).masked_fill_(masked, _MASKED)
    positive = logits.diagonal(dim1=1, dim2=2).clone()
    by_row, grad = _softmax_terms(logits, 2, weights)
    by_column, other = _softmax_terms(logits, 1, weights)
    values = ((by_row - positive + by_column - positive) * weights).sum(1)
    if not with_grad:
        return values, None, None
    grad.add_(other).diagonal(dim1=1, dim2=2).sub_(2 * weights)
    slopes = torch.mul(grad, logits, out=other).sum((1, 2)) / scales.flatten()
    return values, slopes, grad.mul_(scales)


def _one_way(left, right, scales, weights, masked, offset, with_grad):
    """Rows (g, r) against columns (g, m) with the positives on the diagonal at `offset`; returns as `_two_way`."""
    scales = scales[:, None, None]
    logits = torch.bmm(left, right.mT).mul_(scales)
    if masked is not None:
        logits.masked_fill_(masked, _MASKED)
    positive = logits.diagonal(offset, dim1=1, dim2=2).clone()
    by_row, grad = _softmax_terms(logits, 2, weights)
    values = ((by_row - positive) * weights).sum(1)
    if not with_grad:
        return values, None, None
    grad.diagonal(offset, dim1=1, dim2=2).sub_(weights)
    slopes = logits.mul_(grad).sum((1, 2)) / scales.flatten()
    return values, slopes, grad.mul_(scales)


def _common(observed, pairs):
    # (pairs, B): whether both modalities of the pair were observed
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    return (observed[:, first] & observed[:, second]).T


class ContrastiveTerms(torch.autograd.Function):
    """Class, patch and intra term: `apply(embeds, scales, observed, pairs, gather, max_logits, with_grad)`.

    Embeddings (B, M, 1+L, P), before their L2 norm; `scales` (3,) in the dtype of the arithmetic. Returns three
    scalars. Differentiable once. With `gather`, forward and backward hold collectives: all processes must run both.
    """

    @staticmethod
    def forward(ctx, embeds, scales, observed, pairs, gather, max_logits, with_grad):
        inverse = torch.linalg.vector_norm(embeds, dim=-1, keepdim=True, dtype=scales.dtype)
        inverse = inverse.clamp_min_(NORM_EPS).reciprocal_().masked_fill_(~observed[..., None, None], 0.0)
        units = (embeds * inverse).masked_fill_(~observed[..., None, None], 0.0)  # (B, M, 1+L, P), 0 x NaN included

        processes = world_size() if gather else 1
        everyone, everywhere, sizes = units, observed, None
        if processes > 1:
            sizes = gather_sizes(units)
            everyone, everywhere = all_gather_with_grad(units, sizes), all_gather_with_grad(observed, sizes)
        valid = _common(everywhere, pairs)  # (pairs, observations of all processes)
        count = valid.sum(1, keepdim=True)
        live = (count > 0).sum()  # pairs with any common observation
        share = 0.5 * processes / (count.clamp_min(1) * live.clamp_min(1)).to(units.dtype)
        weights = _common(observed, pairs) * share  # (pairs, B)

        # The class token is one more position of the patch term, with its own scale and weight.
        patches = units.shape[2] - 1
        positions = units.new_full((1 + patches,), 1 / max(1, patches))
        positions[0] = 1
        rows = units.permute(1, 2, 0, 3)  # (M, 1+L, B, P)
        tokens = _Problems(
            rows=rows,
            columns=rows if processes == 1 else everyone.permute(1, 2, 0, 3),
            scales=torch.cat([scales[:1], scales[1:2].expand(patches)]),
            weights=weights[:, None] * positions[:, None],
            valid=valid,
            start=0 if sizes is None else sum(sizes[: rank()]),
        )
        rows = units[:, :, 1:].transpose(0, 1)  # (M, B, L, P)
        intra = _Problems(rows, rows, scales[2:].expand(len(units)), weights[:, :, None] / max(1, patches))

        token_loss, token_slope, by_rows, by_columns = tokens.solve(pairs, max_logits, with_grad)
        intra_loss, intra_slope, by_intra, _ = intra.solve(pairs, max_logits, with_grad)
        if with_grad:
            slopes = torch.stack([token_slope[0], token_slope[1:].sum(), intra_slope.sum()])
            ctx.sizes, ctx.dtype = sizes, embeds.dtype
            by_columns = None if by_columns is by_rows else by_columns
            ctx.save_for_backward(units, inverse, by_rows, by_columns, by_intra, slopes)
        return token_loss[0].clone(), token_loss[1:].sum(), intra_loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cls_grad, patch_grad, intra_grad):
        units, inverse, by_rows, by_columns, by_intra, slopes = ctx.saved_tensors
        factors = torch.cat([cls_grad.view(1), patch_grad.expand(units.shape[2] - 1)])[:, None]
        total = by_rows.permute(2, 0, 1, 3) * factors
        if by_columns is not None:
            others = (by_columns.permute(2, 0, 1, 3) * factors).contiguous()
            dist.all_reduce(others)
            total += others.split(ctx.sizes)[rank()]
        total[:, :, 1:].addcmul_(by_intra.transpose(0, 1), intra_grad)
        # the norm's derivative: what lies along the unit vector has no effect
        along = (total * units).sum(-1, keepdim=True)
        total.addcmul_(units, along, value=-1).mul_(inverse)
        return total.to(ctx.dtype), slopes * torch.stack([cls_grad, patch_grad, intra_grad]), *[None] * 5


__all__ = ["NORM_EPS", "ContrastiveTerms"]
