"""The translation pipeline: what it computes, that batches do not matter, what it refuses, saving and loading."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from PIL import Image
from tiny_pipeline import MODALITIES, SIZE, random_images, tiny_pipeline

import accelerate
from solarchip_hf import SolarChipImageProcessor, SolarImageError, SyntheticSun, read_image
from solarchip_hf.translation import SolarChipControlNetPipeline, build_controlnet, build_scheduler, null_context

BACKBONES = ("vit", "cnn")


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def scaled(pipeline, images):
    """Finite images in the processor's scaled units, where 1e-4 means something."""
    return pipeline.image_processor.scale(images, pipeline.config.target_modality)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Files of a synthetic Sun by channel."""
    folder = tmp_path_factory.mktemp("archive")
    sun = SyntheticSun(seed=0, start="2014-06-01", days=3, size=128)
    sun.write_archive(folder, sun.times("2D"), ["hmi", "aia171", "aia304"], progress=False)
    found = {"hmi": "hmi*.fits", "aia171": "*_0171.fits", "aia304": "*_0304.fits"}
    return {name: sorted(folder.rglob(pattern)) for name, pattern in found.items()}


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_the_pipeline_is_the_plain_loop_of_its_networks(backbone):
    pipeline = tiny_pipeline(backbone, scheduler="ddim")
    images = random_images(count=1)
    output = pipeline(images, 4, 1.0, generator=seeds(1))

    config, autoencoder = pipeline.config, pipeline.autoencoder
    pixel_values = pipeline.image_processor(images, modality="hmi").pixel_values
    encoded = autoencoder.solarchip(pixel_values, [0], return_dict=True)
    mean, std = (torch.tensor(table["hmi"])[:, None, None] for table in (config.latent_mean, config.latent_std))
    hint = (encoded.latents - mean) / std
    tokens = (encoded.last_hidden_state - mean[:, 0, 0]) / std[:, 0, 0]
    side = hint.shape[-1]
    latents = torch.randn(1, hint.shape[1], side, side, generator=seeds(1)[0])
    scheduler = build_scheduler("ddim")
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        down, middle = pipeline.controlnet(latents, timestep, tokens, hint, return_dict=False)
        noise = pipeline.unet(
            latents,
            timestep,
            null_context(pipeline.unet, 1),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
    mean, std = (torch.tensor(table["aia171"])[:, None, None] for table in (config.latent_mean, config.latent_std))
    decoded = autoencoder.decode(latents * std + mean, [1])
    expected = pipeline.image_processor.post_process(decoded, [1])
    np.testing.assert_allclose(output.prediction.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert output.prediction.shape == (1, SIZE, SIZE)
    assert output.uncertainty is None


@torch.no_grad()
def test_guidance(monkeypatch):
    pipeline = tiny_pipeline()
    hint, context = pipeline.encode_sources(torch.from_numpy(random_images())[:, None] / 100)
    latents = pipeline.prepare_noise(2, seeds(2))
    passes = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    steered = []
    pipeline.controlnet.register_forward_pre_hook(lambda module, inputs: steered.append(len(inputs[0])))
    conditional = pipeline.predict(latents, 400, hint, context)
    null = pipeline.predict(latents, 400, torch.zeros_like(hint), null_context(pipeline.controlnet, 2))
    assert passes == steered == [2, 2]  # guidance 1: one pass
    guided = pipeline.predict(latents, 400, hint, context, guidance_scale=2.5)
    assert passes[-1] == 4
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)
    assert (conditional - null).abs().max() > 1e-2
    pipeline.predict(latents, 400, hint, context, guidance_scale=3.0, controlnet_conditioning_scale=0.0)
    assert (passes[-1], len(steered)) == (2, 3)  # the prior alone: one pass without the ControlNet
    images = random_images()
    plain = pipeline(images, 3, 1.0, generator=seeds(2), output_type="np").prediction
    assert np.array_equal(
        plain, pipeline(images, 3, 1, generator=seeds(2), output_type="np").prediction, equal_nan=True
    )
    other = pipeline(images, 3, 3.0, generator=seeds(2), output_type="np").prediction
    assert np.nanmax(np.abs(plain - other)) > 1e-2


@torch.no_grad()
def test_an_untrained_controlnet_leaves_the_prior_alone():
    pipeline = tiny_pipeline(trained=False)
    given = [pipeline(random_images(seed=seed), 3, 1.0, generator=seeds(2), output_type="np") for seed in (0, 1)]
    prior = pipeline(random_images(), 3, controlnet_conditioning_scale=0.0, generator=seeds(2), output_type="np")
    for output in given:
        difference = scaled(pipeline, output.prediction) - scaled(pipeline, prior.prediction)
        assert np.abs(difference).max() <= 1e-5
    trained = tiny_pipeline()
    first, second = (trained(random_images(seed=seed), 3, 1.0, generator=seeds(2)).prediction for seed in (0, 1))
    assert (first - second).abs().nan_to_num().max() > 1e-2  # the test above would see a hint


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("scheduler", ["unipc", "ddpm"])
def test_a_generator_a_sample_gives_the_same_images_in_any_batch(backbone, scheduler):
    pipeline = tiny_pipeline(backbone, scheduler=scheduler)
    images = random_images(count=3)

    def run(rows, first, batch_size):
        generators = seeds(2 * len(rows), first)
        options = {"num_samples": 2, "generator": generators, "batch_size": batch_size, "output_type": "np"}
        return scaled(pipeline, pipeline(images[rows], 4, **options).samples)

    whole = run([0, 1, 2], 0, 8)
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 0.01  # the samples differ
    for batch_size in (1, 4):
        assert np.abs(run([0, 1, 2], 0, batch_size) - whole).max() <= 1e-4
    assert np.abs(run([2], 4, 1)[0] - whole[2]).max() <= 1e-4


def test_one_generator_draws_for_all_samples_whatever_the_batch():
    pipeline = tiny_pipeline()
    outputs = [
        pipeline(random_images(), 3, num_samples=2, generator=torch.Generator().manual_seed(5), batch_size=size).samples
        for size in (1, 3)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-2, equal_nan=True)


def test_samples_are_reduced_in_physical_units():
    pipeline = tiny_pipeline()
    options = {"num_inference_steps": 3, "num_samples": 3, "output_type": "np"}
    output = pipeline(random_images(), generator=seeds(6), **options)
    assert output.samples.shape == (2, 3, SIZE, SIZE)
    np.testing.assert_allclose(output.prediction, output.samples.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(output.uncertainty, output.samples.std(axis=1, ddof=1), rtol=1e-5)
    assert np.nanmin(output.uncertainty) >= 0 < np.nanmax(output.uncertainty)
    first = pipeline(random_images(), generator=seeds(6), reduce="sample", **options)
    assert np.array_equal(first.prediction, output.samples[:, 0], equal_nan=True)
    prediction, uncertainty, samples = pipeline(random_images(), generator=seeds(6), return_dict=False, **options)
    assert np.array_equal(samples, output.samples, equal_nan=True)
    assert prediction.shape == uncertainty.shape == (2, SIZE, SIZE)


@pytest.mark.parametrize(("target", "inside"), [("hmi", 1.0), ("aia171", 512 / 406.67)])
def test_there_is_no_prediction_off_the_support(target, inside):
    pipeline = tiny_pipeline(sources=("aia304",), target=target)
    prediction = pipeline(random_images("aia304", 1), 2, output_type="np").prediction[0]
    offset = np.arange(SIZE) - (SIZE - 1) / 2
    distance = np.hypot(offset[:, None], offset) / (406.67 * SIZE / 1024)
    assert np.array_equal(np.isfinite(prediction), distance <= inside)


def test_a_prior_of_several_targets_is_told_which():
    prior_modalities = ["aia304", "aia171"]
    outputs = []
    for target in prior_modalities:
        pipeline = tiny_pipeline(target=target, prior_modalities=prior_modalities)
        labels = []
        pipeline.unet.register_forward_pre_hook(
            lambda module, inputs, keywords, labels=labels: labels.append(keywords["class_labels"].tolist()),
            with_kwargs=True,
        )
        hint, context = pipeline.encode_sources(torch.zeros(1, 1, SIZE, SIZE))
        noise = pipeline.prepare_noise(1, seeds(1))
        with torch.no_grad():
            outputs.append(pipeline.denoise(noise, hint, context, num_inference_steps=2, guidance_scale=2.0))
        assert labels[0] == [prior_modalities.index(target)] * 2
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_callbacks_see_every_step_and_may_change_the_latents():
    pipeline = tiny_pipeline()
    seen = []

    def look(owner, step, timestep, values):
        seen.append((owner is pipeline, step, int(timestep), values["latents"].shape[0]))

    pipeline(random_images(count=3), 3, batch_size=2, callback_on_step_end=look)
    assert [row[:2] for row in seen] == [(True, step) for step in (0, 1, 2)] * 2
    assert [row[3] for row in seen] == [2, 2, 2, 1, 1, 1]
    assert seen[0][2] == 999
    still = pipeline(
        random_images(), 2, callback_on_step_end=lambda *args: {"latents": torch.zeros_like(args[3]["latents"])}
    ).prediction
    torch.testing.assert_close(still[0], still[1], equal_nan=True)


def test_progress_is_shown(capsys):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    pipeline(random_images(count=2), 3, batch_size=1)
    assert "6/6" in capsys.readouterr().err


def test_a_compiled_network_is_passed_through():
    pipeline = tiny_pipeline()
    plain = pipeline(random_images(), 2, generator=seeds(2)).prediction
    digest = pipeline.weights_digest()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    compiled = pipeline(random_images(), 2, generator=seeds(2)).prediction
    torch.testing.assert_close(compiled, plain, equal_nan=True)
    assert pipeline.weights_digest() == digest
    with torch.no_grad():
        pipeline.controlnet.conv_in.weight += 1
    assert pipeline.weights_digest() != digest


def test_half_precision_is_close():
    pipeline = tiny_pipeline()
    plain = scaled(pipeline, pipeline(random_images(), 3, 1.0, generator=seeds(2), output_type="np").prediction)
    pipeline.to(torch.bfloat16)
    half = scaled(pipeline, pipeline(random_images(), 3, 1.0, generator=seeds(2), output_type="np").prediction)
    assert 0 < np.abs(half - plain).max() < 0.3 * np.abs(plain).max()


def test_model_offloading_reaches_encoding_and_decoding():
    pipeline = tiny_pipeline()
    plain = pipeline(random_images(), 2, generator=seeds(2)).prediction
    pipeline.enable_model_cpu_offload(device="cpu:0")  # no accelerator here: from the CPU to the CPU
    hook, woken = pipeline.autoencoder._hf_hook, []
    wake = hook.pre_forward

    def watched(module, *args, **kwargs):
        woken.append(module is pipeline.autoencoder)
        return wake(module, *args, **kwargs)

    hook.pre_forward = watched
    offloaded = pipeline(random_images(), 2, generator=seeds(2)).prediction
    torch.testing.assert_close(offloaded, plain, equal_nan=True)
    assert woken == [True, True]  # once to encode and once to decode


@pytest.mark.parametrize("backbone", ["vit", "cnn"])
def test_sequential_offloading_leaves_the_autoencoder_in_place(backbone, monkeypatch):
    """From the CPU to the CPU; a device "cpu:0", as diffusers names it, is never that of a tensor for accelerate."""
    pipeline, offload = tiny_pipeline(backbone), accelerate.cpu_offload
    plain = pipeline(random_images(), 2, generator=seeds(2)).prediction
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, _, **how: offload(model, torch.device("cpu"), **how))
    pipeline.enable_sequential_cpu_offload(device="cpu:0")
    assert all(tensor.is_meta for tensor in pipeline.unet.parameters())
    assert all(tensor.is_meta for tensor in pipeline.controlnet.parameters())
    offloaded = pipeline(random_images(), 2, generator=seeds(2)).prediction
    torch.testing.assert_close(offloaded, plain, equal_nan=True)
    with pytest.raises(ValueError, match="take enable_model_cpu_offload"):
        pipeline.weights_digest()


# What it takes --------------------------------------------------------------------------------------------------------


def test_files_maps_and_arrays_are_the_same_image(archive):
    from sunpy.map import Map

    pipeline = tiny_pipeline()
    path = archive["hmi"][0]
    _, physical = pipeline.image_processor.to_physical(path)
    with fits.open(path) as units:
        forms = [
            path,
            str(path),
            path.read_bytes(),
            units,
            Map(path),
            read_image(path),
            physical,
            torch.tensor(physical),
        ]
        outputs = [pipeline(form, 2, generator=seeds(1)).prediction for form in forms]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-2, equal_nan=True)
    pair = pipeline([path, {"HMI": archive["hmi"][1]}], 2, generator=seeds(2)).prediction
    torch.testing.assert_close(pair[0], outputs[0][0], rtol=1e-3, atol=1e-2, equal_nan=True)


def test_units_are_brought_to_the_pipelines_photometry(archive):
    from astropy import units as u
    from sunpy.map import Map

    pipeline = tiny_pipeline(sources=("aia171",), target="hmi")
    counts = Map(archive["aia171"][0])
    counts.meta["bunit"] = "DN"
    rate = counts / counts.exposure_time
    assert rate.unit == u.DN / u.s
    outputs = [pipeline(image, 2, generator=seeds(1)).prediction for image in (counts, rate)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_several_sources(backbone, archive):
    pipeline = tiny_pipeline(backbone, sources=("hmi", "aia304"))
    images = {"aia304": archive["aia304"][0], "hmi": archive["hmi"][0]}
    output = pipeline(images, 2, generator=seeds(1)).prediction
    arrays = {name: pipeline.image_processor.to_physical(path)[1] for name, path in images.items()}
    stacked = np.stack([arrays["hmi"], arrays["aia304"]])[None]
    batched = {name: array[None] for name, array in arrays.items()}
    for form in (arrays, stacked, batched, [images]):
        again = pipeline(form, 2, generator=seeds(1)).prediction
        torch.testing.assert_close(again, output, rtol=1e-3, atol=1e-2, equal_nan=True)
    swapped = pipeline(stacked[:, ::-1], 2, generator=seeds(1)).prediction
    assert (swapped - output).abs().nan_to_num().max() > 1e-2


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((32, 32), np.float32), r"shape: expected \(64, 64\) pixels"),
        (np.zeros((2, 64, 48), np.float32), r"shape: expected \(64, 64\) pixels"),
        (np.zeros((64, 64), np.uint8), "8-bit grey levels"),
        (torch.zeros(64, 64, dtype=torch.uint8), "8-bit grey levels"),
        (Image.new("L", (64, 64)), "8-bit grey levels"),
        ([], "at least one"),
        ({"aia171": np.zeros((64, 64))}, r"one image of each source \(hmi\)"),
        ({"hmi": None}, "some missing"),
        (np.full((64, 64), np.nan), "pixels: expected any finite one"),
        (3.5, "image: expected a path"),
    ],
)
def test_images_that_cannot_be_translated(image, said):
    with pytest.raises(ValueError, match=said):
        tiny_pipeline()(image, 2)


def test_files_that_cannot_be_translated(archive, sdo_folder):
    pipeline = tiny_pipeline()
    with pytest.raises(SolarImageError, match="expected an image of hmi, the source of this pipeline, got aia171"):
        pipeline(archive["aia171"][0], 2)
    with pytest.raises(SolarImageError, match="CONTENT"):  # a continuum image
        pipeline(sdo_folder / "resampled_hmi.fits", 2)
    mdi = next(sdo_folder.glob("mdi*.fits"))
    with pytest.raises(SolarImageError, match="pass modality='hmi' to read it all the same"):
        pipeline(mdi, 2)
    assert pipeline({"hmi": mdi}, 2).prediction.isfinite().any()  # named, it is read
    other = tiny_pipeline(sources=("aia171",), target="hmi")
    with pytest.raises(SolarImageError, match="the whole solar disk"):
        other(sdo_folder / "aia_171_cutout.fits", 2)
    both = tiny_pipeline(sources=("hmi", "aia171"), target="aia304")
    with pytest.raises(ValueError, match=r"an image of each source \(hmi, aia171\)"):
        both(archive["hmi"][0], 2)
    with pytest.raises(SolarImageError, match="within 1:00:00"):
        both({"hmi": archive["hmi"][0], "aia171": archive["aia171"][1]}, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number"),
        ({"num_samples": 1.5}, "num_samples: expected a whole number"),
        ({"batch_size": True}, "batch_size: expected a whole number"),
        ({"num_inference_steps": 1001}, "num_inference_steps: expected at most 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale: expected 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected 0 or more"),
        ({"guidance_scale": None}, "guidance_scale: expected 0 or more"),
        ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale: expected a finite number"),
        ({"generator": 42}, "generator: expected torch.Generator, one or a list of them, got 42"),
        ({"generator": [0, 1]}, "generator: expected torch.Generator"),
        ({"output_type": "pil"}, "output_type: expected one of 'pt', 'np', 'map'"),
        ({"reduce": "median"}, "reduce: expected one of 'mean', 'sample'"),
        ({"generator": seeds(3)}, "generator: expected one, or 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
        ({"output_type": "map"}, "DATE-OBS: expected an observation time"),
    ],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        tiny_pipeline()(random_images(), **{"num_inference_steps": 2, **options})


def test_counts_may_be_numpys():
    options = {"num_inference_steps": np.int64(2), "num_samples": np.int32(3), "batch_size": np.int64(2)}
    assert tiny_pipeline()(random_images(count=1), **options).samples.shape == (1, 3, SIZE, SIZE)


def test_networks_in_training_mode_give_the_images_of_loaded_ones():
    pipeline, images = tiny_pipeline("cnn"), random_images()
    expected = pipeline(images, 2, generator=seeds(2)).samples
    parts = {name: part.train() if hasattr(part, "train") else part for name, part in pipeline.components.items()}
    same = SolarChipControlNetPipeline(**parts, **pipeline.parameters)
    same.set_progress_bar_config(disable=True)
    assert not any(part.training for part in (same.autoencoder, same.unet, same.controlnet))
    assert torch.equal(same(images, 2, generator=seeds(2)).samples.nan_to_num(), expected.nan_to_num())


def test_parts_that_do_not_belong_together():
    pipeline = tiny_pipeline()
    parts, settings = pipeline.components, pipeline.parameters

    def build(**changes):
        return SolarChipControlNetPipeline(**{**parts, **settings, **changes})

    assert build().config.preparation == pipeline.config.preparation
    rates = {**pipeline.image_processor.statistics_key, "photometry": "dn_per_s"}
    row = {"mean": 0.0, "std": 1.0}
    table = {name: {**row, "unit": "G" if name == "hmi" else "DN/s"} for name in MODALITIES}
    statistics = {**rates, "source": "made up", "modalities": table}
    options = {"size": SIZE, "photometry": "dn_per_s", "statistics": statistics}
    with pytest.raises(ValueError, match="photometry: expected 'nominal', as the networks' training images"):
        build(image_processor=SolarChipImageProcessor(modalities=MODALITIES, **options))
    larger = SolarChipImageProcessor(modalities=MODALITIES, size=128)
    with pytest.raises(ValueError, match="size: expected 64, as the networks"):
        build(image_processor=larger)
    with pytest.raises(ValueError, match="latents are 4 pixels wide"):
        build(image_processor=larger, preparation=None)
    with pytest.raises(ValueError, match="preparation: expected exactly"):
        build(preparation={"photometry": "nominal"})
    with pytest.raises(ValueError, match=r"autoencoder.modalities: expected all of hmi, aia193"):
        build(target_modality="193", latent_mean={**settings["latent_mean"], "aia193": [0.0] * 32})
    with pytest.raises(ValueError, match="latent_std: expected an entry for each"):
        build(latent_std={"hmi": [1.0] * 32})
    with pytest.raises(ValueError, match="positive deviations"):
        build(latent_std={**settings["latent_std"], "hmi": [0.0] * 32})
    with pytest.raises(ValueError, match="conditioning_channels: expected 32 latent channels of 2 sources, 64"):
        build(source_modalities=["hmi", "aia304"])
    with pytest.raises(ValueError, match="so that the hint stays on the latent grid"):
        build(controlnet=type(parts["controlnet"]).from_unet(parts["unet"], conditioning_channels=32))
    with pytest.raises(ValueError, match="prior_modalities: expected None"):
        build(prior_modalities=["hmi", "aia171"])
    with pytest.raises(ValueError, match="expected source_modalities"):
        SolarChipControlNetPipeline(**parts)
    other = tiny_pipeline("cnn")
    with pytest.raises(ValueError, match=r"in_channels: expected the autoencoder's 32 latent channels, got 8"):
        build(unet=other.unet, controlnet=build_controlnet(other.unet, 32))


# Saving and loading ---------------------------------------------------------------------------------------------------

CLEAN = """
import sys
import numpy as np, torch
from solarchip_hf import SolarChipControlNetPipeline
torch.set_num_threads(1)
images, push, *folders = sys.argv[1:]
SolarChipControlNetPipeline.from_pretrained(folders[0]).push_to_hub(push)
for name in (*folders, push):
    pipeline = SolarChipControlNetPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = pipeline(np.load(images), 3, num_samples=2, generator=generators, batch_size=3, output_type="np")
    print(*pipeline.identity, pipeline.weights_digest(), output.samples.tobytes().hex())
