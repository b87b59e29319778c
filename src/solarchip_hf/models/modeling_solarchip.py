"""SolarCHIP: towers for the modalities of SDO behind one interface, and their contrastive pretraining."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_solarchip import SolarChipConfig
from .geometry import SUPPORT_RADIUS, disk_fraction, disk_mask
from .losses import (
    center_embeds,
    centering_statistics,
    contrastive_losses,
    kl_loss,
    make_pairs,
    reconstruction_loss,
)
from .modalities import MODALITIES, MODALITY_NAMES
from .modeling_solarchip_cnn import SolarChipCNNDecoder, SolarChipCNNModel
from .modeling_solarchip_layers import SolarChipCentering, SolarChipInitialization, run_towers
from .modeling_solarchip_outputs import SolarChipForPreTrainingOutput, SolarChipModelOutput
from .modeling_solarchip_vit import SolarChipViTDecoder, SolarChipViTModel


def _build_encoder(config: SolarChipConfig, tower: str, served: list[str]) -> PreTrainedModel:
    backbone = config.backbone_config
    # By model_type: a copy of this code that the Hub brought has classes of its own.
    tower_class = SolarChipCNNModel if backbone.model_type == "solarchip_cnn" else SolarChipViTModel
    vectors = served if config.embeds_modality(tower) else None
    return tower_class._from_config(backbone, modalities=vectors, projection_dim=config.projection_dim)


def _build_decoder(config: SolarChipConfig, tower: str, served: list[str]) -> PreTrainedModel:
    backbone = config.backbone_config
    vectors = served if config.embeds_modality(tower) else None
    if backbone.model_type == "solarchip_cnn":
        return SolarChipCNNDecoder._from_config(backbone, modalities=vectors)
    return SolarChipViTDecoder._from_config(
        backbone.decoder_config(), latent_channels=backbone.latent_channels, modalities=vectors
    )


class SolarChipPreTrainedModel(SolarChipInitialization, PreTrainedModel):
    """Initialisation, loading of a subset of modalities, and the checks that all SolarCHIP models share.

    Raises:
        ValueError: `config.modalities` names one that the table of modalities does not have.
    """

    config: SolarChipConfig
    base_model_prefix = "solarchip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means; the Trainer shall divide by its accumulation steps
    _supports_sdpa = True
    _supports_attention_backend = True
    # A ModuleDict hides from transformers what the towers say of themselves.
    _no_split_modules = [  # noqa: RUF012 (transformers' own protocol)
        *SolarChipViTModel._no_split_modules,
        *SolarChipCNNModel._no_split_modules,
    ]
    _keep_in_fp32_modules_strict = ["centering"]  # noqa: RUF012

    def __init__(self, config: SolarChipConfig):
        unknown = [name for name in config.modalities if name not in MODALITIES]
        if unknown:
            raise ValueError(
                f"modalities: expected some of {', '.join(MODALITY_NAMES)}, got {', '.join(map(repr, unknown))}."
            )
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = self._known_absent_keys(config)

    @staticmethod
    def _known_absent_keys(config: SolarChipConfig) -> list[str]:
        """Patterns of the keys that a checkpoint of more modalities holds and this model does not want."""
        absent = [name for name in MODALITY_NAMES if name not in config.modalities]
        names = "|".join(map(re.escape, absent)) or "(?!)"
        # Of the same sharing only: weights of another sharing are foreign, and are reported as such.
        possible = {"shared": {"shared"}, "instrument": {"hmi", "aia"}, "modality": set(MODALITY_NAMES)}
        towers = "|".join(sorted(possible[config.weight_sharing] - set(config.towers()))) or "(?!)"
        return [
            rf"(^|\.)(towers|decoders)\.({towers})\.",
            rf"(^|\.)modality_embedding\.({names})$",
            rf"(^|\.)centering\.({names})\.",
        ]

    def init_parallel_plans(self) -> None:
        """Makes every tower a unit of FSDP2, which no wildcard of transformers' plans (digits only) could name."""
        super().init_parallel_plans()
        for group in ("towers", "decoders"):
            for tower in getattr(self, group, ()):
                self._fsdp_plan[f"{group}.{tower}"] = "free_full_weight"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SolarChipCentering):
            init.zeros_(module.mean)
            init.ones_(module.std)
            init.zeros_(module.num_updates)
        elif isinstance(module, SolarChipForPreTraining):
            init.constant_(module.logit_scales, self.config.logit_scale_init_value)

    def _image_ids(self, modality_ids: torch.LongTensor | Sequence[int] | None, count: int) -> list[int]:
        many = len(self.config.modalities)
        if modality_ids is None and many == 1:
            return [0] * count
        ids = modality_ids.tolist() if hasattr(modality_ids, "tolist") else list(modality_ids or [])
        if len(ids) != count or any(isinstance(index, list) or not 0 <= index < many for index in ids):
            raise ValueError(
                f"modality_ids: expected {count} numbers in 0..{many - 1}, the positions in config.modalities "
                f"({', '.join(self.config.modalities)}), got {ids if modality_ids is not None else None}."
            )
        return ids

    def _observations(
        self, pixel_values: torch.FloatTensor, observed: torch.BoolTensor | None
    ) -> tuple[torch.FloatTensor, torch.BoolTensor]:
        """Checks (B, M, H, W) images against (B, M) marks and blanks what is missing, whatever it holds."""
        many = len(self.config.modalities)
        if pixel_values.dim() != 4 or pixel_values.shape[1] != many:
            names = ", ".join(self.config.modalities)
            raise ValueError(
                f"pixel_values: expected (B, {many}, H, W), one image a modality of {names}, "
                f"got {tuple(pixel_values.shape)}. Give the processor dicts {{modality: image}} for this form."
            )
        if observed is None:
            observed = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        observed = torch.as_tensor(observed, dtype=torch.bool, device=pixel_values.device)
        if observed.shape != pixel_values.shape[:2]:
            raise ValueError(f"observed: expected {tuple(pixel_values.shape[:2])}, got {tuple(observed.shape)}.")
        # `where` and not a product, or a missing image's NaN would reach loss and gradient.
        return torch.where(observed[:, :, None, None], pixel_values, 0.0), observed


