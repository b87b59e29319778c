"""The research layout run as it stands: plain functions of a branch's tensors, against which a conversion is checked.

Tensors are floating, by their keys within a branch; images (n, 1, H, H) of the same dtype.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from solarchip_hf import SolarChipForPreTraining, SolarChipModel
from solarchip_hf.models.losses import MAX_LOGIT_SCALE

Weights = Mapping[str, torch.Tensor]

# Largest difference between the two layouts, against the largest expected value where that is above 1. They are run in
# float64: in float32 the decoder of an untrained CNN multiplies rounding to 1e-4, behind which an error could hide.
TOLERANCE = 1e-6


def _layer_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _transformer(weights: Weights, name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    layers = len({key.split(".")[3] for key in weights if key.startswith(f"{name}.resblocks.")})
    for index in range(layers):
        block = f"{name}.resblocks.{index}"
        normed = _layer_norm(weights, f"{block}.ln_1", x)
        joint = F.linear(normed, weights[f"{block}.attn.in_proj_weight"], weights[f"{block}.attn.in_proj_bias"])
        query, key, value = joint.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, L, width)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + _linear(weights, f"{block}.attn.out_proj", attended)
        inner = _linear(weights, f"{block}.mlp.c_fc", _layer_norm(weights, f"{block}.ln_2", x))
        x = x + _linear(weights, f"{block}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
    return x


def vit_tokens(weights: Weights, images: torch.Tensor, heads: int) -> torch.Tensor:
    """(n, 1, H, H) -> (n, 1+L, hidden), class token first."""
    kernel = weights["encoder.conv1.weight"]
    patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    tokens = torch.cat([weights["encoder.class_embedding"].expand(len(images), 1, -1), patches], dim=1)
    tokens = _layer_norm(weights, "encoder.ln_pre", tokens + weights["encoder.positional_embedding"])
    return _layer_norm(weights, "encoder.ln_post", _transformer(weights, "encoder.transformer", tokens, heads))


def vit_images(weights: Weights, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(n, 1+L, hidden) -> (n, 1, H, H), each token a stretch of raster rows."""
    x = _transformer(weights, "decoder.transformer", _layer_norm(weights, "decoder.ln_pre", tokens[:, 1:]), heads)
    pixels = _linear(weights, "decoder.de_proj", x)
    side = round((pixels.shape[1] * pixels.shape[2]) ** 0.5)
    return pixels.reshape(len(pixels), 1, side, side)


