"""The research code's checkpoint layout for tests: key tables, random weights, and its networks as plain modules.

Written apart from the package's conversion: the modules bear the names of the layout, so that a strict load checks the
tables, and run on torch's own attention and group norm.
"""

import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ["hmi", "0094", "0131", "0171", "0193", "0211", "0304", "0335", "1600", "1700", "4500"]


def vit_table(size: int, patch: int, width: int, layers: int, projection: int) -> dict[str, tuple[int, ...]]:
    """Shapes by key of one ViT branch."""
    table = {
        "contrasive_porject": (width, projection),
        "encoder.class_embedding": (width,),
        "encoder.positional_embedding": ((size // patch) ** 2 + 1, width),
        "encoder.conv1.weight": (width, 1, patch, patch),
    }
    for norm in ("encoder.ln_pre", "encoder.ln_post", "decoder.ln_pre"):
        table |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for part in ("encoder", "decoder"):
        for index in range(layers):
            block = f"{part}.transformer.resblocks.{index}"
            table |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.ln_1.weight": (width,),
                f"{block}.ln_1.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
                f"{block}.ln_2.weight": (width,),
                f"{block}.ln_2.bias": (width,),
            }
    return table | {"decoder.de_proj.weight": (patch**2, width), "decoder.de_proj.bias": (patch**2,)}


def _both(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _residual_table(name: str, before: int, width: int) -> dict[str, tuple[int, ...]]:
    table = {**_both(f"{name}.norm1", before), **_both(f"{name}.conv1", width, before, 3, 3)}
    table |= {**_both(f"{name}.norm2", width), **_both(f"{name}.conv2", width, width, 3, 3)}
    return table if before == width else table | _both(f"{name}.nin_shortcut", width, before, 1, 1)


def cnn_table(
    ch: int, ch_mult: list[int], blocks: int, latents: int, projection: int, variational: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes by key of one CNN branch."""
    widths = [ch * factor for factor in ch_mult]
    deep, last = widths[-1], len(widths) - 1
    table = {"contrasive_porject": (latents, projection), **_both("encoder.conv_in", ch, 1, 3, 3)}
    before = ch
    for level, width in enumerate(widths):
        for block in range(blocks):
            table |= _residual_table(f"encoder.down.{level}.block.{block}", before, width)
            before = width
        if level < last:
            table |= _both(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    for part in ("encoder", "decoder"):
        table |= _residual_table(f"{part}.mid.block_1", deep, deep)
        table |= _both(f"{part}.mid.attn_1.norm", deep)
        for name in ("q", "k", "v", "proj_out"):
            table |= _both(f"{part}.mid.attn_1.{name}", deep, deep, 1, 1)
        table |= _residual_table(f"{part}.mid.block_2", deep, deep)
    moments = 2 * latents if variational else latents
    table |= {**_both("encoder.norm_out", deep), **_both("encoder.conv_out", moments, deep, 3, 3)}
    table |= _both("decoder.conv_in", deep, latents, 3, 3)
    before = deep
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            table |= _residual_table(f"decoder.up.{level}.block.{block}", before, widths[level])
            before = widths[level]
        if level > 0:
            table |= _both(f"decoder.up.{level}.upsample.conv", before, before, 3, 3)
    table |= {**_both("decoder.norm_out", before), **_both("decoder.conv_out", 1, before, 3, 3)}
    if variational:
        table |= _both("quant_conv", moments, moments, 1, 1) | _both("post_quant_conv", latents, latents, 1, 1)
    return table | _both("cls_proj.2", latents, latents)


def random_branch(table: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights of a size that keeps signals of order one, every bias and norm away from its trivial value."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in table.items():
        values = torch.randn(shape, generator=generator)
        norm = any(name in key for name in ("ln_", "norm")) and key.endswith("weight")
        fan_in = shape[0] if key == "contrasive_porject" else math.prod(shape[1:])
        weights[key] = 1 + 0.2 * values if norm else values / math.sqrt(fan_in) if len(shape) > 1 else 0.2 * values
    return weights


def random_state(
    table: dict[str, tuple[int, ...]], branches: list[str], scales: tuple[float, float, float] = (2.0, 2.5, 2.75)
) -> dict[str, torch.Tensor]:
    """The `state_dict` of a Lightning checkpoint with these branches."""
    state = {}
    for seed, branch in enumerate(branches):
        state |= {f"model_dict.{branch}.{key}": value for key, value in random_branch(table, seed).items()}
    for name, scale in zip(("cls", "pat", "int"), scales, strict=True):
        state[f"contrastive_loss_fn.{name}_logit_scale"] = torch.tensor(scale)
    return state


def flare_state(table: dict[str, tuple[int, ...]], width: int = 12) -> dict[str, torch.Tensor]:
    """The `state_dict` of a flare classifier: a tuned HMI encoder under names of its own, and the head."""
    renamed = {"encoder.": "hmi_encoder.", "quant_conv.": "hmi_quant_conv.", "cls_proj.": "cnn_cls_proj."}
    renamed |= {"contrasive_porject": "contrastive_projector"}
    state = {}
    for key, value in random_branch(table, seed=5).items():
        for ours, theirs in renamed.items():
            if key.startswith(ours):
                state[theirs + key.removeprefix(ours)] = value
    head = {"main_mapper.0.weight": (width,), "contrastive_adapter.0.weight": (width,), "contrastive_gate": ()}
    head |= {"classifier.1.weight": (width, width), "raw_label_to_group": (6,), "metric_class_ids": (4,)}
    return state | {key: torch.zeros(shape) for key, shape in head.items()}


def save_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A file as Lightning writes one, with plain training state beside the weights."""
    content = {"epoch": 3, "global_step": 12, "state_dict": OrderedDict(state), "optimizer_states": [{"state": {}}]}
    torch.save(content, path)
    return path


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (L, n, width)
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        inner = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](inner * (1.702 * inner).sigmoid())


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, L, width)
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x)
        return x.transpose(0, 1)


