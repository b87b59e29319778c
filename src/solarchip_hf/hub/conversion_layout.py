"""Key tables of the research code's checkpoints: which tensor goes where, and what their shapes tell of the model.

A checkpoint holds branches `model_dict.<name>.`, one autoencoder each, and the three temperatures of the contrastive
loss. Source: the public research code of SolarCHIP (arXiv 2511.22958), ViT of March to September 2026 and the
convolutional autoencoder and VAE of the same time.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]

# How a source tensor becomes its targets.
COPY = "copy"  # as it is
TRANSPOSE = "transpose"  # x @ W there, a linear layer's W^T x here
THIRDS = "thirds"  # query, key and value stacked in one tensor there, three tensors here
MATRIX = "matrix"  # a 1 x 1 convolution there, a linear layer here

TEMPERATURES = (
    "contrastive_loss_fn.cls_logit_scale",
    "contrastive_loss_fn.pat_logit_scale",
    "contrastive_loss_fn.int_logit_scale",
)

# Below, `{t}` is `solarchip.towers.<tower>` and `{d}` is `decoders.<tower>`. The first key is spelt so in the files.
PROJECTION_PAIRS = (("contrasive_porject", "{t}.projection.weight", TRANSPOSE),)

VIT_PAIRS = (
    ("encoder.class_embedding", "{t}.encoder.embeddings.class_embedding", COPY),
    ("encoder.positional_embedding", "{t}.encoder.embeddings.position_embedding.weight", COPY),
    ("encoder.conv1.weight", "{t}.encoder.embeddings.patch_embedding.weight", COPY),
    ("encoder.ln_pre.weight", "{t}.encoder.pre_layrnorm.weight", COPY),
    ("encoder.ln_pre.bias", "{t}.encoder.pre_layrnorm.bias", COPY),
    ("encoder.ln_post.weight", "{t}.encoder.post_layernorm.weight", COPY),
    ("encoder.ln_post.bias", "{t}.encoder.post_layernorm.bias", COPY),
    ("decoder.ln_pre.weight", "{d}.pre_layernorm.weight", COPY),
    ("decoder.ln_pre.bias", "{d}.pre_layernorm.bias", COPY),
    ("decoder.de_proj.weight", "{d}.output_projection.weight", COPY),
    ("decoder.de_proj.bias", "{d}.output_projection.bias", COPY),
)
# For `encoder.transformer.resblocks.<n>.` and `decoder.transformer.resblocks.<n>.`.
VIT_BLOCKS = (("encoder.transformer.resblocks", "{t}.encoder.encoder.layers"),)
VIT_BLOCKS += (("decoder.transformer.resblocks", "{d}.transformer.layers"),)
VIT_BLOCK_PAIRS = (
    ("attn.in_proj_weight", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), THIRDS),
    ("attn.in_proj_bias", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), THIRDS),
    ("attn.out_proj.weight", "self_attn.out_proj.weight", COPY),
    ("attn.out_proj.bias", "self_attn.out_proj.bias", COPY),
    ("ln_1.weight", "layer_norm1.weight", COPY),
    ("ln_1.bias", "layer_norm1.bias", COPY),
    ("mlp.c_fc.weight", "mlp.fc1.weight", COPY),
    ("mlp.c_fc.bias", "mlp.fc1.bias", COPY),
    ("mlp.c_proj.weight", "mlp.fc2.weight", COPY),
    ("mlp.c_proj.bias", "mlp.fc2.bias", COPY),
    ("ln_2.weight", "layer_norm2.weight", COPY),
    ("ln_2.bias", "layer_norm2.bias", COPY),
)

# Modules of the CNN, each with `.weight` and `.bias`.
CNN_MODULES = (
    ("cls_proj.2", "{t}.class_projection", COPY),
    ("encoder.conv_in", "{t}.encoder.conv_in", COPY),
    ("encoder.norm_out", "{t}.encoder.conv_norm_out", COPY),
    ("encoder.conv_out", "{t}.encoder.conv_out", COPY),
    ("decoder.conv_in", "{d}.decoder.conv_in", COPY),
    ("decoder.norm_out", "{d}.decoder.conv_norm_out", COPY),
    ("decoder.conv_out", "{d}.decoder.conv_out", COPY),
)
VAE_MODULES = (
    ("quant_conv", "{t}.quant_conv", COPY),
    ("post_quant_conv", "{d}.post_quant_conv", COPY),
)
CNN_MIDDLE = (
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
)
CNN_ATTENTION_MODULES = (
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm", COPY),
    ("mid.attn_1.q", "mid_block.attentions.0.to_q", MATRIX),
    ("mid.attn_1.k", "mid_block.attentions.0.to_k", MATRIX),
    ("mid.attn_1.v", "mid_block.attentions.0.to_v", MATRIX),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0", MATRIX),
)
# Inside a residual block; the last is there only where the number of channels changes.
CNN_BLOCK_MODULES = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)

# The encoder within a flare classifier of the research code (SolarPredictor), by the keys of a branch.
FLARE_ENCODER = (
    ("hmi_encoder.", "encoder."),
    ("hmi_quant_conv.", "quant_conv."),
    ("cnn_cls_proj.", "cls_proj."),
    ("contrastive_projector", "contrasive_porject"),
)
FLARE_HEAD = (
    "main_mapper.",
    "contrastive_adapter.",
    "contrastive_gate",
    "classifier.",
    "raw_label_to_group",
    "class_weights",
    "metric_class_ids",
    "train_confusion.",
    "val_confusion.",
    "test_confusion.",
)

# First keys of checkpoints that are no pretrained SolarCHIP, what they are, and why they are refused.
_DIFFUSION = (
    "Its UNet has unconditional attention blocks, the diffusers UNet used here cross-attention: the weights have no "
    "place. Its autoencoder is the frozen one of the pretraining checkpoint that it was built on: convert that."
)
FOREIGN = (
    ("control_model.", "a ControlNet of the research code (SolarControl)", _DIFFUSION),
    ("model.diffusion_model.", "a latent-diffusion prior of the research code (SolarLDM)", _DIFFUSION),
    (
        "hmi_encoder.",
        "a flare classifier of the research code (SolarPredictor)",
        "Its head (an adapter behind a gate, for one modality) is not that of SolarChipForImageClassification. Its "
        "tuned HMI encoder alone can be had as a SolarChipModel: pass --encoder_only.",
    ),
    (
        "models.",
        "a multi-model checkpoint from before SolarCHIP's ViT and CNN autoencoders",
        "Its towers (torchvision's ViT, other autoencoders) are not among those of this package.",
    ),
)


class ConversionError(ValueError):
    """The checkpoint cannot be converted; the message says what was expected, what was found, and what to do.

    Attributes:
        missing: Keys that the layout needs and the checkpoint lacks.
        unexpected: Keys that the checkpoint holds and the layout does not know.
    """

    def __init__(self, message: str, *, missing: Iterable[str] = (), unexpected: Iterable[str] = ()):
        super().__init__(message)
        self.missing, self.unexpected = list(missing), list(unexpected)


@dataclass(frozen=True)
class Entry:
    """Where one tensor of a branch goes.

    Attributes:
        source: Key within the branch.
        targets: Keys of the model, with `{t}` and `{d}` for the tower's encoder and decoder.
        rule: One of `COPY`, `TRANSPOSE`, `THIRDS`, `MATRIX`.
    """

    source: str
    targets: tuple[str, ...]
    rule: str = COPY

    def named(self, tower: str, *, base: str = "solarchip.") -> tuple[str, ...]:
        """The targets of a tower; `base` is empty for an encoder alone."""
        return tuple(key.format(t=f"{base}towers.{tower}", d=f"decoders.{tower}") for key in self.targets)

    @property
    def encodes(self) -> bool:
        """Whether the tensor is of the encoder."""
        return self.targets[0].startswith("{t}")

    def source_shape(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the source tensor, given that of a target."""
        if self.rule == TRANSPOSE:
            return target[::-1]
        if self.rule == THIRDS:
            return (3 * target[0], *target[1:])
        if self.rule == MATRIX and len(target) == 2:
            return (*target, 1, 1)
        return target

    def apply(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The target tensors, float32 copies of their own."""
        tensor = tensor.to(torch.float32)
        if self.rule == TRANSPOSE:
            parts = [tensor.T]
        elif self.rule == THIRDS:
            parts = tensor.chunk(3)
        else:
            parts = [tensor[:, :, 0, 0] if self.rule == MATRIX and tensor.dim() == 4 else tensor]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _entry(source: str, targets: str | tuple[str, ...], rule: str = COPY) -> Entry:
    return Entry(source, (targets,) if isinstance(targets, str) else targets, rule)


def _module(source: str, target: str, rule: str = COPY) -> list[Entry]:
    return [_entry(f"{source}.{part}", f"{target}.{part}", rule) for part in ("weight", "bias")]


def vit_entries(layers: int) -> list[Entry]:
    """All tensors of a ViT branch with so many layers in the encoder and in the decoder."""
    entries = [_entry(*pair) for pair in (*PROJECTION_PAIRS, *VIT_PAIRS)]
    for source, target in VIT_BLOCKS:
        for index in range(layers):
            for name, names, rule in VIT_BLOCK_PAIRS:
                names = (names,) if isinstance(names, str) else names
                targets = tuple(f"{target}.{index}.{each}" for each in names)
                entries.append(Entry(f"{source}.{index}.{name}", targets, rule))
    return entries


def _cnn_block(source: str, target: str, shortcut: bool) -> list[Entry]:
    modules = CNN_BLOCK_MODULES if shortcut else CNN_BLOCK_MODULES[:-1]
    return [entry for name, ours in modules for entry in _module(f"{source}.{name}", f"{target}.{ours}")]


def cnn_entries(widths: list[int], blocks: int, *, variational: bool) -> list[Entry]:
    """All tensors of a CNN branch.

    Args:
        widths: Channels of each resolution, finest first.
        blocks: Residual blocks a resolution in the encoder; the decoder has one more.
        variational: Whether it is a VAE.
    """
    entries = [_entry(*pair) for pair in PROJECTION_PAIRS]
    for module in (*CNN_MODULES, *(VAE_MODULES if variational else ())):
        entries += _module(*module)
    for source, target in (("encoder", "{t}.encoder"), ("decoder", "{d}.decoder")):
        for name, ours in CNN_MIDDLE:
            entries += _cnn_block(f"{source}.{name}", f"{target}.{ours}", shortcut=False)
        for name, ours, rule in CNN_ATTENTION_MODULES:
            entries += _module(f"{source}.{name}", f"{target}.{ours}", rule)
    last = len(widths) - 1
    for level, width in enumerate(widths):
        before = widths[max(level - 1, 0)]
        for block in range(blocks):
            source, target = f"encoder.down.{level}.block.{block}", f"{{t}}.encoder.down_blocks.{level}.resnets.{block}"
            entries += _cnn_block(source, target, shortcut=block == 0 and before != width)
        # `up` is numbered by resolution, finest first; the blocks of diffusers in the order in which they run.
        behind, ours = widths[min(level + 1, last)], f"{{d}}.decoder.up_blocks.{last - level}"
        for block in range(blocks + 1):
            shortcut = block == 0 and behind != width
            entries += _cnn_block(f"decoder.up.{level}.block.{block}", f"{ours}.resnets.{block}", shortcut)
        if level < last:
            entries += _module(
                f"encoder.down.{level}.downsample.conv", f"{{t}}.encoder.down_blocks.{level}.downsamplers.0.conv"
            )
        if level > 0:
            entries += _module(f"decoder.up.{level}.upsample.conv", f"{ours}.upsamplers.0.conv")
    return entries


def _shape(shapes: Shapes, key: str, dimensions: int, branch: str) -> tuple[int, ...]:
    if key not in shapes:
        name = f"model_dict.{branch}.{key}"
        raise ConversionError(f"expected the key {name!r}, which the sizes are read from, got none.", missing=[name])
    if len(shapes[key]) != dimensions:
        raise ConversionError(f"model_dict.{branch}.{key}: expected {dimensions} dimensions, got {shapes[key]}.")
    return shapes[key]


def _count(shapes: Shapes, *patterns: str) -> int:
    """One more than the highest number in keys that match a pattern with one group."""
    found = [int(match[1]) for pattern in patterns for key in shapes if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def infer_vit(shapes: Shapes, branch: str) -> tuple[dict[str, Any], list[Entry]]:
    """Backbone fields (all but the number of heads) and entries of a ViT branch, from the shapes of its tensors."""
    hidden, channels, patch, _ = _shape(shapes, "encoder.conv1.weight", 4, branch)
    if channels != 1:
        raise ConversionError(
            f"model_dict.{branch}.encoder.conv1.weight: expected one image channel, got {channels}: this is not a "
            "SolarCHIP tower, which sees one modality at a time."
        )
    tokens, _ = _shape(shapes, "encoder.positional_embedding", 2, branch)
    side = math.isqrt(max(tokens - 1, 0))
    if side < 1 or side**2 != tokens - 1:
        raise ConversionError(
            f"model_dict.{branch}.encoder.positional_embedding: expected one row for the class token and a square "
            f"number for the patches, got {tokens} rows."
        )
    blocks = [rf"{part}\.transformer\.resblocks\.(\d+)\." for part in ("encoder", "decoder")]
    layers = _count(shapes, *blocks)
    mlp = f"encoder.transformer.resblocks.{max(layers - 1, 0)}.mlp.c_fc.weight"
    fields = {
        "model_type": "solarchip_vit",
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": hidden,
        "intermediate_size": _shape(shapes, mlp, 2, branch)[0] if layers else 4 * hidden,
        "num_hidden_layers": layers,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "decoder_position_embedding": False,
        "decoder_layout": "raster",
    }
    return fields, vit_entries(layers)


def infer_cnn(shapes: Shapes, branch: str) -> tuple[dict[str, Any], list[Entry]]:
    """Backbone fields (all but the image size) and entries of a CNN branch, from the shapes of its tensors."""
    attention = sorted(key for key in shapes if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", key))
    linear = sorted(key for key in shapes if re.match(r"(encoder|decoder)\.mid\.attn_1\.(to_qkv|to_out)\.", key))
    if attention or linear:
        kind = "attention outside the middle block (attn_resolutions)" if attention else "linear attention"
        raise ConversionError(
            f"model_dict.{branch}: expected plain attention in the middle block only, got {kind}, as in "
            f"{(attention or linear)[0]!r}. The CNN tower of this package has no such blocks."
        )
    levels = _count(shapes, r"encoder\.down\.(\d+)\.", r"decoder\.up\.(\d+)\.")
    blocks = _count(shapes, r"encoder\.down\.\d+\.block\.(\d+)\.")
    widths = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4, branch)[0] for i in range(levels)]
    first, channels, _, _ = _shape(shapes, "encoder.conv_in.weight", 4, branch)
    if channels != 1:
        raise ConversionError(
            f"model_dict.{branch}.encoder.conv_in.weight: expected one image channel, got {channels}: this is not a "
            "SolarCHIP tower, which sees one modality at a time."
        )
    if not widths or widths[0] != first:
        raise ConversionError(
            f"model_dict.{branch}: expected as many channels behind encoder.conv_in as at the finest resolution "
            f"(ch_mult starting with 1), got {first} and {widths[:1]}. diffusers' encoder has no other form."
        )
    latents, _ = _shape(shapes, "contrasive_porject", 2, branch)
    variational = any(key.startswith(("quant_conv.", "post_quant_conv.")) for key in shapes)
    fields = {
        "model_type": "solarchip_cnn",
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "latent_channels": latents,
        # Groups are 32, halved while a group would have a single channel: 4 for 8 channels, 16 for 32, 32 for 64.
        "norm_num_groups": 32,
        "norm_min_channels": 2,
        "hidden_act": "silu",
        "double_z": variational,
        "mid_block_add_attention": True,
    }
    return fields, cnn_entries(widths, blocks, variational=variational)


def infer_backbone(shapes: Shapes, branch: str) -> tuple[dict[str, Any], list[Entry], int]:
    """What the shapes of a branch's tensors tell.

    Args:
        shapes: Shapes by key within the branch.
        branch: Its name, for messages.

    Returns:
        Fields of the backbone's configuration, the entries of all tensors that it must have, and the width of the
        contrastive space.

    Raises:
        ConversionError: The branch is of no known kind, or of one that this package has no counterpart for.
    """
    if any(key.startswith(("encoder.conv1.", "encoder.transformer.")) for key in shapes):
        fields, entries = infer_vit(shapes, branch)
    elif any(key.startswith(("encoder.conv_in.", "encoder.down.")) for key in shapes):
        fields, entries = infer_cnn(shapes, branch)
    else:
        raise ConversionError(
            f"model_dict.{branch}: expected a ViT (encoder.conv1, encoder.transformer, ...) or a CNN "
            f"(encoder.conv_in, encoder.down, ...), got keys such as {', '.join(sorted(shapes)[:3])}.",
            unexpected=[f"model_dict.{branch}.{key}" for key in shapes],
        )
    return fields, entries, _shape(shapes, "contrasive_porject", 2, branch)[1]


__all__ = [
    "FLARE_ENCODER",
    "FLARE_HEAD",
    "FOREIGN",
    "TEMPERATURES",
    "ConversionError",
    "Entry",
    "cnn_entries",
    "infer_backbone",
    "infer_cnn",
    "infer_vit",
    "vit_entries",
]