def _conv(weights: Weights, name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def _group_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    groups = 32
    while groups > max(x.shape[1] // 2, 1):
        groups //= 2
    return F.group_norm(x, groups, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def _residual(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    inner = _conv(weights, f"{name}.conv1", F.silu(_group_norm(weights, f"{name}.norm1", x)), padding=1)
    inner = _conv(weights, f"{name}.conv2", F.silu(_group_norm(weights, f"{name}.norm2", inner)), padding=1)
    return inner + (_conv(weights, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x)


def _middle(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    x = _residual(weights, f"{name}.block_1", x)
    normed = _group_norm(weights, f"{name}.attn_1.norm", x)
    query, key, value = (_conv(weights, f"{name}.attn_1.{part}", normed).flatten(2) for part in "qkv")  # (n, c, L)
    scores = query.transpose(1, 2) @ key / query.shape[1] ** 0.5  # (n, L of the queries, L of the keys)
    attended = (value @ scores.softmax(-1).transpose(1, 2)).unflatten(2, x.shape[2:])
    return _residual(weights, f"{name}.block_2", x + _conv(weights, f"{name}.attn_1.proj_out", attended))


def _levels(weights: Weights, name: str) -> list[list[str]]:
    """Names of the residual blocks of each resolution, finest first."""
    found = {
        tuple(map(int, key.split(".")[2:5:2])) for key in weights if key.startswith(f"{name}.") and ".block." in key
    }
    levels = max(level for level, _ in found) + 1
    return [[f"{name}.{i}.block.{j}" for level, j in sorted(found) if level == i] for i in range(levels)]


def cnn_latents(weights: Weights, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(n, 1, H, H) -> latents (n, z, h, h), the posterior's mean for a VAE, and the logarithm of its variance."""
    x = _conv(weights, "encoder.conv_in", images, padding=1)
    for level, blocks in enumerate(_levels(weights, "encoder.down")):
        for block in blocks:
            x = _residual(weights, block, x)
        down = f"encoder.down.{level}.downsample.conv"
        if f"{down}.weight" in weights:
            x = _conv(weights, down, F.pad(x, (0, 1, 0, 1)), stride=2)
    x = F.silu(_group_norm(weights, "encoder.norm_out", _middle(weights, "encoder.mid", x)))
    x = _conv(weights, "encoder.conv_out", x, padding=1)
    if "quant_conv.weight" not in weights:
        return x, None
    mean, logvar = _conv(weights, "quant_conv", x).chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def cnn_images(weights: Weights, latents: torch.Tensor) -> torch.Tensor:
    """(n, z, h, h) -> (n, 1, H, H)."""
    x = _conv(weights, "post_quant_conv", latents) if "post_quant_conv.weight" in weights else latents
    x = _middle(weights, "decoder.mid", _conv(weights, "decoder.conv_in", x, padding=1))
    levels = _levels(weights, "decoder.up")
    for level in reversed(range(len(levels))):
        for block in levels[level]:
            x = _residual(weights, block, x)
        up = f"decoder.up.{level}.upsample.conv"
        if f"{up}.weight" in weights:
            x = _conv(weights, up, F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)
    return _conv(weights, "decoder.conv_out", F.silu(_group_norm(weights, "decoder.norm_out", x)), padding=1)


def autoencode(weights: Weights, images: torch.Tensor, heads: int | None) -> dict[str, torch.Tensor]:
    """Tokens, contrastive embeddings and reconstructions of one branch.

    Args:
        weights: Tensors by their keys within the branch.
        images: (n, 1, H, H).
        heads: Attention heads of a ViT; None for a CNN.

    Returns:
        `tokens` (n, 1+L, hidden), `projections` (n, 1+L, projection); `reconstruction` (n, 1, H, H) where the branch
        has a decoder, and `logvar` (n, z, h, h) for a VAE.
    """
    extra = {}
    decodes = any(key.startswith("decoder.") for key in weights)
    if heads is not None:
        tokens = vit_tokens(weights, images, heads)
        if decodes:
            extra["reconstruction"] = vit_images(weights, tokens, heads)
    else:
        latents, logvar = cnn_latents(weights, images)
        class_token = _linear(weights, "cls_proj.2", latents.mean((2, 3)))
        tokens = torch.cat([class_token[:, None], latents.flatten(2).transpose(1, 2)], dim=1)
        if decodes:
            extra["reconstruction"] = cnn_images(weights, latents)
        if logvar is not None:
            extra["logvar"] = logvar
    return {"tokens": tokens, "projections": tokens @ weights["contrasive_porject"], **extra}


def _both_ways(logits: torch.Tensor) -> torch.Tensor:
    targets = torch.arange(logits.shape[-1]).expand(logits.shape[:-1]).flatten()
    ways = (logits, logits.transpose(-1, -2))
    return sum(F.cross_entropy(way.flatten(0, -2), targets) for way in ways) / 2


def contrastive_terms(
    anchor: torch.Tensor, others: list[torch.Tensor], scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The three terms, each the mean over the pairs of the anchor with another modality.

    Args:
        anchor: (B, 1+L, projection) of HMI.
        others: As many of the other modalities.
        scales: (3,) inverse temperatures of the class, patch and intra terms.
    """
    terms: dict[str, list[torch.Tensor]] = {"cls_loss": [], "patch_loss": [], "intra_loss": []}
    first = anchor / anchor.norm(dim=-1, keepdim=True)
    for other in others:
        second = other / other.norm(dim=-1, keepdim=True)
        terms["cls_loss"].append(_both_ways(scales[0] * first[:, 0] @ second[:, 0].T))
        by_patch = first[:, 1:].transpose(0, 1) @ second[:, 1:].permute(1, 2, 0)  # (L, B, B)
        terms["patch_loss"].append(_both_ways(scales[1] * by_patch))
        terms["intra_loss"].append(_both_ways(scales[2] * first[:, 1:] @ second[:, 1:].transpose(1, 2)))  # (B, L, L)
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, against the largest expected value where that is above 1; infinite for what is not finite."""
    value = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)).item()
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def compare_layouts(
    model: SolarChipForPreTraining | SolarChipModel, branches: Mapping[str, Weights], log_scales: torch.Tensor | None
) -> dict[str, float]:
    """Runs the converted model and the research layout on the same two random observations, in float64.

    Args:
        model: The converted model, in float32, as which it is left.
        branches: Tensors of the branch of each modality of the model, by their keys within the branch.
        log_scales: (3,) the checkpoint's temperatures as it stores them; None with an encoder alone.

    Returns:
        The largest difference of tokens, projections, reconstructions and contrastive terms over the modalities,
        against the largest expected value where that is above 1.
    """
    config, model = model.config, model.eval()
    whole = isinstance(model, SolarChipForPreTraining)
    encoder = model.solarchip if whole else model
    backbone = config.backbone_config
    heads = backbone.num_attention_heads if backbone.model_type == "solarchip_vit" else None
    # A CNN takes any size; a ViT keeps to that of its position table.
    size = config.image_size if heads else min(config.image_size, 4 * config.patch_size)
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    ours, theirs = {}, {}
    for tower, served in config.towers().items():  # one at a time in float64: eleven would take much memory
        parts = [encoder.towers[tower].double()] + ([model.decoders[tower].double()] if whole else [])
        weights = {key: tensor.double() for key, tensor in branches[served[0]].items()}
        for name in served:
            images = torch.randn(2, 1, size, size, generator=generator, dtype=torch.float64)
            ids = [config.modalities.index(name)] * 2
            expected = autoencode(weights, images, heads)
            encoded = encoder(images, ids)
            got = {
                "tokens": encoded.last_hidden_state,
                "projections": encoded.projections,
                "reconstruction": model.decode(encoded.latents, ids) if whole else None,
                "logvar": encoded.latents_logvar,
            }
            for term, value in expected.items():
                worst[term] = max(worst.get(term, 0.0), _difference(got[term], value))
            ours[name], theirs[name] = got["projections"], expected["projections"]
        for part in parts:
            part.float()
    if whole and len(theirs) > 1 and config.pairing == "anchor":
        scales = log_scales.double().clamp(max=MAX_LOGIT_SCALE).exp()
        others = [theirs[name] for name in config.modalities if name != "hmi"]
        expected = contrastive_terms(theirs["hmi"], others, scales)
        observed = torch.ones(2, len(ours), dtype=torch.bool)
        projections = torch.stack([ours[name] for name in config.modalities], dim=1)
        got = model.contrastive_terms(projections, observed, image_size=size)
        worst |= {term: _difference(got[term], value) for term, value in expected.items()}
    return worst


__all__ = [
    "TOLERANCE",
    "autoencode",
    "compare_layouts",
    "cnn_images",
    "cnn_latents",
    "contrastive_terms",
    "vit_images",
    "vit_tokens",
]
