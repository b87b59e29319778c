"""The vision-transformer tower: a CLIP vision model on one channel that keeps all tokens, and its decoder."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder, CLIPEncoderLayer, CLIPPreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_solarchip import SolarChipViTConfig
from .modeling_solarchip_layers import SolarChipInitialization, SolarChipModalityEmbedding, check_pixel_values
from .modeling_solarchip_outputs import SolarChipTowerOutput


def _sine_cosine_positions(side: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(side^2, width) fixed positions, half for the row and half for the column (as in MAE, arXiv 2111.06377)."""
    frequencies = 10000 ** (-torch.arange(width // 4, device=like.device, dtype=torch.float32) / (width // 4))
    angles = torch.arange(side, device=like.device, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width).to(like.dtype)


class SolarChipViTPreTrainedModel(SolarChipInitialization, CLIPPreTrainedModel):
    """CLIP's initialisation and abilities, for the tower and its decoder."""

    config: SolarChipViTConfig
    base_model_prefix = "solarchip_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer"]  # noqa: RUF012 (transformers' own protocol)
    _can_record_outputs = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SolarChipModalityEmbedding):
            for vector in module.parameters(recurse=False):
                init.normal_(vector, std=self.config.initializer_range)
        elif isinstance(module, SolarChipViTModel) and module.projection is not None:
            init.normal_(module.projection.weight, std=self.config.hidden_size**-0.5)


class SolarChipViTModel(SolarChipViTPreTrainedModel):
    """Encoder tower: all tokens of a CLIP vision transformer after the last layer norm, and their projections.

    Args:
        config: Sizes of the transformer.
        modalities: Names of the modalities that get a learned vector each; None for a tower that needs none.
        projection_dim: Width of the contrastive space; None for no projection.
    """

    _can_record_outputs = {"hidden_states": CLIPEncoderLayer, "attentions": CLIPAttention}  # noqa: RUF012

    def __init__(
        self, config: SolarChipViTConfig, modalities: Sequence[str] | None = None, projection_dim: int | None = None
    ):
        super().__init__(config)
        self.encoder = CLIPVisionModel._from_config(config)
        self.modality_embedding = (
            None if modalities is None else SolarChipModalityEmbedding(modalities, config.hidden_size)
        )
        self.projection = None if projection_dim is None else nn.Linear(config.hidden_size, projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.FloatTensor, tower_ids: torch.LongTensor | None = None, **kwargs
    ) -> SolarChipTowerOutput:
        """Encodes images.

        Args:
            pixel_values: (n, 1, H, H) with H any multiple of the patch.
            tower_ids: (n,) positions within the tower's `modalities`; needed where it has vectors for them.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            The tokens, their projections and the latents.
        """
        check_pixel_values(pixel_values, self.config.patch_size)
        encoder = self.encoder
        hidden_states = encoder.embeddings(pixel_values, interpolate_pos_encoding=True)  # (n, 1+L, hidden)
        if self.modality_embedding is not None:
            hidden_states = hidden_states + self.modality_embedding(tower_ids)[:, None]
        hidden_states = encoder.pre_layrnorm(hidden_states)
        hidden_states = encoder.encoder(inputs_embeds=hidden_states, **kwargs).last_hidden_state
        # CLIP normalises the class token only; here the patch tokens are features too.
        hidden_states = encoder.post_layernorm(hidden_states)
        side = pixel_values.shape[-1] // self.config.patch_size
        return SolarChipTowerOutput(
            last_hidden_state=hidden_states,
            projections=None if self.projection is None else self.projection(hidden_states),
            latents=hidden_states[:, 1:].transpose(1, 2).unflatten(2, (side, side)),  # (n, hidden, h, w)
        )


class SolarChipViTDecoder(SolarChipViTPreTrainedModel):
    """Decoder of the ViT tower: a transformer over the patch tokens, then a linear map to each patch's pixels.

    Args:
        config: What `SolarChipViTConfig.decoder_config()` gives: the decoder's sizes in the encoder's field names.
        latent_channels: Width of the encoder's tokens.
        modalities: As for `SolarChipViTModel`.
    """

    main_input_name = "latents"

    def __init__(self, config: SolarChipViTConfig, latent_channels: int, modalities: Sequence[str] | None = None):
        super().__init__(config)
        width = config.hidden_size
        self.modality_embedding = (
            None if modalities is None else SolarChipModalityEmbedding(modalities, latent_channels)
        )
        self.input_projection = nn.Identity() if width == latent_channels else nn.Linear(latent_channels, width)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = CLIPEncoder(config)
        self.output_projection = nn.Linear(width, config.num_channels * config.patch_size**2)
        self.post_init()

    def forward(self, latents: torch.FloatTensor, tower_ids: torch.LongTensor | None = None) -> torch.FloatTensor:
        """(n, hidden, h, w) latents -> (n, 1, H, W) images in the processor's scaled units."""
        height, width = latents.shape[-2:]
        hidden_states = latents.flatten(2).transpose(1, 2)  # (n, L, hidden)
        if self.modality_embedding is not None:
            hidden_states = hidden_states + self.modality_embedding(tower_ids)[:, None]
        hidden_states = self.input_projection(hidden_states)
        if self.config.decoder_position_embedding:
            hidden_states = hidden_states + _sine_cosine_positions(height, hidden_states.shape[-1], hidden_states)
        hidden_states = self.pre_layernorm(hidden_states)
        hidden_states = self.transformer(inputs_embeds=hidden_states).last_hidden_state
        pixels = self.output_projection(hidden_states)  # (n, L, channels * patch^2)
        return self._lay_out(pixels, height, width)

    def _lay_out(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        patch, channels = self.config.patch_size, self.config.num_channels
        if self.config.decoder_layout == "raster":
            # The research code reshapes (n, L, channels * patch^2) straight to an image, so that a token fills rows of
            # the image instead of a patch. Its trained weights know no other order.
            return pixels.reshape(len(pixels), channels, height * patch, width * patch)
        pixels = pixels.reshape(len(pixels), height, width, channels, patch, patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(len(pixels), channels, height * patch, width * patch)


__all__ = ["SolarChipViTDecoder", "SolarChipViTModel", "SolarChipViTPreTrainedModel"]
