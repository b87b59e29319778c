"""What a diffusion step learns: the predictions of prior and ControlNet, and the loss that judges them."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.training_utils import compute_snr

from .components import null_context

TIMESTEP_SAMPLINGS = ("uniform", "cubic")
# (network as Accelerate wraps it, noisy latents, timesteps, batch, generator) -> prediction
Predict = Callable[
    [torch.nn.Module, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], torch.Generator], torch.Tensor
]


def prior_prediction(
    unet: torch.nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    """What the prior predicts of a batch of `PriorLatents`: its context is null, its label, if any, the modality."""
    network = getattr(unet, "module", unet)
    labels = batch["class_label"] if network.config.num_class_embeds else None
    context = null_context(network, len(noisy))
    return unet(noisy, timesteps, context, class_labels=labels, return_dict=False)[0]


class ControlNetPrediction:
    """What a frozen prior predicts of a batch of `TranslationLatents`, steered by the ControlNet that learns.

    Args:
        prior: The prior; its weights are frozen here.
        class_label: The target's place among the prior's modalities; None for a prior of one.
        hint_dropout: Probability that an item's hint and context are zeros, for classifier-free guidance.

    Raises:
        ValueError: The dropout is no probability.
    """

    def __init__(self, prior: UNet2DConditionModel, *, class_label: int | None = None, hint_dropout: float = 0.1):
        if not 0 <= hint_dropout < 1:
            raise ValueError(f"hint_dropout: expected 0 or more and below 1, got {hint_dropout}.")
        self.prior = prior.requires_grad_(False).eval()
        self.class_label = class_label
        self.hint_dropout = hint_dropout

    def __call__(
        self,
        controlnet: torch.nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> torch.Tensor:
        kept = (torch.rand(len(noisy), generator=generator) >= self.hint_dropout).to(noisy)
        labels = None
        if self.class_label is not None:
            labels = torch.full((len(noisy),), self.class_label, dtype=torch.long, device=noisy.device)
        down, middle = controlnet(
            noisy,
            timesteps,
            encoder_hidden_states=batch["context"] * kept[:, None, None],
            controlnet_cond=batch["hint"] * kept[:, None, None, None],
            class_labels=labels,
            return_dict=False,
        )
        return self.prior(
            noisy,
            timesteps,
            null_context(self.prior, len(noisy)),
            class_labels=labels,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def check_initial(self, controlnet: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, steps: int) -> None:
        """Refuses a ControlNet that changes the prior's prediction before its first step.

        Args:
            controlnet: As `build_controlnet` made it.
            batch: Some items, on the prior's device.
            steps: Timesteps of the noise schedule; the middle one is tried.

        Raises:
            ValueError: The prediction moves by more than 1e-6.
        """
        noisy, device = batch["target"], batch["target"].device
        timesteps = torch.full((len(noisy),), steps // 2, device=device)
        guided = self(controlnet, noisy, timesteps, batch, torch.Generator())
        labels = {} if self.class_label is None else {"class_label": torch.full_like(timesteps, self.class_label)}
        alone = prior_prediction(self.prior, noisy, timesteps, labels, torch.Generator())
        change = float((guided - alone).abs().max())
        if not change <= 1e-6:
            raise ValueError(
                f"controlnet: expected zero-initialised outputs, which leave the prior's prediction unchanged to 1e-6, "
                f"got a change of {change:.2g}. Build it with build_controlnet, or resume its own run."
            )


def draw_timesteps(count: int, steps: int, how: str, generator: torch.Generator) -> torch.Tensor:
    """Timesteps of a micro-step.

    What a source tells is decided in the first steps of sampling, where noise hides the target: nearly without noise,
    the noisy latent tells more than any source. `"cubic"` spends a ControlNet's training there: t = (1 - u^3) T for a
    uniform u, so that every second timestep is above 7/8 T. Source: T2I-Adapter (Mou et al. 2023, arXiv 2302.08453),
    section 3.4.

    Args:
        count: B.
        steps: T, of the noise schedule.
        how: `"uniform"` or `"cubic"`.
        generator: Of the draw, on the CPU.

    Returns:
        (B,) int64 in 0..T-1.
    """
    if how == "uniform":
        return torch.randint(0, steps, (count,), generator=generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((1 - uniform**3) * steps).long().clamp(max=steps - 1)


def diffusion_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: SchedulerMixin,
    snr_gamma: float | None,
) -> torch.Tensor:
    """Squared error against the noise or the velocity, weighted by min(SNR, gamma).

    Source of the weighting: Hang et al. 2023 (arXiv 2303.09556), equation 6: min(SNR, gamma) / SNR for the noise,
    min(SNR, gamma) / (SNR + 1) for the velocity of Salimans and Ho 2022 (arXiv 2202.00512).

    Args:
        prediction: (B, z, h, w) of the network.
        latents: (B, z, h, w) clean.
        noise: (B, z, h, w) that was added.
        timesteps: (B,).
        scheduler: The noise schedule, with its `prediction_type`.
        snr_gamma: None or 0: no weighting.

    Returns:
        A scalar in float32.
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        errors = errors * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return errors.mean()


__all__ = [
    "TIMESTEP_SAMPLINGS",
    "ControlNetPrediction",
    "Predict",
    "diffusion_loss",
    "draw_timesteps",
    "prior_prediction",
]