"""
REPOSITORY = "solarchip/corona"


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Pipelines of both towers, where they were saved, and what a clean process made of those and of a Hub's."""
    folder = tmp_path_factory.mktemp("saved")
    sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
    from local_hub import LocalHub

    pipelines = [tiny_pipeline(backbone, prior_modalities=["aia171", "aia304"]) for backbone in BACKBONES]
    folders = [folder / backbone / "hmi-to-aia171" for backbone in BACKBONES]
    for pipeline, place in zip(pipelines, folders, strict=True):
        pipeline.save_pretrained(place)
    np.save(folder / "images.npy", random_images())
    with LocalHub({"hf_owner": "solarchip"}) as hub:
        command = [sys.executable, "-W", "error::UserWarning", "-c", CLEAN, str(folder / "images.npy"), REPOSITORY]
        environment = {**os.environ, **hub.environment(folder / "home", "hf_owner")}
        result = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        files, commit = hub.files(REPOSITORY), hub.repositories["model", REPOSITORY].refs["main"]
    lines = [line.split() for line in result.stdout.splitlines()]
    samples = [np.frombuffer(bytes.fromhex(line[-1]), np.float32).reshape(2, 2, SIZE, SIZE) for line in lines]
    said = [line[:-1] for line in lines]
    return pipelines, folders, list(zip(said, samples, strict=True)), files, commit


