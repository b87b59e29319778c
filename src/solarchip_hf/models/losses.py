"""Losses of contrastive autoencoding among co-temporal solar images: tensors in, named terms out.

With z the centred and L2-normalised embedding, s_t the scale of term t, and O_ab the observations (of all processes) in
which both modalities of a pair (a, b) were observed, a direction of the three terms is the cross-entropy

    cls    l(a>b) = - mean over o in O_ab of log softmax over q in O_ab of s_1 <z_a[o, 0], z_b[q, 0]>, at q = o
    patch  l(a>b) = the same for every patch index i with s_2 <z_a[o, i], z_b[q, i]>, then the mean over i
    intra  l(a>b) = - mean over o in O_ab and patches i of log softmax over j of s_3 <z_a[o, i], z_b[o, j]>, at j = i

A pair's term is the mean of its two directions, the term the mean over the pairs whose O_ab is not empty. Source: the
objective of SolarCHIP (arXiv 2511.22958), extended to missing modalities, to several processes, and by centring.

Under `torch.distributed` every term is the local sum over the count on **all** processes, times their number: averaged
over the processes, values and gradients are those of one process with the whole batch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .contrastive import ContrastiveTerms
from .distributed import all_reduce_sum, all_reduce_with_grad, world_size

# Temperatures stay at or above 1/100, as CLIP has it (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = math.log(100.0)
# Added to the variances, so that a batch of one is centred to zeros and not to NaN.
CENTERING_EPS = 1e-6


def make_pairs(modalities: Sequence[str], anchor: str | None = "hmi", pairing: str = "anchor") -> list[tuple[int, int]]:
    """Pairs of modality indices that the contrastive terms compare.

    Args:
        modalities: Names in the order of the model's inputs.
        anchor: Name of the modality that all others are compared with; read for `pairing="anchor"` only.
        pairing: `"anchor"` (the published scheme) or `"all"` (every two modalities).

    Returns:
        Index pairs (i, j), the anchor first where there is one; empty for a single modality.

    Raises:
        ValueError: Unknown `pairing`, or an anchor that is not among several modalities.
    """
    names = list(modalities)
    if pairing == "all":
        return [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    if pairing != "anchor":
        raise ValueError(f"pairing: expected 'anchor' or 'all', got {pairing!r}.")
    if len(names) < 2:
        return []
    if anchor not in names:
        raise ValueError(
            f"anchor: expected one of the modalities {', '.join(names)}, got {anchor!r}. "
            "Set anchor_modality to one of them, or pairing to 'all'."
        )
    first = names.index(anchor)
    return [(first, j) for j in range(len(names)) if j != first]


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_embeds(embeds: torch.Tensor, observed: torch.Tensor) -> None:
    if embeds.dim() != 4:
        raise ValueError(f"embeds: expected (observations, modalities, 1 + patches, width), got {tuple(embeds.shape)}.")
    if observed.shape != embeds.shape[:2]:
        raise ValueError(f"observed: expected shape {tuple(embeds.shape[:2])}, got {tuple(observed.shape)}.")


def _select_observed(tensor: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    # `where` and not a product: what an unobserved image holds (NaN too) reaches neither value nor gradient.
    return torch.where(observed.view(*observed.shape, *[1] * (tensor.dim() - 2)), tensor, 0.0)


def _centered_positions(embeds: torch.Tensor, centering: str) -> torch.Tensor:
    if centering not in ("class", "tokens"):
        raise ValueError(f"centering: expected 'none', 'class' or 'tokens', got {centering!r}.")
    return embeds[..., :1, :] if centering == "class" else embeds


def centering_statistics(
    embeds: torch.Tensor, observed: torch.Tensor, *, centering: str = "tokens", gather: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of the embeddings of each modality over the batch of all processes, differentiably.

    Args:
        embeds: (B, M, 1+L, P) projections, floating.
        observed: (B, M) bool.
        centering: `"class"` for the class token only, `"tokens"` for every position.
        gather: Whether the statistics run over all processes; else over the local batch.

    Returns:
        Mean (M, K, P), deviation (M, K, P), with K = 1 for `"class"` and 1+L for `"tokens"`, in float32 at least, and
        the number of observations (M,), long. The deviation is that of the batch (not Bessel's), never below
        `sqrt(CENTERING_EPS)`. A modality without observations has mean 0.
    """
    _check_embeds(embeds, observed)
    observed = observed.bool()
    tokens = _select_observed(_at_least_float32(_centered_positions(embeds, centering)), observed)  # (B, M, K, P)
    total, reduce = (all_reduce_sum, all_reduce_with_grad) if gather else (torch.Tensor.detach, lambda tensor: tensor)
    count = total(observed.sum(0))  # (M,)
    divisor = count.clamp_min(1).to(tokens.dtype)[:, None, None]
    mean = reduce(tokens.sum(0)) / divisor
    variance = reduce(_select_observed(tokens - mean, observed).square().sum(0)) / divisor
    return mean, (variance + CENTERING_EPS).sqrt(), count