class ResearchViT(nn.Module):
    """The ViT autoencoder of the layout."""

    def __init__(self, size: int, patch: int, width: int, layers: int, projection: int, heads: int):
        super().__init__()
        self.contrasive_porject = nn.Parameter(torch.empty(width, projection))
        encoder = self.encoder = nn.Module()
        encoder.class_embedding = nn.Parameter(torch.empty(width))
        encoder.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        encoder.conv1 = nn.Conv2d(1, width, patch, patch, bias=False)
        encoder.ln_pre, encoder.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        encoder.transformer = _Transformer(width, layers, heads)
        decoder = self.decoder = nn.Module()
        decoder.ln_pre = nn.LayerNorm(width)
        decoder.transformer = _Transformer(width, layers, heads)
        decoder.de_proj = nn.Linear(width, patch**2)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoder, decoder = self.encoder, self.decoder
        patches = encoder.conv1(images).flatten(2).permute(0, 2, 1)
        classes = encoder.class_embedding.repeat(len(images), 1, 1)
        tokens = torch.cat([classes, patches], 1) + encoder.positional_embedding
        tokens = encoder.ln_post(encoder.transformer(encoder.ln_pre(tokens)))
        pixels = decoder.de_proj(decoder.transformer(decoder.ln_pre(tokens[:, 1:])))
        return {
            "tokens": tokens,
            "projections": tokens @ self.contrasive_porject,
            "reconstruction": pixels.reshape(images.shape),  # raster rows, whatever the patches
        }


def _norm(channels: int) -> nn.GroupNorm:
    groups = {4: 2, 8: 4, 16: 8, 32: 16}.get(channels, 32)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, width, 3, 1, 1)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, 1, 1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + inner


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        query, key, value = (conv(normed).flatten(2).mT for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attended.mT.reshape(x.shape))


def _middle(width: int) -> nn.ModuleDict:
    parts = {"block_1": _Residual(width, width), "attn_1": _Attention(width), "block_2": _Residual(width, width)}
    return nn.ModuleDict(parts)


