"""Outputs of the towers and models, each field with its shape."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class SolarChipTowerOutput(ModelOutput):
    """Output of one tower for n images of the modalities that it serves.

    Attributes:
        last_hidden_state: (n, 1+L, hidden) class token and patch tokens, row-major from the image's first row.
        projections: (n, 1+L, projection) the tokens in the contrastive space, neither centred nor normalised.
        latents: (n, hidden, h, w) what the decoder takes; the mean of the posterior for a VAE.
        latents_logvar: (n, hidden, h, w) logarithm of the posterior's variance, VAE only.
        hidden_states: ViT: (n, 1+L, hidden) before the first and after every layer; CNN: the feature maps
            (n, c, h', w') before the first and after every block.
        attentions: (n, heads, 1+L, 1+L) of every layer, ViT only.
    """

    last_hidden_state: torch.FloatTensor | None = None
    projections: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    latents_logvar: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SolarChipModelOutput(ModelOutput):
    """Output of `SolarChipModel` for N images of any modalities.

    Attributes:
        last_hidden_state: (N, 1+L, hidden) class token and patch tokens, row-major from the image's first row.
        pooler_output: (N, hidden) the class token.
        contrastive_embeds: (N, 1+L, projection) the tokens in the contrastive space, centred by the running statistics
            of their modality as `config.projection_centering` says. Compare them by cosine similarity.
        latents: (N, hidden, h, w) what the decoder takes; the mean of the posterior for a VAE.
        projections: (N, 1+L, projection) as `contrastive_embeds`, but not centred: what the losses take.
        latents_logvar: (N, hidden, h, w) logarithm of the posterior's variance, VAE only.
        hidden_states: With `output_hidden_states`; ViT: (N, 1+L, hidden) before the first and after every layer; CNN:
            the feature maps before the first and after every block.
        attentions: With `output_attentions` (ViT, eager attention): (N, heads, 1+L, 1+L) of every layer.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    contrastive_embeds: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    projections: torch.FloatTensor | None = None
    latents_logvar: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SolarChipForPreTrainingOutput(ModelOutput):
    """Output of `SolarChipForPreTraining` for B observations of M modalities.

    Attributes:
        loss: () the weighted sum of the terms; with several processes, this process's part times their number.
        cls_loss: () contrastive term between class tokens.
        patch_loss: () contrastive term between equal patches of different observations.
        intra_loss: () contrastive term between different patches of one observation.
        reconstruction_loss: () error of the reconstructions, summed over modalities.
        kl_loss: () divergence of the posterior from the standard normal, VAE only.
        reconstruction: (B, M, H, W) decoded images in the processor's scaled units.
        contrastive_embeds: (B, M, 1+L, projection) see `SolarChipModelOutput`.
        projections: (B, M, 1+L, projection) as `contrastive_embeds`, but not centred: what the losses take.
        latents: (B, M, hidden, h, w) what was decoded: for a VAE in training a sample, else the mean.
        latents_mean: (B, M, hidden, h, w) mean of the posterior, VAE only.
        latents_logvar: (B, M, hidden, h, w) logarithm of the posterior's variance, VAE only.
        hidden_states: As in `SolarChipModelOutput` with N = B x M rows.
        attentions: As in `SolarChipModelOutput` with N = B x M rows.
    """

    loss: torch.FloatTensor | None = None
    cls_loss: torch.FloatTensor | None = None
    patch_loss: torch.FloatTensor | None = None
    intra_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    contrastive_embeds: torch.FloatTensor | None = None
    projections: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    latents_mean: torch.FloatTensor | None = None
    latents_logvar: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SolarChipImageClassifierOutput(ModelOutput):
    """Output of `SolarChipForImageClassification` for B observations of M modalities and K classes.

    Attributes:
        loss: () mean over the labelled observations; zero if there is none.
        logits: (B, K); their softmax are the classes' probabilities, with `config.ordinal` too.
        modality_weights: (B, M) share of every modality in the fused feature, zero where missing.
        token_weights: (B, M, 1+L) share of every token in its modality's feature; from the second on they are a map
            of where on the Sun the head looks, row-major from the image's first row.
        hidden_states: As in `SolarChipModelOutput` with N = B x M rows.
        attentions: As in `SolarChipModelOutput` with N = B x M rows.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    modality_weights: torch.FloatTensor | None = None
    token_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


__all__ = [
    "SolarChipForPreTrainingOutput",
    "SolarChipImageClassifierOutput",
    "SolarChipModelOutput",
    "SolarChipTowerOutput",
]
