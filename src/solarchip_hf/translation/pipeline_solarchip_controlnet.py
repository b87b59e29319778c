"""From solar images of some channels to images of another with an uncertainty: the pipeline around the ControlNet."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modalities import resolve_modality
from ..models.modeling_solarchip import SolarChipForPreTraining
from .components import condition_on_sources, denormalise_latents, null_context
from .consistency import PREPARATION, check_call, check_components
from .generated_maps import Generation, generated_maps
from .source_images import read_sources
from .weights import WeightsDigest, align_weights, fetch_snapshot, name_and_revision


@dataclass
class SolarChipControlNetPipelineOutput(BaseOutput):
    """Generated images of the target channel in physical units, NaN where there is no prediction.

    Attributes:
        prediction: (B, size, size) float32, tensor or array, or a list of B sunpy Maps: the mean over the samples of
            each observation, or its first sample.
        uncertainty: As `prediction`: the standard deviation over the samples (n - 1); None for a single sample.
        samples: (B, num_samples, size, size), or B lists of Maps.
    """

    prediction: torch.Tensor | np.ndarray | list[Any]
    uncertainty: torch.Tensor | np.ndarray | list[Any] | None
    samples: torch.Tensor | np.ndarray | list[list[Any]]


class SolarChipControlNetPipeline(DiffusionPipeline):
    """Translates observations between the magnetogram and the passbands of SDO.

    The sources' latents steer a frozen prior over the target's latents through a ControlNet; the autoencoder decodes
    what was sampled. Several samples show how far the sources leave the target open. The networks are put into
    evaluation mode.

    `torch.compile` of the networks and `enable_model_cpu_offload` pass through. `enable_sequential_cpu_offload` moves
    prior and ControlNet layer by layer and leaves the autoencoder on the device; it gives no Maps, whose cards name the
    checksum of weights that are then out of reach.

    Source of the method: SolarCHIP (arXiv 2511.22958), on ControlNet (arXiv 2302.05543).

    Example:
        >>> pipeline = SolarChipControlNetPipeline.from_pretrained("solarchip/hmi-to-aia171")
        >>> output = pipeline("hmi.M_720s.20240101_000000_TAI.fits", num_samples=8, output_type="map")
        >>> output.prediction[0].peek(), output.uncertainty[0].peek()

    Args:
        autoencoder: Encodes the sources and decodes the target.
        unet: The prior over the target's latents.
        controlnet: Its ControlNet, made by `build_controlnet`.
        scheduler: Any of `build_scheduler`.
        image_processor: With the statistics that the networks were trained with.
        source_modalities: Channels of the sources, in the order of the hint's channels.
        target_modality: Channel that is generated.
        latent_mean: Means of the latent channels over the training set, by modality.
        latent_std: Deviations of the latent channels over the training set, by modality.
        prior_modalities: What a prior of several targets knows, in the order of its labels; None for one target.
        preparation: Photometry, degradation, geometry and size of the images that the networks were trained on; must be
            those of `image_processor`. None: taken from it.

    Raises:
        ValueError: The parts do not fit each other.
    """

    model_cpu_offload_seq = "autoencoder->unet"  # the ControlNet runs in every step too and is not part of a sequence
    _exclude_from_cpu_offload = ("autoencoder",)  # of sequential offloading: it uses weights apart from their modules
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        autoencoder: SolarChipForPreTraining,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        scheduler: SchedulerMixin,
        image_processor: SolarChipImageProcessor,
        source_modalities: list | None = None,
        target_modality: str | None = None,
        latent_mean: dict | None = None,
        latent_std: dict | None = None,
        prior_modalities: list | None = None,
        preparation: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            autoencoder=autoencoder,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            image_processor=image_processor,
        )
        for module in (autoencoder, unet, controlnet):
            align_weights(module.eval())  # as from_pretrained gives them: one in training mode rounds otherwise
        if not source_modalities or target_modality is None or not latent_mean or not latent_std:
            raise ValueError(
                "SolarChipControlNetPipeline: expected source_modalities, target_modality, latent_mean and latent_std, "
                f"got {source_modalities!r}, {target_modality!r}, {'some' if latent_mean else 'no'} means and "
                f"{'some' if latent_std else 'no'} deviations."
            )
        used = image_processor.statistics_key
        self.register_to_config(
            source_modalities=[resolve_modality(name) for name in source_modalities],
            target_modality=resolve_modality(target_modality),
            latent_mean={resolve_modality(name): [float(v) for v in row] for name, row in latent_mean.items()},
            latent_std={resolve_modality(name): [float(v) for v in row] for name, row in latent_std.items()},
            prior_modalities=None if prior_modalities is None else [resolve_modality(n) for n in prior_modalities],
            preparation={name: used[name] for name in PREPARATION} if preparation is None else dict(preparation),
        )
        check_components(self)
        self._loaded_from: Path | None = None
        self._digest = WeightsDigest()

    # Loading ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline and remembers where from, for the cards of what it generates.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a repository on the Hub.
            **kwargs: As for `DiffusionPipeline.from_pretrained`: `revision`, `torch_dtype`, components to replace, ...

        Raises:
            FileNotFoundError: There is no such folder, and no repository of that name.
        """
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(os.fspath(folder), **kwargs)
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline._loaded_from = Path(folder)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Brings a repository of the Hub to the cache; `from_pretrained` calls it for names that are no folders.

        diffusers' own looks for this module's file in the repository, since it does not know the class.

        Args:
            pretrained_model_name: `"owner/name"`.
            **kwargs: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`; others do not matter here.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: The name is no repository's, or the repository cannot be reached.
        """
        return fetch_snapshot(pretrained_model_name, **kwargs)

    @property
    def identity(self) -> tuple[str, str]:
        """Name and revision of what was loaded: repository and commit, or folder and `"local"`."""
        return name_and_revision(self._loaded_from)

    def weights_digest(self) -> str:
        """Hexadecimal SHA-256 over names, types and values of all weights in memory."""
        return self._digest({"autoencoder": self.autoencoder, "controlnet": self.controlnet, "unet": self.unet})

    # Steps of a call -------------------------------------------------------------------------------------------------

    def _modality_ids(self, modality: str, count: int) -> list[int]:
        return [self.autoencoder.config.modalities.index(modality)] * count

    def _wake_autoencoder(self) -> None:
        # Model offloading moves a module when its forward is called; encode and decode are other methods.
        hook = getattr(self.autoencoder, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.autoencoder)

    def encode_sources(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled images of the sources to what the ControlNet takes.

        Args:
            pixel_values: (B, S, size, size) in the order of `config.source_modalities`.

        Returns:
            The hint (B, S z, h, w) and the context (B, S (1 + h w), z), in the autoencoder's dtype.
        """
        self._wake_autoencoder()
        pixel_values = pixel_values.to(device=self._execution_device, dtype=self.autoencoder.dtype)
        latents, class_tokens = [], []
        for index, modality in enumerate(self.config.source_modalities):
            images = pixel_values[:, index, None]  # (B, 1, size, size)
            encoded = self.autoencoder.solarchip(images, self._modality_ids(modality, len(images)), return_dict=True)
            latents.append(encoded.latents)
            class_tokens.append(encoded.pooler_output)
        return condition_on_sources(
            torch.stack(latents, dim=1),
            torch.stack(class_tokens, dim=1),
            self.config.source_modalities,
            self.config.latent_mean,
            self.config.latent_std,
        )

    def prepare_noise(
        self, count: int, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Initial noise of every sample, drawn one after the other, so that batches do not matter.

        Args:
            count: Number of samples.
            generator: One generator a sample, or one for all of them in their order, or None.

        Returns:
            (count, z, h, w) float32 on the pipeline's device.

        Raises:
            ValueError: The number of generators differs, or they are none of torch's.
        """
        generators = self._generators(count, generator)
        side = self.unet.config.sample_size
        shape = (1, self.unet.config.in_channels, side, side)
        device = self._execution_device
        noise = [randn_tensor(shape, generator=each, device=device, dtype=torch.float32) for each in generators]
        return torch.cat(noise) * self.scheduler.init_noise_sigma

    @staticmethod
    def _generators(
        count: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[torch.Generator | None]:
        if generator is None or isinstance(generator, torch.Generator):
            return [generator] * count
        if not isinstance(generator, Sequence) or not all(isinstance(each, torch.Generator) for each in generator):
            raise ValueError(
                f"generator: expected torch.Generator, one or a list of them, got {generator!r}. Make one of a seed by "
                "torch.Generator().manual_seed(seed)."
            )
        if len(generator) != count:
            raise ValueError(
                f"generator: expected one, or {count}, one a sample (observation after observation), got "
                f"{len(generator)}."
            )
        return list(generator)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | int,
        hint: torch.Tensor,
        context: torch.Tensor,
        *,
        guidance_scale: float = 1.0,
        controlnet_conditioning_scale: float = 1.0,
    ) -> torch.Tensor:
        """What the networks make of noisy latents: the noise, or the velocity, as the scheduler's prediction type says.

        Args:
            latents: (n, z, h, w) noisy.
            timestep: Of the diffusion.
            hint: (n, S z, h, w) of `encode_sources`.
            context: (n, S (1 + h w), z) of `encode_sources`.
            guidance_scale: g of null + g (conditional - null); 1 is the conditional model in a single pass.
            controlnet_conditioning_scale: Factor on what the ControlNet adds; 0 is the prior alone, in a single pass.

        Returns:
            (n, z, h, w) float32.
        """
        guided = guidance_scale != 1.0 and controlnet_conditioning_scale != 0.0
        dtype = self.unet.dtype
        latents, hint, context = latents.to(dtype), hint.to(dtype), context.to(dtype)
        if guided:  # zeros stand for a dropped hint and, in any number, for the null context
            latents = torch.cat([latents, latents])
            hint = torch.cat([torch.zeros_like(hint), hint])
            context = torch.cat([torch.zeros_like(context), context])
        labels = self._class_labels(len(latents), latents.device)
        residuals: dict[str, Any] = {}
        if controlnet_conditioning_scale != 0.0:
            down, middle = self.controlnet(
                latents,
                timestep,
                encoder_hidden_states=context,
                controlnet_cond=hint,
                conditioning_scale=controlnet_conditioning_scale,
                class_labels=labels,
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        output = self.unet(
            latents,
            timestep,
            encoder_hidden_states=null_context(self.unet, len(latents), latents.device),
            class_labels=labels,
            return_dict=False,
            **residuals,
        )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _class_labels(self, count: int, device: torch.device) -> torch.Tensor | None:
        if self.unet.config.num_class_embeds is None:
            return None
        label = list(self.config.prior_modalities).index(self.config.target_modality)
        return torch.full((count,), label, dtype=torch.long, device=device)

    def denoise(
        self,
        latents: torch.Tensor,
        hint: torch.Tensor,
        context: torch.Tensor,
        *,
        num_inference_steps: int,
        generator: Sequence[torch.Generator | None] | None = None,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **guidance: float,
    ) -> torch.Tensor:
        """Runs the whole diffusion of one batch.

        Args:
            latents: (n, z, h, w) of `prepare_noise`.
            hint: (n, S z, h, w).
            context: (n, S (1 + h w), z).
            num_inference_steps: Steps.
            generator: n generators, for schedulers that draw noise in every step.
            on_step_end: Called with the step's number, its timestep and the latents; gives the latents to go on with.
            **guidance: `guidance_scale` and `controlnet_conditioning_scale` of `predict`.

        Returns:
            (n, z, h, w) float32, normalised latents of the target.
        """
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        options: dict[str, Any] = {}
        if generator and None not in generator and "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = list(generator)
        for step, timestep in enumerate(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(latents, timestep)
            prediction = self.predict(model_input, timestep, hint, context, **guidance)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
            if on_step_end is not None:
                latents = on_step_end(step, timestep, latents)
        return latents

    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """Normalised latents of the target to images.

        Args:
            latents: (n, z, h, w).

        Returns:
            (n, size, size) float32 in physical units; NaN beyond the limb for a magnetogram, beyond the inscribed
            circle for a passband, as the image processor's off-disk policy says.
        """
        self._wake_autoencoder()
        target = self.config.target_modality
        latents = denormalise_latents(latents, target, self.config.latent_mean, self.config.latent_std)
        images = self.autoencoder.decode(latents.to(self.autoencoder.dtype), self._modality_ids(target, len(latents)))
        return self.image_processor.unscale(images[:, 0], target)

    # The call --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pt",
        *,
        batch_size: int = 8,
        reduce: str = "mean",
        controlnet_conditioning_scale: float = 1.0,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> SolarChipControlNetPipelineOutput | tuple:
        """Translates images of the sources to the target.

        Args:
            image: One image or a list of them: the path or bytes of a FITS file, an astropy HDU, a sunpy Map, or an
                array on the canonical grid in physical units. With several sources a mapping `{modality: image}`, or a
                list of such. Arrays come in batches too: (N, H, W) of a single source, (N, S, H, W) of S sources.
            num_inference_steps: Denoising steps; 20 do for UniPC and DPM++, DDIM wants 100.
            guidance_scale: Weight of the sources: 1 is the conditional model as trained, whose mean and spread are
                those that were learned; more (published: 3) follows the sources closer at the cost of variety and of
                the spread's meaning, and costs two passes a step.
            num_samples: Samples an observation.
            generator: One `torch.Generator` a sample (observation after observation) gives the same images in any
                batch size; one for all draws the noise of all samples in their order.
            output_type: `"pt"`, `"np"`, or `"map"` for sunpy Maps with the source's WCS and time.
            batch_size: Samples that are denoised together.
            reduce: What `prediction` is: the `"mean"` over an observation's samples or its first `"sample"`.
            controlnet_conditioning_scale: Factor on what the sources add to the prior; 0 is the unconditional prior.
            callback_on_step_end: Called as `(pipeline, step, timestep, {"latents": latents})` after every step of
                every batch; a returned dictionary may replace the latents.
            callback_on_step_end_tensor_inputs: What it wants to see; only latents are there.
            return_dict: Whether to return the output class or a tuple of its fields.

        Returns:
            The images in physical units.

        Raises:
            SolarImageError: An image cannot be translated, in a sentence that says why.
            ValueError: The arguments do not fit each other.
            ImportError: Maps are asked for and sunpy is not installed.
        """
        # 1. Check the settings
        check_call(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            num_samples=num_samples,
            batch_size=batch_size,
            output_type=output_type,
            reduce=reduce,
            geometry=self.config.preparation["geometry"],
            training_steps=self.scheduler.config.num_train_timesteps,
        )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected some of {self._callback_tensor_inputs}, got {unknown}."
            )
        # 2. Read the sources and put them on the canonical grid
        sources = read_sources(
            image, self.image_processor, self.config.source_modalities, identify=output_type == "map"
        )
        # 3. Draw the initial noise of all samples
        count = len(sources.pixel_values) * num_samples
        generators = self._generators(count, generator)
        noise = self.prepare_noise(count, generator)
        # 4. Encode the sources
        encoded = [self.encode_sources(part) for part in sources.pixel_values.split(int(batch_size))]
        hint, context = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        # 5. Denoise and decode in batches
        owner = torch.arange(count, device=hint.device) // num_samples  # the observation of each sample
        images = []
        with self.progress_bar(total=-(-count // batch_size) * num_inference_steps) as progress:

            def on_step_end(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                progress.update()
                if callback_on_step_end is None:
                    return latents
                seen = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                returned = callback_on_step_end(self, step, timestep, seen)
                return latents if returned is None else returned.get("latents", latents)

            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                latents = self.denoise(
                    noise[rows],
                    hint[owner[rows]],
                    context[owner[rows]],
                    num_inference_steps=num_inference_steps,
                    generator=generators[rows],
                    on_step_end=on_step_end,
                    guidance_scale=guidance_scale,
                    controlnet_conditioning_scale=controlnet_conditioning_scale,
                )
                images.append(self.decode_latents(latents))
        self.maybe_free_model_hooks()
        # 6. Reduce the samples
        samples = np.concatenate(images).reshape(-1, num_samples, *images[0].shape[-2:])  # (B, num_samples, size, size)
        prediction = samples.mean(axis=1) if reduce == "mean" else samples[:, 0]
        uncertainty = samples.std(axis=1, ddof=1) if num_samples > 1 else None
        # 7. Give them the form asked for
        if output_type == "map":
            how = self._generation(num_inference_steps, guidance_scale)
            maps = generated_maps(prediction, uncertainty, samples, sources.facts, sources.records, how, reduce)
            output = SolarChipControlNetPipelineOutput(*maps)
        elif output_type == "pt":
            tensors = [None if part is None else torch.from_numpy(part) for part in (prediction, uncertainty, samples)]
            output = SolarChipControlNetPipelineOutput(*tensors)
        else:
            output = SolarChipControlNetPipelineOutput(prediction, uncertainty, samples)
        return output if return_dict else (output.prediction, output.uncertainty, output.samples)

    def _generation(self, steps: int, guidance: float) -> Generation:
        model, revision = self.identity
        return Generation(
            target=self.config.target_modality,
            model=model,
            revision=revision,
            weights=self.weights_digest(),
            preparation=self.config.preparation,
            scheduler=type(self.scheduler).__name__,
            steps=int(steps),
            guidance=float(guidance),
        )


__all__ = ["SolarChipControlNetPipeline", "SolarChipControlNetPipelineOutput"]