class ResearchCNN(nn.Module):
    """The convolutional autoencoder or VAE of the layout."""

    def __init__(
        self, ch: int, ch_mult: list[int], blocks: int, latents: int, projection: int, variational: bool = False
    ):
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        moments = 2 * latents if variational else latents
        self.contrasive_porject = nn.Parameter(torch.empty(latents, projection))
        self.cls_proj = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(latents, latents))
        if variational:
            self.quant_conv, self.post_quant_conv = nn.Conv2d(moments, moments, 1), nn.Conv2d(latents, latents, 1)
        encoder, decoder = self.encoder, self.decoder = nn.Module(), nn.Module()
        encoder.conv_in, encoder.down = nn.Conv2d(1, ch, 3, 1, 1), nn.ModuleList()
        before = ch
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(blocks):
                stage.block.append(_Residual(before, width))
                before = width
            if level < len(widths) - 1:
                stage.downsample = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 2)})
            encoder.down.append(stage)
        encoder.mid, decoder.mid = _middle(before), _middle(before)
        encoder.norm_out, encoder.conv_out = _norm(before), nn.Conv2d(before, moments, 3, 1, 1)
        decoder.conv_in, stages = nn.Conv2d(latents, before, 3, 1, 1), []
        for level in reversed(range(len(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.block.append(_Residual(before, widths[level]))
                before = widths[level]
            if level > 0:
                stage.upsample = nn.ModuleDict({"conv": nn.Conv2d(before, before, 3, 1, 1)})
            stages.insert(0, stage)
        decoder.up = nn.ModuleList(stages)
        decoder.norm_out, decoder.conv_out = _norm(before), nn.Conv2d(before, 1, 3, 1, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        encoder, decoder = self.encoder, self.decoder
        x = encoder.conv_in(images)
        for stage in encoder.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        for part in encoder.mid.values():
            x = part(x)
        latents = encoder.conv_out(F.silu(encoder.norm_out(x)))
        extra = {}
        if hasattr(self, "quant_conv"):
            latents, logvar = self.quant_conv(latents).chunk(2, 1)
            extra["logvar"] = logvar.clamp(-30, 20)
        x = decoder.conv_in(self.post_quant_conv(latents) if hasattr(self, "post_quant_conv") else latents)
        for part in decoder.mid.values():
            x = part(x)
        for stage in reversed(decoder.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample["conv"](x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        tokens = torch.cat([self.cls_proj(latents)[:, None], latents.flatten(2).mT], 1)
        return {
            "tokens": tokens,
            "projections": tokens @ self.contrasive_porject,
            "reconstruction": decoder.conv_out(F.silu(decoder.norm_out(x))),
            **extra,
        }


def load_branch(network: nn.Module, state: dict[str, torch.Tensor], branch: str) -> nn.Module:
    """The network with a branch's weights, every key accounted for."""
    prefix = f"model_dict.{branch}."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    network.load_state_dict(weights, strict=True)
    return network.eval()


def research_terms(projections: list[torch.Tensor], scales: tuple[float, float, float]) -> torch.Tensor:
    """The class, patch and intra terms, HMI first among the projections, by loops over patches and samples."""
    cls_scale, patch_scale, intra_scale = (math.exp(scale) for scale in scales)
    terms = torch.zeros(3, dtype=projections[0].dtype)
    hmi = F.normalize(projections[0], dim=-1)
    for other in projections[1:]:
        aia = F.normalize(other, dim=-1)
        count, length = hmi.shape[0], hmi.shape[1] - 1
        terms[0] += _symmetric(cls_scale * hmi[:, 0] @ aia[:, 0].T)
        terms[1] += sum(_symmetric(patch_scale * hmi[:, i] @ aia[:, i].T) for i in range(1, length + 1)) / length
        terms[2] += sum(_symmetric(intra_scale * hmi[b, 1:] @ aia[b, 1:].T) for b in range(count)) / count
    return terms / (len(projections) - 1)


def _symmetric(logits: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