def center_embeds(embeds: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Subtracts a mean and divides by a deviation, on the first K positions of each image.

    Args:
        embeds: (..., 1+L, P) projections.
        mean: (..., K, P), broadcast against the leading dimensions; K = 1 touches the class token only.
        deviation: As `mean`.

    Returns:
        (..., 1+L, P) in the wider of the dtypes.
    """
    positions = mean.shape[-2]
    centered = (embeds[..., :positions, :] - mean) / deviation
    if positions == embeds.shape[-2]:
        return centered
    return torch.cat([centered, embeds[..., positions:, :].to(centered.dtype)], dim=-2)


def contrastive_losses(
    embeds: torch.Tensor,
    observed: torch.Tensor,
    logit_scales: torch.Tensor,
    *,
    pairs: Sequence[tuple[int, int]],
    patch_mask: torch.Tensor | None = None,
    centering: str = "none",
    gather: bool = True,
    max_logits: int = 2**27,
) -> dict[str, torch.Tensor]:
    """The class, patch and intra terms of a batch of observations.

    Exact for missing modalities (an unobserved image changes neither value nor gradient, whatever it holds), for any
    slicing, and for any distribution of the batch over processes, uneven ones included. Differentiable once.

    Args:
        embeds: (B, M, 1+L, P) raw projections, class token first; any floating dtype. Arithmetic is in float32 (float64
            for float64), under autocast too.
        observed: (B, M) bool.
        logit_scales: (3,) logarithms of the scales of the class, patch and intra terms; clamped at ln 100, beyond which
            their gradient is zero.
        pairs: Index pairs of modalities, as from `make_pairs`. Without any, the terms are zero.
        patch_mask: (L,) bool, the patches that enter the patch and intra terms; all when None.
        centering: `"none"`; `"class"`: the class token, by its batch statistics per modality; `"tokens"`: every
            position by its own. The statistics are of all observed images of the modality, and carry gradient.
        gather: Whether candidates, statistics and counts are of all processes. If not, nothing crosses processes: each
            has the terms of its own batch.
        max_logits: The most elements of one slice of logits; three arrays of that size are alive at a time.

    Returns:
        Scalars `cls_loss`, `patch_loss`, `intra_loss`; under `torch.distributed` this process's part, times the number
        of processes (their mean over the processes is the loss).

    Raises:
        ValueError: Shapes that disagree, an unknown `centering`, or a `patch_mask` that keeps nothing.
    """
    _check_embeds(embeds, observed)
    if logit_scales.shape != (3,):
        raise ValueError(f"logit_scales: expected shape (3,), got {tuple(logit_scales.shape)}.")
    observed = observed.bool()
    with torch.autocast(embeds.device.type, enabled=False):
        scales = logit_scales.to(torch.promote_types(embeds.dtype, torch.float32)).clamp(max=MAX_LOGIT_SCALE).exp()
        if patch_mask is not None:
            embeds = _keep_patches(embeds, patch_mask)
        if centering != "none":
            mean, deviation, _ = centering_statistics(embeds, observed, centering=centering, gather=gather)
            embeds = center_embeds(_select_observed(embeds, observed), mean, deviation)
        with_grad = torch.is_grad_enabled() and (embeds.requires_grad or scales.requires_grad)
        terms = ContrastiveTerms.apply(embeds, scales, observed, list(pairs), gather, max_logits, with_grad)
    return dict(zip(("cls_loss", "patch_loss", "intra_loss"), terms, strict=True))


def _keep_patches(embeds: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
    patches = embeds.shape[2] - 1
    if patch_mask.shape != (patches,):
        raise ValueError(f"patch_mask: expected shape ({patches},), got {tuple(patch_mask.shape)}.")
    kept = torch.cat([patch_mask.new_ones(1, dtype=torch.bool), patch_mask.bool()]).nonzero().squeeze(1)
    if len(kept) == 1:
        raise ValueError("patch_mask: expected at least one kept patch, got none. Lower min_disk_fraction.")
    return embeds.index_select(2, kept.to(embeds.device))


def _modality_sum(
    loss: torch.Tensor, observed: torch.Tensor, elements: torch.Tensor | int, gather: bool
) -> torch.Tensor:
    # Per modality the mean over its observed images' elements on all processes, then the sum over modalities.
    count = observed.sum(0)
    if gather:
        count = all_reduce_sum(count)
    per_modality = loss / (count * elements).clamp_min(1).to(loss.dtype)
    return per_modality.sum() * (world_size() if gather else 1)


def reconstruction_loss(
    reconstruction: torch.Tensor,
    pixel_values: torch.Tensor,
    observed: torch.Tensor,
    kind: str = "l1",
    pixel_mask: torch.Tensor | None = None,
    *,
    gather: bool = True,
) -> torch.Tensor:
    """Absolute or squared error of reconstructions: the mean over valid pixels, summed over modalities.

        sum over m of (sum over observed b and valid pixels p of |r[b, m, p] - x[b, m, p]|^k) / (observations x pixels)

    The published code adds up pixels instead of averaging them; its balance is had by a weight of H x W.

    Args:
        reconstruction: (B, M, H, W), any floating dtype; the error is taken in float32 at least.
        pixel_values: (B, M, H, W), what an unobserved image or a pixel outside the mask holds is not read.
        observed: (B, M) bool.
        kind: `"l1"` or `"l2"`.
        pixel_mask: (M, H, W) bool, the valid pixels of each modality; all when None.
        gather: Whether the counts are those of all processes; see the module's text.

    Returns:
        A scalar; zero for modalities that no process has observed.

    Raises:
        ValueError: Unknown `kind`, or shapes that disagree.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind: expected 'l1' or 'l2', got {kind!r}.")
    if reconstruction.shape != pixel_values.shape:
        raise ValueError(
            f"pixel_values: expected the reconstruction's shape {tuple(reconstruction.shape)}, "
            f"got {tuple(pixel_values.shape)}."
        )
    if pixel_mask is not None and pixel_mask.shape != reconstruction.shape[1:]:
        raise ValueError(f"pixel_mask: expected {tuple(reconstruction.shape[1:])}, got {tuple(pixel_mask.shape)}.")
    observed = observed.bool()
    error_of = F.l1_loss if kind == "l1" else F.mse_loss
    with torch.autocast(reconstruction.device.type, enabled=False):
        sums = []
        # One modality at a time bounds the temporaries; unbound at once, since a slice's backward fills a whole batch.
        for m, image in enumerate(reconstruction.unbind(1)):
            valid = observed[:, m, None, None]
            if pixel_mask is not None:
                valid = valid & pixel_mask[m].to(valid.device)
            ours = torch.where(valid, _at_least_float32(image), 0.0)
            target = torch.where(valid, pixel_values[:, m].to(ours.dtype), 0.0)
            sums.append(error_of(ours, target, reduction="sum"))
        if pixel_mask is None:
            pixels: int | torch.Tensor = math.prod(reconstruction.shape[2:])
        else:
            pixels = pixel_mask.flatten(1).sum(1).to(observed.device)
        return _modality_sum(torch.stack(sums), observed, pixels, gather)


def kl_loss(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    observed: torch.Tensor,
    *,
    pixels: int | None = None,
    gather: bool = True,
) -> torch.Tensor:
    """Divergence of a diagonal Gaussian posterior from the standard normal, normalised, summed over modalities.

        sum over m of (1 / (observations x pixels)) sum over observed b of 1/2 sum (mean^2 + exp(logvar) - 1 - logvar)

    (Kingma and Welling 2014, appendix B.) With `pixels` = H x W of the image, divergence and `reconstruction_loss` are
    both per pixel, as in the evidence bound; the default divides by the latent's own number of elements.

    Args:
        mean: (B, M, ...) posterior means.
        logvar: (B, M, ...) logarithms of the posterior variances.
        observed: (B, M) bool; latents of unobserved images are not read.
        pixels: What an image's divergence is divided by; the number of latent elements when None.
        gather: Whether the counts are those of all processes.

    Returns:
        A scalar.

    Raises:
        ValueError: Shapes that disagree.
    """
    if mean.shape != logvar.shape:
        raise ValueError(f"logvar: expected the mean's shape {tuple(mean.shape)}, got {tuple(logvar.shape)}.")
    observed = observed.bool()
    with torch.autocast(mean.device.type, enabled=False):
        mean = _select_observed(_at_least_float32(mean), observed).flatten(2)
        logvar = _select_observed(_at_least_float32(logvar), observed).flatten(2)
        divergence = 0.5 * (mean.square() + torch.expm1(logvar) - logvar).sum((0, 2))  # (M,)
        return _modality_sum(divergence, observed, mean.shape[2] if pixels is None else pixels, gather)


__all__ = [
    "CENTERING_EPS",
    "MAX_LOGIT_SCALE",
    "center_embeds",
    "centering_statistics",
    "contrastive_losses",
    "kl_loss",
    "make_pairs",
    "reconstruction_loss",
]
