"""The convolutional tower: the encoder and decoder of latent diffusion, as an autoencoder or a VAE."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_solarchip import SolarChipCNNConfig
from .modeling_solarchip_layers import SolarChipInitialization, SolarChipModalityEmbedding, check_pixel_values
from .modeling_solarchip_outputs import SolarChipTowerOutput

# Resolutions whose feature maps can be recorded; far more than an image has halvings.
_MAX_BLOCKS = 16


def _diffusers_blocks() -> tuple[type[nn.Module], type[nn.Module]]:
    try:
        from diffusers.models.autoencoders.vae import Decoder, Encoder
    except ImportError as error:
        raise ImportError(
            "The CNN tower is made of diffusers' Encoder and Decoder, and diffusers could not be imported. "
            "Install it with `pip install solarchip_hf[cnn]`; the ViT towers do without."
        ) from error
    return Encoder, Decoder


def _set_norm_groups(network: nn.Module, config: SolarChipCNNConfig) -> None:
    # diffusers knows one number for all widths.
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = config.norm_groups(module.num_channels)


class SolarChipCNNPreTrainedModel(SolarChipInitialization, PreTrainedModel):
    """Initialisation and abilities of the convolutional tower and its decoder."""

    config: SolarChipCNNConfig
    base_model_prefix = "solarchip_cnn"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the middle block's attention always runs through it
    _no_split_modules = ["DownEncoderBlock2D", "UNetMidBlock2D", "UpDecoderBlock2D"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own scheme, a normal of deviation 0.02 on every convolution, would shrink the signal at each
        # block: latent diffusion relies on torch's uniform of variance 1 / (3 fan_in), biases alike.
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SolarChipModalityEmbedding):
            for vector in module.parameters(recurse=False):
                init.normal_(vector, std=0.02)
        elif isinstance(module, SolarChipCNNModel) and module.projection is not None:
            init.normal_(module.projection.weight, std=self.config.latent_channels**-0.5)


class SolarChipCNNModel(SolarChipCNNPreTrainedModel):
    """Encoder tower: latent pixels as patch tokens, their mean through a linear layer as class token.

    Args:
        config: Sizes of the network.
        modalities: Names of the modalities that get a learned vector each; None for a tower that needs none.
        projection_dim: Width of the contrastive space; None for no projection.

    Raises:
        ImportError: diffusers is not installed.
    """

    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": [
            OutputRecorder(None, class_name=name)
            for name in (*(f".encoder.down_blocks.{index}" for index in range(_MAX_BLOCKS)), ".encoder.mid_block")
        ]
    }

    def __init__(
        self, config: SolarChipCNNConfig, modalities: Sequence[str] | None = None, projection_dim: int | None = None
    ):
        super().__init__(config)
        encoder_class, _ = _diffusers_blocks()
        channels = config.latent_channels
        self.encoder = encoder_class(
            in_channels=config.num_channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=1,
            act_fn=config.hidden_act,
            double_z=config.double_z,
            mid_block_add_attention=config.mid_block_add_attention,
        )
        _set_norm_groups(self.encoder, config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.double_z else None
        self.class_projection = nn.Linear(channels, channels)
        self.modality_embedding = (
            None if modalities is None else SolarChipModalityEmbedding(modalities, config.block_out_channels[0])
        )
        self.projection = None if projection_dim is None else nn.Linear(channels, projection_dim, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.FloatTensor, tower_ids: torch.LongTensor | None = None, **kwargs
    ) -> SolarChipTowerOutput:
        """Encodes images.

        Args:
            pixel_values: (n, 1, H, H) with H any multiple of the total down-sampling.
            tower_ids: (n,) positions within the tower's `modalities`; needed where it has vectors for them.
            **kwargs: `output_hidden_states`, `return_dict`. There are no attention maps to record.

        Returns:
            The tokens, their projections and the latents (mean and log-variance for a VAE).
        """
        check_pixel_values(pixel_values, self.config.patch_size)
        latents, logvar = self._encode(pixel_values.to(self.encoder.conv_in.weight.dtype), tower_ids), None
        if self.quant_conv is not None:
            latents, logvar = self.quant_conv(latents).chunk(2, dim=1)  # each (n, z, h, w)
            logvar = logvar.clamp(-30.0, 20.0)
        class_token = self.class_projection(latents.mean(dim=(2, 3)))
        tokens = torch.cat([class_token[:, None], latents.flatten(2).transpose(1, 2)], dim=1)  # (n, 1+L, z)
        return SolarChipTowerOutput(
            last_hidden_state=tokens,
            projections=None if self.projection is None else self.projection(tokens),
            latents=latents,
            latents_logvar=logvar,
        )

    def _encode(self, sample: torch.Tensor, tower_ids: torch.LongTensor | None) -> torch.Tensor:
        # The steps of diffusers' Encoder.forward, opened where the modality's vector enters: behind the first
        # convolution, since one number added to a one-channel image would tell too little.
        encoder = self.encoder
        sample = encoder.conv_in(sample)
        if self.modality_embedding is not None:
            sample = sample + self.modality_embedding(tower_ids)[:, :, None, None]
        for block in (*encoder.down_blocks, encoder.mid_block):
            if encoder.gradient_checkpointing and self.training:
                sample = encoder._gradient_checkpointing_func(block.__call__, sample)
            else:
                sample = block(sample)
        return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(sample)))


class SolarChipCNNDecoder(SolarChipCNNPreTrainedModel):
    """Decoder of the CNN tower.

    Args:
        config: Sizes of the network.
        modalities: As for `SolarChipCNNModel`.

    Raises:
        ImportError: diffusers is not installed.
    """

    main_input_name = "latents"

    def __init__(self, config: SolarChipCNNConfig, modalities: Sequence[str] | None = None):
        super().__init__(config)
        _, decoder_class = _diffusers_blocks()
        channels = config.latent_channels
        self.modality_embedding = None if modalities is None else SolarChipModalityEmbedding(modalities, channels)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.double_z else None
        self.decoder = decoder_class(
            in_channels=channels,
            out_channels=config.num_channels,
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=1,
            act_fn=config.hidden_act,
            mid_block_add_attention=config.mid_block_add_attention,
        )
        _set_norm_groups(self.decoder, config)
        self.post_init()

    def forward(self, latents: torch.FloatTensor, tower_ids: torch.LongTensor | None = None) -> torch.FloatTensor:
        """(n, z, h, w) latents -> (n, 1, H, W) images in the processor's scaled units."""
        if self.modality_embedding is not None:
            latents = latents + self.modality_embedding(tower_ids)[:, :, None, None]
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


__all__ = ["SolarChipCNNDecoder", "SolarChipCNNModel", "SolarChipCNNPreTrainedModel"]