class SolarChipModel(SolarChipPreTrainedModel):
    """The encoders: tokens, class token and contrastive embeddings of single images.

    Args:
        config: Towers and modalities.
    """

    def __init__(self, config: SolarChipConfig):
        super().__init__(config)
        # What the models around this one add to their checkpoints.
        self._keys_to_ignore_on_load_unexpected += [r"^decoders\.", r"^logit_scales$", r"^classifier\."]
        self.towers = nn.ModuleDict(
            {tower: _build_encoder(config, tower, served) for tower, served in config.towers().items()}
        )
        tokens = {"none": 0, "class": 1, "tokens": 1 + (config.image_size // config.patch_size) ** 2}
        count = tokens[config.projection_centering]
        self.centering = nn.ModuleDict(
            {name: SolarChipCentering(count, config.projection_dim) for name in config.modalities if count}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        modality_ids: torch.LongTensor | Sequence[int] | None = None,
        *,
        observed: torch.BoolTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SolarChipModelOutput:
        """Encodes images, of mixed modalities at will.

        Args:
            pixel_values: (N, 1, H, H) as the processor scales them, H any multiple of the patch.
            modality_ids: (N,) positions in `config.modalities`; may be left out where there is only one.
            observed: Refused: it belongs to observations, which other classes take.
            output_hidden_states: Whether to return the towers' hidden states; None: as the config says.
            output_attentions: Whether to return attention maps, which takes `attn_implementation="eager"` and a ViT.

        Returns:
            The output, or a tuple of what is not None with `return_dict=False`.

        Raises:
            ValueError: Shapes or ids that do not fit, or attentions asked of an implementation without them.
        """
        if observed is not None:
            raise ValueError(
                f"{type(self).__name__}: expected images (N, 1, H, H) with modality_ids, got observations "
                f"{tuple(pixel_values.shape)} with observed. Give the processor a list of images instead of mappings, "
                "or take SolarChipForPreTraining or SolarChipForImageClassification, which take observations."
            )
        ids = self._image_ids(modality_ids, len(pixel_values))
        record = {
            "output_hidden_states": self._flag("output_hidden_states", output_hidden_states),
            "output_attentions": self._flag("output_attentions", output_attentions),
        }
        if record["output_attentions"]:
            self._check_attentions()
        outputs = run_towers(
            self.config.towers(),
            self.config.modalities,
            ids,
            pixel_values,
            lambda tower, images, tower_ids: self.towers[tower](images, tower_ids, return_dict=True, **record),
        )
        return SolarChipModelOutput(
            pooler_output=outputs["last_hidden_state"][:, 0],
            contrastive_embeds=self.center(outputs["projections"], ids),
            **outputs,
        )

    def _flag(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def _check_attentions(self) -> None:
        if self.config.backbone_config.model_type == "solarchip_cnn":
            raise ValueError("output_attentions: expected a ViT backbone, got a CNN, which records no attention maps.")
        implementation = self.config.backbone_config._attn_implementation
        if implementation != "eager":
            raise ValueError(
                f"output_attentions: expected attn_implementation='eager', got {implementation!r}. "
                "Load with attn_implementation='eager', or call model.set_attn_implementation('eager')."
            )

    def center(self, projections: torch.FloatTensor, ids: Sequence[int]) -> torch.FloatTensor:
        """Centres projections by the running statistics of their modalities.

        Args:
            projections: (N, 1+L, projection).
            ids: N positions in `config.modalities`.

        Returns:
            (N, 1+L, projection); the argument itself with `projection_centering="none"`.
        """
        if not self.centering:
            return projections
        statistics = [self.centering[name].statistics(projections.shape[1]) for name in self.config.modalities]
        mean, std = (torch.stack(tables)[list(ids)] for tables in zip(*statistics, strict=True))
        return center_embeds(projections, mean, std).to(projections.dtype)

    def update_centering(self, projections: torch.FloatTensor, observed: torch.BoolTensor) -> None:
        """Moves the running statistics towards those of a batch; over all processes with `gather_negatives`.

        Statistics of another grid of patches than that of `config.image_size` are resized to it.

        Args:
            projections: (B, M, 1+L, projection) raw.
            observed: (B, M) bool.
        """
        config = self.config
        if not self.centering:
            return
        mean, std, count = centering_statistics(
            projections.detach(), observed, centering=config.projection_centering, gather=config.gather_negatives
        )
        for index, name in enumerate(config.modalities):
            self.centering[name].update(mean[index], std[index], count[index], config.centering_momentum)


class SolarChipForPreTraining(SolarChipPreTrainedModel):
    """Contrastive autoencoding of co-temporal observations: encoders, decoders and the objective.

    Source of the objective: SolarCHIP (arXiv 2511.22958). Missing modalities add nothing to loss or gradient.

    Args:
        config: Towers, modalities and the weights of the terms.
    """

    def __init__(self, config: SolarChipConfig):
        super().__init__(config)
        self.solarchip = SolarChipModel(config)
        self.decoders = nn.ModuleDict(
            {tower: _build_decoder(config, tower, served) for tower, served in config.towers().items()}
        )
        # Logarithms of the inverse temperatures of the class, patch and intra terms.
        self.logit_scales = nn.Parameter(torch.full((3,), float(config.logit_scale_init_value)))
        self._masks: dict[tuple, torch.Tensor | None] = {}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        observed: torch.BoolTensor | None = None,
        return_loss: bool = True,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SolarChipForPreTrainingOutput:
        """Encodes and decodes observations, and compares their modalities.

        Args:
            pixel_values: (B, M, H, H) scaled images in the order of `config.modalities`.
            observed: (B, M) bool, false where the image is missing; None: all are there.
            return_loss: Whether to compute the terms. Without them nothing is compared with other processes.
            output_hidden_states: As for `SolarChipModel`.
            output_attentions: As for `SolarChipModel`.

        Returns:
            The output, or a tuple of what is not None with `return_dict=False`.

        Raises:
            ValueError: Shapes that do not fit, or an anchor that is not among the modalities.
        """
        pixel_values, observed = self._observations(pixel_values, observed)
        shape, size = observed.shape, pixel_values.shape[-1]
        ids = list(range(shape[1])) * shape[0]
        encoded = self.solarchip(
            pixel_values.flatten(0, 1)[:, None],  # (B*M, 1, H, H)
            ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        latents = self._sample(encoded) if self.training else encoded.latents
        reconstruction = self.decode(latents, ids)[:, 0].unflatten(0, shape)  # (B, M, H, H)
        output = SolarChipForPreTrainingOutput(
            reconstruction=reconstruction,
            contrastive_embeds=encoded.contrastive_embeds.unflatten(0, shape),
            projections=encoded.projections.unflatten(0, shape),
            latents=latents.unflatten(0, shape),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if encoded.latents_logvar is not None:
            output.latents_mean = encoded.latents.unflatten(0, shape)
            output.latents_logvar = encoded.latents_logvar.unflatten(0, shape)
        if not return_loss:
            return output
        terms = {
            **self.contrastive_terms(output.projections, observed, image_size=size),
            **self.autoencoding_terms(output, pixel_values, observed),
        }
        return SolarChipForPreTrainingOutput(loss=self.weigh(terms), **terms, **output)

    def contrastive_terms(
        self, projections: torch.FloatTensor, observed: torch.BoolTensor, *, image_size: int
    ) -> dict[str, torch.Tensor]:
        """The three contrastive terms; in training they also move the running statistics, once a call.

        Args:
            projections: (B, M, 1+L, projection) raw, of any number of chunks together.
            observed: (B, M) bool.
            image_size: Side of the images in pixels, which places the disk among the patches.

        Returns:
            Scalars `cls_loss`, `patch_loss`, `intra_loss`.
        """
        config = self.config
        terms = contrastive_losses(
            projections,
            observed,
            self.logit_scales,
            pairs=make_pairs(config.modalities, config.anchor_modality, config.pairing),
            patch_mask=self._patch_mask(image_size, projections.device),
            centering=config.projection_centering,
            gather=config.gather_negatives,
        )
        if self.training:
            self.solarchip.update_centering(projections, observed)
        return terms

    def autoencoding_terms(
        self, output: SolarChipForPreTrainingOutput, pixel_values: torch.FloatTensor, observed: torch.BoolTensor
    ) -> dict[str, torch.Tensor]:
        """The error of the reconstructions and, for a VAE, the divergence of its posterior.

        Args:
            output: What `forward` gave, with or without terms.
            pixel_values: (B, M, H, H) the images that were encoded.
            observed: (B, M) bool.

        Returns:
            Scalars `reconstruction_loss` and, for a VAE, `kl_loss`.
        """
        mask = self._pixel_mask(pixel_values.shape[-1], pixel_values.device)
        terms = {
            "reconstruction_loss": reconstruction_loss(
                output.reconstruction, pixel_values, observed, self.config.reconstruction_loss, mask
            )
        }
        if output.latents_logvar is not None:
            terms["kl_loss"] = kl_loss(output.latents_mean, output.latents_logvar, observed)
        return terms

    def weigh(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of named terms, each times its `<name>_weight` of the config."""
        return sum(getattr(self.config, f"{name}_weight") * term for name, term in terms.items())

    def encode(
        self,
        pixel_values: torch.FloatTensor,
        modality_ids: torch.LongTensor | Sequence[int] | None = None,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.FloatTensor:
        """Images to latents.

        Args:
            pixel_values: (N, 1, H, H).
            modality_ids: (N,) positions in `config.modalities`.
            sample: Whether a VAE draws from its posterior instead of giving the mean.
            generator: Source of that draw.

        Returns:
            (N, hidden, h, w).
        """
        encoded = self.solarchip(pixel_values, modality_ids, return_dict=True)
        return self._sample(encoded, generator) if sample else encoded.latents

    def decode(
        self, latents: torch.FloatTensor, modality_ids: torch.LongTensor | Sequence[int] | None = None
    ) -> torch.FloatTensor:
        """Latents to images.

        Args:
            latents: (N, hidden, h, w).
            modality_ids: (N,) positions in `config.modalities`.

        Returns:
            (N, 1, H, H) in the processor's scaled units.
        """
        ids = self._image_ids(modality_ids, len(latents))
        return run_towers(
            self.config.towers(),
            self.config.modalities,
            ids,
            latents,
            lambda tower, rows, tower_ids: {"images": self.decoders[tower](rows, tower_ids)},
        )["images"]

    @staticmethod
    def _sample(encoded: SolarChipModelOutput, generator: torch.Generator | None = None) -> torch.Tensor:
        if encoded.latents_logvar is None:
            return encoded.latents
        mean, deviation = encoded.latents, (0.5 * encoded.latents_logvar).exp()
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + deviation * noise

    def _patch_mask(self, size: int, device: torch.device) -> torch.Tensor | None:
        """(L,) bool, the patches with enough disk; None: all."""
        if self.config.min_disk_fraction == 0:
            return None
        key = ("patch", size, device)
        if key not in self._masks:
            fraction = torch.from_numpy(disk_fraction(size, size // self.config.patch_size))
            self._masks[key] = (fraction.flatten() >= self.config.min_disk_fraction).to(device)
        return self._masks[key]

    def _pixel_mask(self, size: int, device: torch.device) -> torch.Tensor | None:
        """(M, H, H) bool, where the canonical grid holds data of each modality; None: everywhere."""
        if not self.config.mask_reconstruction:
            return None
        key = ("pixel", size, device)
        if key not in self._masks:
            radii = [1.0 if name == "hmi" else SUPPORT_RADIUS for name in self.config.modalities]
            self._masks[key] = torch.stack([torch.from_numpy(disk_mask(size, radius)) for radius in radii]).to(device)
        return self._masks[key]


__all__ = ["SolarChipForPreTraining", "SolarChipModel", "SolarChipPreTrainedModel"]