def samples_here(pipeline):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"num_samples": 2, "generator": seeds(4), "batch_size": 3, "output_type": "np"}
        return pipeline(random_images(), 3, **options).samples
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("index", [0, 1], ids=BACKBONES)
def test_saved_and_loaded_in_a_clean_process_bit_for_bit(loaded_elsewhere, index):
    pipelines, folders, results, *_ = loaded_elsewhere
    pipeline, folder, (said, samples) = pipelines[index], folders[index], results[index]
    assert np.array_equal(samples, samples_here(pipeline), equal_nan=True)
    assert np.isfinite(samples).any()
    assert said == [f"{folder.parent.name}/hmi-to-aia171", "local", pipeline.weights_digest()]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    saved = json.loads((folder / "model_index.json").read_text())
    assert saved["autoencoder"] == ["solarchip_hf.models.modeling_solarchip", "SolarChipForPreTraining"]
    assert saved["image_processor"][1] == "SolarChipImageProcessor"
    assert (saved["source_modalities"], saved["target_modality"]) == (["hmi"], "aia171")
    assert saved["prior_modalities"] == ["aia171", "aia304"]
    assert saved["preparation"] == {"photometry": "nominal", "degradation": None, "geometry": "rsun", "size": SIZE}


def test_pushed_to_a_hub_and_loaded_from_it(loaded_elsewhere):
    pipelines, _, results, files, commit = loaded_elsewhere
    said, samples = results[2]
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert np.array_equal(samples, samples_here(pipelines[0]), equal_nan=True)
    assert said == [REPOSITORY, commit, pipelines[0].weights_digest()]


def test_components_may_be_replaced_when_loading(loaded_elsewhere):
    pipelines, folders, *_ = loaded_elsewhere
    again = SolarChipControlNetPipeline.from_pretrained(folders[0], scheduler=build_scheduler("ddim"))
    assert type(again.scheduler).__name__ == "DDIMScheduler"
    assert dict(again.config.latent_mean) == dict(pipelines[0].config.latent_mean)
    other = SolarChipImageProcessor(modalities=MODALITIES, size=128)
    with pytest.raises(ValueError, match="size: expected 64, as the networks"):
        SolarChipControlNetPipeline.from_pretrained(folders[0], image_processor=other)


def test_neither_folder_nor_repository(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a saved pipeline"):
        SolarChipControlNetPipeline.from_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(FileNotFoundError, match="no such folder here"):
        SolarChipControlNetPipeline.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
