"""The demonstration page in a real browser: synthetic and real files, bad ones, and two visitors at once."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra `space`")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")

from solarchip_hf import (  # noqa: E402
    SolarChipConfig,
    SolarChipControlNetPipeline,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarImageError,
    SyntheticSun,
)
from solarchip_hf.hub.cards import write_card  # noqa: E402
from solarchip_hf.hub.demonstration import Demonstration  # noqa: E402
from solarchip_hf.translation import build_controlnet, build_prior, build_scheduler, latent_shape  # noqa: E402

APP = Path(__file__).parents[2] / "examples" / "space" / "app.py"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MODALITIES = ["hmi", "aia171"]
WAIT = 60_000  # ms; the machine may be busy


def save_models(folder: Path) -> None:
    """A tiny encoder, flare model and translation pipeline with random weights."""
    torch.manual_seed(0)
    processor = SolarChipImageProcessor(modalities=MODALITIES, size=32)
    backbone = {
        "model_type": "solarchip_vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = SolarChipConfig(backbone_config=backbone, modalities=MODALITIES, projection_dim=16)
    autoencoder = SolarChipForPreTraining(config)
    flare = SolarChipForImageClassification(config)
    torch.nn.init.normal_(flare.classifier.output.weight)
    for name, model in (("encoder", autoencoder), ("flare", flare)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_card(folder / "flare", synthetic=True)
    shape = latent_shape(config)
    unet = build_prior(shape, base_width=32, multipliers=(1, 2), num_heads=2)
    controlnet = build_controlnet(unet, shape[0])
    statistics = {name: [1.0] * shape[0] for name in MODALITIES}
    SolarChipControlNetPipeline(
        autoencoder=autoencoder.eval(),
        unet=unet.eval(),
        controlnet=controlnet.eval(),
        scheduler=build_scheduler("unipc"),
        image_processor=processor,
        source_modalities=["hmi"],
        target_modality="aia171",
        latent_mean={name: [0.0] * shape[0] for name in MODALITIES},
        latent_std=statistics,
    ).save_pretrained(folder / "translation")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    save_models(folder)
    sun = SyntheticSun(seed=0, start="2014-02-01", days=120, size=64)
    sun.write_archive(folder / "gallery", sun.times("30D"), [*MODALITIES, "aia304"], progress=False)
    return folder


@pytest.fixture(scope="module")
def address(places):
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--port", str(port), "--cache", str(places / "cache")]
    command += [
        part for name in ("encoder", "flare", "translation", "gallery") for part in (f"--{name}", str(places / name))
    ]
    with (places / "log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}/"
            for _ in range(240):
                assert server.poll() is None, (places / "log").read_text()
                try:
                    urllib.request.urlopen(url, timeout=2).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visitors(browser, address):
    """The page as two visitors see it."""
    pages = []
    for _ in range(2):
        pages.append(browser.new_context(viewport={"width": 1280, "height": 1000}).new_page())
        pages[-1].set_default_timeout(WAIT)
        pages[-1].goto(address)
        pages[-1].wait_for_selector("#upload")
    return pages


@pytest.fixture
def page(visitors):
    return visitors[0]


def upload(page, *files):
    clear = page.locator("#upload").get_by_label("Clear")
    if clear.count():  # else the new files would join the old ones
        clear.click()
        says(page, "#facts", "Open a file first")
    page.set_input_files("#upload input[type=file]", [str(file) for file in files])


def says(page, element, words):
    page.wait_for_function(
        "([element, words]) => document.querySelector(element).innerText.includes(words)", arg=[element, words]
    )
    return page.inner_text(element)


def picture(page, element):
    """(H, W, 3) what a picture of the page shows, after it has come."""
    page.wait_for_selector(f"{element} img")
    page.wait_for_function("element => document.querySelector(element + ' img').complete", arg=element)
    with Image.open(BytesIO(page.locator(f"{element} img").first.screenshot())) as shot:
        return np.asarray(shot.convert("RGB"))


def test_from_upload_to_forecast_translation_and_neighbours(page, places):
    page.click("#forecast-run")
    says(page, "#forecast-text", "Open a file first")
    upload(page, max((places / "gallery").rglob("hmi*.fits")))
    facts = says(page, "#facts", "HMI magnetogram")
    assert "synthetic, not an observation" in facts
    assert picture(page, "#sun").std() > 20
    page.click("#forecast-run")
    said = says(page, "#forecast-text", "M or larger")
    assert "Not an operational warning" in said
    assert "This model was trained on synthetic images" in said
    assert picture(page, "#forecast-image").std() > 20
    page.get_by_role("tab", name="Translation").click()
    page.click("#translate-run")
    assert "not an observation" in says(page, "#translate-text", "AIA 171")
    assert picture(page, "#translate-image").std() > 20
    page.get_by_role("tab", name="Nearest Suns").click()
    page.click("#nearest-run")
    said = says(page, "#nearest-text", "at least 27 days away")
    assert said.count("hmi.M_720s") == 3
    assert said.count("synthetic") == 3  # and nothing of the encoder, which has no card
    assert picture(page, "#nearest-image").std() > 20


def test_real_files(page, sdo_folder):
    page.get_by_role("tab", name="Forecast").click()
    upload(page, sdo_folder / "2022_08_02__10_47_53_000__SDO_HMI_HMI_magnetogram.jp2")
    facts = says(page, "#facts", "2022-08-02")
    assert "quick-look" in facts
    assert "synthetic" not in facts
    page.click("#forecast-run")
    says(page, "#forecast-text", "2022-08-03")
    page.get_by_role("tab", name="Translation").click()
    page.click("#translate-run")
    says(page, "#translate-text", "Generated")


def test_a_file_that_is_removed_goes_with_its_answers(page, places):
    page.get_by_role("tab", name="Forecast").click()
    upload(page, min((places / "gallery").rglob("hmi*.fits")), min((places / "gallery").rglob("AIA*_0171.fits")))
    assert "HMI magnetogram" in says(page, "#facts", "AIA 171")
    page.click("#forecast-run")
    says(page, "#forecast-text", "M or larger")
    page.locator("#upload").get_by_label("Remove this file").first.click()
    page.wait_for_function("() => !document.querySelector('#facts').innerText.includes('HMI magnetogram')")
    says(page, "#facts", "AIA 171")
    assert page.inner_text("#forecast-text").strip() == ""


def test_what_cannot_be_used_is_said_kindly(page, places, tmp_path):
    page.get_by_role("tab", name="Forecast").click()
    bad = tmp_path / "bad.fits"
    bad.write_text("<!DOCTYPE html><html><body>404</body></html>")
    upload(page, bad)
    said = says(page, "#facts", "This file cannot be used")
    assert "bad.fits" in said
    assert "HTML" in said
    assert "/" not in said.replace("</", "").replace("AIA/HMI", "")
    upload(page, min((places / "gallery").rglob("AIA*_0304.fits")))
    says(page, "#facts", "AIA 304")
    page.click("#forecast-run")
    said = says(page, "#forecast-text", "does not go with the chosen file")
    assert "expected one of HMI magnetogram, AIA 171" in said
    assert "AIA 304" in said


def test_two_visitors_do_not_mix(visitors, places):
    pages = visitors
    pages[0].get_by_role("tab", name="Forecast").click()
    files = sorted((places / "gallery").rglob("hmi*.fits"))
    days = [(files[0], "2014-02-02"), (files[3], "2014-05-03")]  # valid until the day after
    for page, (file, _) in zip(pages, days, strict=True):
        upload(page, file)
    for page in pages:
        page.wait_for_selector("#sun img")
    for page in pages:
        page.click("#forecast-run")
    for page, (_, until), other in zip(pages, days, reversed(days), strict=True):
        said = says(page, "#forecast-text", "M or larger")
        assert until in said
        assert other[1] not in said
    first, second = (picture(page, "#sun") for page in pages)
    assert first.shape == second.shape
    assert (first != second).any()

    name = min((places / "gallery").rglob("AIA*_0171.fits")).name
    pages[0].click("#sample input")
    pages[0].get_by_role("option", name=name).click()
    says(pages[0], "#facts", "AIA 171")
    assert pages[0].inner_text("#forecast-text").strip() == ""  # the other file's answer is gone
    assert "HMI" in pages[1].inner_text("#facts")
    assert days[1][1] in pages[1].inner_text("#forecast-text")


def test_observations_without_a_browser(places, tmp_path):
    demonstration = Demonstration(gallery=places / "gallery", index=tmp_path / "index")
    assert demonstration.abilities == {"forecast": False, "translate": False, "nearest": False}
    hmi, aia = (sorted((places / "gallery").rglob(pattern)) for pattern in ("hmi*.fits", "AIA*_0171.fits"))
    observation = demonstration.open([aia[0], hmi[0]])
    assert list(observation.paths) == ["hmi", "aia171"]
    assert observation.describe().count("**synthetic**") == 2
    both, one = demonstration.look(observation), demonstration.look(demonstration.open([hmi[0]]))
    assert both.dtype == np.uint8
    assert both.shape[1] == 2 * one.shape[1]
    for paths, words in ((hmi[:2], "a second one of HMI magnetogram"), ([], "expected 1 to 4"), (aia * 2, "1 to 4")):
        with pytest.raises(SolarImageError, match=words) as refusal:
            demonstration.open(paths)
        assert str(places) not in str(refusal.value)


def test_models_that_are_not_there_are_said_in_a_sentence(tmp_path, places, capsys):
    main = runpy.run_path(str(APP))["main"]
    for arguments, words in (
        (["--encoder", str(tmp_path / "nowhere"), "--gallery", str(places / "gallery")], "nowhere"),
        (["--gallery", str(tmp_path)], "expected files ending in"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--cache", str(tmp_path)])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "app.py: " in said
        assert words in said
