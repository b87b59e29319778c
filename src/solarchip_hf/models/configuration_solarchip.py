"""Configurations of the two kinds of tower and of the model that holds them, with named sizes."""

import copy
import difflib
import math
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .calibration import check_calibration
from .forecast_window import read_window
from .modalities import MODALITY_NAMES, resolve_modality
from .named_sizes import NAMED_SIZES
from .settings import refuse_typos

# Ordered flare classes of the full-disk forecast: below C (quiet included), C, M, X.
FLARE_CLASSES = ("0AB", "C", "M", "X")

_COMMON_FIELDS = frozenset(field.name for field in fields(PreTrainedConfig))


def _own_fields(config_class: type) -> list[str]:
    return [field.name for field in fields(config_class) if field.name not in _COMMON_FIELDS]


def _require(config: PreTrainedConfig, condition: bool, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, got {getattr(config, name)!r}.")


def _require_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        _require(config, getattr(config, name) > 0, name, "a positive number")


@strict
class SolarChipViTConfig(PreTrainedConfig):
    """Vision-transformer tower: a CLIP vision model on one channel, and a transformer that decodes its patch tokens.

    The defaults are the published configuration (arXiv 2511.22958): 1024 px, patch 64, 768 x 12 layers x 12 heads.

    Attributes:
        image_size: Side of the square image in pixels that the position table is made for; other sizes divisible by
            the patch are served by interpolating the table.
        patch_size: Side of a patch in pixels.
        hidden_size: Width of the tokens.
        intermediate_size: Width of the MLP inside a layer.
        num_hidden_layers: Layers of the encoder.
        num_attention_heads: Attention heads of the encoder.
        num_channels: Image channels; one, since every modality is an image of its own.
        hidden_act: Activation of the MLP.
        layer_norm_eps: Epsilon of every layer norm.
        attention_dropout: Dropout of the attention weights in training.
        initializer_range: Deviation of the initial patch, position and modality embeddings.
        initializer_factor: Factor on all initial deviations, as in CLIP.
        decoder_hidden_size: Width of the decoder; None: that of the encoder.
        decoder_intermediate_size: Width of the decoder's MLP; None: four times its width.
        decoder_num_hidden_layers: Layers of the decoder; None: as many as the encoder (published).
        decoder_num_attention_heads: Heads of the decoder; None: as many as the encoder.
        decoder_position_embedding: Whether fixed two-dimensional sine-cosine positions are added to the decoder's
            input. The published decoder has none, and reads positions from the tokens themselves.
        decoder_layout: `"patch"` puts each decoded token where its patch lies. `"raster"` reshapes the sequence of
            decoded tokens into image rows: wrong geometry, on which the published weights nevertheless depend.
    """

    model_type = "solarchip_vit"
    base_config_key = "backbone_config"

    image_size: int = 1024
    patch_size: int = 64
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 1
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    initializer_factor: float | int = 1.0
    decoder_hidden_size: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_position_embedding: bool = False
    decoder_layout: Literal["patch", "raster"] = "patch"

    def __post_init__(self, **kwargs):
        refuse_typos(type(self).__name__, _own_fields(type(self)), kwargs)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that the numbers fit together (part of the `@strict` validation)."""
        _require_positive(self, "image_size", "patch_size", "hidden_size", "intermediate_size", "num_attention_heads")
        _require_positive(self, "layer_norm_eps", "initializer_range", "initializer_factor")
        _require(self, self.hidden_act in ACT2FN, "hidden_act", f"one of {', '.join(ACT2FN)}")
        _require(self, self.num_hidden_layers >= 0, "num_hidden_layers", "zero or more")
        _require(self, self.num_channels == 1, "num_channels", "1 (every modality is an image of its own)")
        _require(self, 0 <= self.attention_dropout < 1, "attention_dropout", "a number in [0, 1)")
        _require(self, self.image_size % self.patch_size == 0, "image_size", f"a multiple of {self.patch_size=}")
        _require(
            self,
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of {self.num_attention_heads=}",
        )
        for name in ("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads"):
            _require(self, getattr(self, name) is None or getattr(self, name) > 0, name, "a positive number or None")
        depth = self.decoder_num_hidden_layers
        _require(self, depth is None or depth >= 0, "decoder_num_hidden_layers", "zero or more, or None")
        width = self.decoder_hidden_size or self.hidden_size
        heads = self.decoder_num_attention_heads or self.num_attention_heads
        _require(self, width % heads == 0, "decoder_num_attention_heads", f"a divisor of the decoder's width {width}")
        if self.decoder_position_embedding:
            _require(self, width % 4 == 0, "decoder_hidden_size", "a multiple of 4, for sine-cosine positions")

    @property
    def latent_channels(self) -> int:
        """Channels of `latents`: the tokens' width."""
        return self.hidden_size

    def decoder_config(self) -> "SolarChipViTConfig":
        """The configuration of the decoder's transformer, written in the encoder's field names."""
        config = copy.deepcopy(self)
        config.hidden_size = self.decoder_hidden_size or self.hidden_size
        if self.decoder_intermediate_size is not None:
            config.intermediate_size = self.decoder_intermediate_size
        elif self.decoder_hidden_size is not None:
            config.intermediate_size = 4 * config.hidden_size
        if self.decoder_num_hidden_layers is not None:
            config.num_hidden_layers = self.decoder_num_hidden_layers
        config.num_attention_heads = self.decoder_num_attention_heads or self.num_attention_heads
        return config


@strict
class SolarChipCNNConfig(PreTrainedConfig):
    """Convolutional tower: the encoder and decoder of latent diffusion, as an autoencoder or a VAE.

    The defaults are the published autoencoder (`ch=32, ch_mult=[1,1,1,2,2,2], num_res_blocks=2, z_channels=32` in the
    research code's words): down by 32, a 32 x 32 x 32 latent of a 1024 px image.

    Attributes:
        image_size: Side of the square image in pixels; any other multiple of the down-sampling works too.
        num_channels: Image channels; one, since every modality is an image of its own.
        block_out_channels: Channels of each resolution; each but the last is followed by a halving.
        layers_per_block: Residual blocks a resolution in the encoder (one more in the decoder).
        latent_channels: Channels of the latent, which is also the width of the tokens.
        norm_num_groups: Groups of the group norms, at the most.
        norm_min_channels: Groups are halved until each has so many channels; 2 in the research code, 1: never halved.
        hidden_act: Activation.
        double_z: False: an autoencoder. True: a VAE, whose encoder gives the moments of a diagonal Gaussian.
        mid_block_add_attention: Whether the middle blocks attend over the latent's pixels.
    """

    model_type = "solarchip_cnn"
    base_config_key = "backbone_config"

    image_size: int = 1024
    num_channels: int = 1
    block_out_channels: list[int] | tuple[int, ...] = (32, 32, 32, 64, 64, 64)
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    norm_min_channels: int = 1
    hidden_act: str = "silu"
    double_z: bool = False
    mid_block_add_attention: bool = True

    def __post_init__(self, **kwargs):
        refuse_typos(type(self).__name__, _own_fields(type(self)), kwargs)
        self.block_out_channels = list(self.block_out_channels)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks that the numbers fit together (part of the `@strict` validation)."""
        _require_positive(self, "image_size", "layers_per_block", "latent_channels", "norm_num_groups")
        _require_positive(self, "norm_min_channels")
        _require(self, self.num_channels == 1, "num_channels", "1 (every modality is an image of its own)")
        _require(
            self,
            len(self.block_out_channels) > 0
            and all(width > 0 and width % self.norm_groups(width) == 0 for width in self.block_out_channels),
            "block_out_channels",
            f"at least one number, each a positive multiple of its groups ({self.norm_num_groups=})",
        )
        _require(self, self.image_size % self.patch_size == 0, "image_size", f"a multiple of {self.patch_size}")

    def norm_groups(self, channels: int) -> int:
        """Groups of a group norm over so many channels."""
        groups = self.norm_num_groups
        while self.norm_min_channels > 1 and groups > 1 and groups * self.norm_min_channels > channels:
            groups //= 2
        return groups

    @property
    def patch_size(self) -> int:
        """Image pixels along the side of one latent pixel: the total down-sampling."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens, which are the latent's pixels."""
        return self.latent_channels


# Own table: `backbone_config` is a key that transformers would look up among its own model types.
_BACKBONES = {config.model_type: config for config in (SolarChipViTConfig, SolarChipCNNConfig)}


@strict
class SolarChipConfig(PreTrainedConfig):
    """The whole model: its towers, the modalities they serve, and the terms of the objective.

    Attributes:
        backbone_config: Configuration of every tower: a `SolarChipViTConfig`, a `SolarChipCNNConfig`, or a dict with
            the `model_type` of one of them (`"solarchip_vit"` if it says none).
        modalities: Ordered names from `MODALITY_NAMES`, which `modality_ids` index; aliases such as `"171"` are
            resolved. None: all eleven.
        weight_sharing: `"instrument"`: one tower for HMI and one for AIA; `"modality"`: one for each (published);
            `"shared"`: one for all.
        use_modality_embedding: Whether a tower that may serve several modalities adds a learned vector a modality to
            its tokens (and its decoder to the latents). False for converted weights.
        projection_dim: Width of the contrastive space.
        projection_centering: What is centred and scaled over the batch before the L2 norm: `"none"` (published),
            the `"class"` token, or all `"tokens"`, each position by itself.
        centering_momentum: Weight of the newest batch in the running statistics that inference centres by.
        anchor_modality: The modality that all others are compared with when `pairing="anchor"`.
        pairing: `"anchor"` (published) or `"all"` pairs of modalities.
        min_disk_fraction: Patches with a smaller share of solar disk stay out of the patch and intra terms; 0 keeps
            all of them (published). The disk is that of the canonical `rsun` geometry.
        mask_reconstruction: Whether the reconstruction term leaves out what the canonical geometry blanks: off the
            disk for HMI, beyond the inscribed circle for AIA. False for images on another geometry.
        gather_negatives: Whether class and patch terms use the observations of all processes.
        logit_scale_init_value: Initial logarithm of the three inverse temperatures, ln(1/0.07) as published.
        reconstruction_loss: `"l1"` or `"l2"`.
        cls_loss_weight: Weight of the term between class tokens.
        patch_loss_weight: Weight of the term between equal patches of different observations.
        intra_loss_weight: Weight of the term between different patches of one observation.
        reconstruction_loss_weight: Weight of the reconstruction.
        kl_loss_weight: Weight of the VAE's Kullback-Leibler term.
        classifier_hidden_size: Width of the classification head.
        classifier_dropout: Dropout before the head's last layer, in training.
        class_weights: Weight of every class in the classification loss; None: equal.
        focal_gamma: Exponent of the focal loss; 0 is plain cross-entropy, a proper score.
        ordinal: Whether the head draws ordered thresholds on one severity scale instead of free classes.
        classifier_head: `"mlp"`, or `"linear"`: logits that are linear in the tokens' mean and standard deviation (a
            linear probe).
        calibration: How logits become calibrated probabilities, and thresholds of warning; see `calibration.py`.
        forecast_window: Which flares the model forecasts; see `forecast_window.py`. None: those that start within 24
            hours.
    """

    model_type = "solarchip"
    sub_configs_defaults = {"backbone_config": SolarChipViTConfig}  # noqa: RUF012 (transformers' own protocol)
    base_model_fsdp_plan = (
        None  # the model names its towers; transformers' default names the layers of a language model
    )
    keys_to_ignore_at_inference = [  # noqa: RUF012 (a list: the Trainer adds to it)
        "reconstruction",
        "contrastive_embeds",
        "projections",
        "latents",
        "latents_mean",
        "latents_logvar",
        "modality_weights",
        "token_weights",
        "hidden_states",
        "attentions",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    modalities: list[str] | tuple[str, ...] | None = None
    weight_sharing: Literal["instrument", "modality", "shared"] = "instrument"
    use_modality_embedding: bool = True
    projection_dim: int = 768
    projection_centering: Literal["none", "class", "tokens"] = "tokens"
    centering_momentum: float | int = 0.1
    anchor_modality: str = "hmi"
    pairing: Literal["anchor", "all"] = "anchor"
    min_disk_fraction: float | int = 0.25
    mask_reconstruction: bool = True
    gather_negatives: bool = True
    logit_scale_init_value: float | int = math.log(1 / 0.07)
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    cls_loss_weight: float | int = 0.05
    patch_loss_weight: float | int = 0.001
    intra_loss_weight: float | int = 0.0001
    reconstruction_loss_weight: float | int = 1.0
    kl_loss_weight: float | int = 0.1
    classifier_hidden_size: int = 256
    classifier_dropout: float | int = 0.1
    class_weights: list[float] | list[int] | None = None
    focal_gamma: float | int = 0.0
    ordinal: bool = False
    classifier_head: Literal["mlp", "linear"] = "mlp"
    calibration: dict | None = None
    forecast_window: dict | None = None

    def __post_init__(self, **kwargs):
        refuse_typos(type(self).__name__, _own_fields(type(self)), kwargs)
        self.backbone_config = self._build_backbone(self.backbone_config)
        misplaced = sorted(set(kwargs) & set(_own_fields(type(self.backbone_config))))
        if misplaced:
            raise ValueError(
                f"SolarChipConfig: {', '.join(misplaced)}: expected inside backbone_config, got at the top. "
                f"Pass backbone_config={{...}}, or SolarChipConfig.from_name(name, {misplaced[0]}=...)."
            )
        names = MODALITY_NAMES if self.modalities is None else self.modalities
        self.modalities = [self._resolve(name) for name in names]
        self.anchor_modality = self._resolve(self.anchor_modality)
        if self.id2label is None and kwargs.get("num_labels") in (None, len(FLARE_CLASSES)):
            self.id2label = dict(enumerate(FLARE_CLASSES))
            self.label2id = {label: index for index, label in self.id2label.items()}
        super().__post_init__(**kwargs)

    @staticmethod
    def _resolve(name: str) -> str:
        # A name that no table knows is kept here, so that a file of a later version can be read; the model refuses it.
        try:
            return resolve_modality(name)
        except ValueError:
            return name

    @staticmethod
    def _build_backbone(backbone: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        if isinstance(backbone, PreTrainedConfig):
            model_type = backbone.model_type
        else:
            backbone = dict(backbone or {})
            model_type = backbone.pop("model_type", SolarChipViTConfig.model_type)
        if model_type not in _BACKBONES:
            known = ", ".join(_BACKBONES)
            raise ValueError(f"SolarChipConfig.backbone_config: expected a model_type of {known}, got {model_type!r}.")
        return backbone if isinstance(backbone, PreTrainedConfig) else _BACKBONES[model_type](**backbone)

    def validate_architecture(self):
        """Checks that the fields fit together (part of the `@strict` validation)."""
        _require(self, len(self.modalities) > 0, "modalities", "at least one modality")
        _require(self, len(set(self.modalities)) == len(self.modalities), "modalities", "every modality once")
        _require_positive(self, "projection_dim", "classifier_hidden_size")
        _require(self, 0 < self.centering_momentum <= 1, "centering_momentum", "a number in (0, 1]")
        _require(self, 0 <= self.min_disk_fraction <= 1, "min_disk_fraction", "a share in [0, 1]")
        _require(self, 0 <= self.classifier_dropout < 1, "classifier_dropout", "a number in [0, 1)")
        _require(self, math.isfinite(self.logit_scale_init_value), "logit_scale_init_value", "a finite number")
        _require(self, self.focal_gamma >= 0, "focal_gamma", "zero or more")
        for term in ("cls", "patch", "intra", "reconstruction", "kl"):
            weight = getattr(self, f"{term}_loss_weight")
            _require(self, weight >= 0 and math.isfinite(weight), f"{term}_loss_weight", "zero or more")
        if self.class_weights is not None:
            _require(
                self,
                len(self.class_weights) == self.num_labels and min(self.class_weights) >= 0 < max(self.class_weights),
                "class_weights",
                f"{self.num_labels} weights (one a label), none negative and not all zero",
            )
        if self.calibration is not None:
            check_calibration(self.calibration, self.num_labels)
        read_window(self.forecast_window)

    @property
    def image_size(self) -> int:
        """Side of the square image in pixels that the towers are made for."""
        return self.backbone_config.image_size

    @property
    def patch_size(self) -> int:
        """Image pixels along the side of one patch token."""
        return self.backbone_config.patch_size

    @property
    def hidden_size(self) -> int:
        """Width of the tokens."""
        return self.backbone_config.hidden_size

    def towers(self) -> dict[str, list[str]]:
        """Names of the towers, each with the modalities that it serves, both in the order of `modalities`."""
        towers: dict[str, list[str]] = {}
        for name in self.modalities:
            if self.weight_sharing == "shared":
                tower = "shared"
            elif self.weight_sharing == "instrument":
                tower = "hmi" if name == "hmi" else "aia"
            else:
                tower = name
            towers.setdefault(tower, []).append(name)
        return towers

    def embeds_modality(self, tower: str) -> bool:
        """Whether a tower has modality vectors: that follows from what it may serve, not from the present subset."""
        return self.use_modality_embedding and tower in ("aia", "shared")

    @classmethod
    def from_name(cls, name: str, **overrides) -> "SolarChipConfig":
        """A named size, with fields replaced at will.

        Args:
            name: `"vit-tiny"` (128 px, patch 16: a laptop), `"vit-small"` (512 px), `"vit-base"` (published, 1024 px),
                `"vit-large"` (1024 px, patch 32) or `"cnn-base"` (published autoencoder).
            **overrides: Fields of this class or of the backbone, as `modalities=["hmi", "171"]`, `image_size=256`.

        Returns:
            A new configuration.

        Raises:
            ValueError: The name is unknown, or an override is a field of neither class.
        """
        if name not in NAMED_SIZES:
            raise ValueError(f"SolarChipConfig.from_name: expected one of {', '.join(NAMED_SIZES)}, got {name!r}.")
        values = copy.deepcopy(NAMED_SIZES[name])
        backbone_fields = _own_fields(_BACKBONES[values["backbone_config"]["model_type"]])
        known = {field.name for field in fields(cls)} | {"num_labels", "attn_implementation"}
        for key, value in overrides.items():
            if key == "backbone_config" and isinstance(value, dict):
                values["backbone_config"].update(value)
            elif key in backbone_fields:
                values["backbone_config"][key] = value
            elif key in known:
                values[key] = value
            else:
                close = difflib.get_close_matches(key, [*backbone_fields, *known], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"SolarChipConfig.from_name: expected a known field, got {key!r}.{hint}")
        return cls(**values)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to a file: labels always, since transformers leaves out two, its default."""
        whole = self.to_dict()
        return super().to_diff_dict() | {name: whole[name] for name in ("id2label", "label2id")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds a configuration from a saved one; `modalities=` selects some of those it was saved with.

        Args:
            config_dict: The content of a `config.json`.
            **kwargs: Fields to override, as transformers does.

        Raises:
            ValueError: `modalities` is no list, or names one that the saved configuration does not have.
        """
        wanted = kwargs.pop("modalities", None)
        if wanted is not None:
            if isinstance(wanted, str):  # a sequence too, of letters
                raise ValueError(f"modalities: expected a list of names, got the text {wanted!r}.")
            saved = [cls._resolve(name) for name in config_dict.get("modalities") or MODALITY_NAMES]
            wanted = [cls._resolve(name) for name in wanted]
            absent = [name for name in wanted if name not in saved]
            if absent:
                raise ValueError(
                    f"modalities: expected some of {', '.join(saved)} (what the checkpoint holds), got "
                    f"{', '.join(absent)}. To add a modality to trained weights, build the configuration yourself and "
                    "pass it as config=."
                )
            config_dict = {**config_dict, "modalities": wanted}
        return super().from_dict(config_dict, **kwargs)


__all__ = ["FLARE_CLASSES", "SolarChipCNNConfig", "SolarChipConfig", "SolarChipViTConfig"]
