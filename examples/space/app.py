"""A Gradio page on SolarCHIP: pick or upload an observation, see the Sun, a forecast, a translation, its neighbours.

    python examples/space/app.py --encoder solarchip/vit-tiny --flare solarchip/flare-vit-tiny \
        --translation solarchip/hmi-to-aia171 --gallery archive/

On a Space the same comes from the variables SOLARCHIP_ENCODER, SOLARCHIP_FLARE, SOLARCHIP_TRANSLATION and
SOLARCHIP_GALLERY. What has no model has no tab. Without a gallery, a synthetic Sun is drawn as FITS files. Runs on a
CPU; what a visitor opens stays in that visitor's session, and computations take turns.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from solarchip_hf import SyntheticSun
from solarchip_hf.data.catalog import SUFFIXES
from solarchip_hf.hub.demonstration import Demonstration, OpenedObservation
from solarchip_hf.models.headers import SolarImageError

logger = logging.getLogger("space")

INTRODUCTION = """# SolarCHIP
Images of the Solar Dynamics Observatory, as a model that was pretrained on them sees them. Pick a file of the gallery,
or upload FITS or JPEG2000 files of AIA and HMI: one, or several of one moment. Nothing here is an operational warning,
and a generated image is not an observation."""
FONTS = ["system-ui", "sans-serif"]
EVENTS = {"C or larger": "c_plus", "M or larger": "m_plus", "X": "x_plus"}
FIRST = "Open a file first."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, with the environment's variables as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("encoder", "pretrained model, for the nearest neighbours"),
        ("flare", "flare model"),
        ("translation", "translation pipeline"),
        ("gallery", "folder of FITS or JPEG2000 files to pick from (default: a synthetic one)"),
    ):
        parser.add_argument(f"--{name}", default=os.environ.get(f"SOLARCHIP_{name.upper()}"), help=what)
    parser.add_argument("--cache", default=os.environ.get("SOLARCHIP_CACHE"), help="folder for what is computed once")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to serve at")
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), help="port")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace) -> Demonstration:
    """The models and the gallery; draws a synthetic one where none is given."""
    cache = Path(options.cache or tempfile.mkdtemp(prefix="solarchip-space-"))
    gallery = Path(options.gallery) if options.gallery else cache / "synthetic"
    if not options.gallery:
        sun = SyntheticSun(seed=0, start="2014-01-01", days=120, size=256)
        sun.write_archive(gallery, sun.times("30D"), ["hmi", "aia171", "aia304"], progress=False)
    return Demonstration(
        gallery=gallery,
        index=cache / "index",
        encoder=options.encoder,
        flare=options.flare,
        translation=options.translation,
    )


def guarded(show: Callable[..., tuple[Any, str]]) -> Callable[..., tuple[Any, str]]:
    """Turns what cannot be done into a message on the page, and what should not happen into one without its innards."""

    def run(observation: OpenedObservation | None, *settings: Any) -> tuple[Any, str]:
        if observation is None:
            return None, FIRST
        try:
            return show(observation, *settings)
        except SolarImageError as error:
            return None, f"**This does not go with the chosen file.** {error}"
        except Exception:  # a visitor gets a sentence, the log the whole story
            logger.exception("a computation failed")
            return None, "**Something went wrong here.** It is in the log of the page; please try another file."

    return run


def build(demonstration: Demonstration) -> gr.Blocks:
    """The page."""

    def open_files(files: list[str] | str | None) -> tuple[OpenedObservation | None, Any, str]:
        if not files:
            return None, None, FIRST
        try:
            observation = demonstration.open([files] if isinstance(files, str) else files)
            return observation, demonstration.look(observation), observation.describe()
        except (SolarImageError, OSError) as error:
            return None, None, f"**This file cannot be used.** {error}"

    def open_sample(name: str | None) -> tuple[OpenedObservation | None, Any, str]:
        return open_files(demonstration.samples.get(name or ""))

    abilities = demonstration.abilities
    # Uploads and pictures are deleted when an hour old.
    with gr.Blocks(title="SolarCHIP", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        opened = gr.State(None)  # of this visitor alone
        with gr.Row():
            with gr.Column(scale=1):
                sample = gr.Dropdown(list(demonstration.samples), value=None, label="Gallery", elem_id="sample")
                upload = gr.File(
                    file_count="multiple", file_types=list(SUFFIXES), label="or your own files", elem_id="upload"
                )
                facts = gr.Markdown(FIRST, elem_id="facts")
            with gr.Column(scale=2):
                sun = gr.Image(show_label=False, format="png", interactive=False, elem_id="sun")
        results: list[Any] = []
        running: list[Any] = []

        def panel(key: str, button: str, settings: list[Any], show: Callable[..., tuple[Any, str]]) -> None:
            start = gr.Button(button, variant="primary", elem_id=f"{key}-run")
            image = gr.Image(show_label=False, format="png", interactive=False, elem_id=f"{key}-image")
            text = gr.Markdown(elem_id=f"{key}-text")
            # One computation at a time for all visitors: the page shall answer on two cores.
            start.click(guarded(show), [opened, *settings], [image, text], concurrency_limit=1, concurrency_id="models")
            results.extend([image, text])

        with gr.Tabs():
            if abilities["forecast"]:
                with gr.Tab("Forecast"):
                    event = gr.Radio(list(EVENTS), value="M or larger", label="Explain", elem_id="event")
                    panel(
                        "forecast",
                        "Forecast",
                        [event],
                        lambda opened, name: demonstration.forecast(opened, event=EVENTS[name]),
                    )
            if abilities["translate"]:
                with gr.Tab("Translation"):
                    samples = gr.Slider(2, 8, value=4, step=1, label="Samples")
                    steps = gr.Slider(4, 40, value=20, step=1, label="Steps")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                    panel(
                        "translate",
                        "Generate",
                        [samples, steps, seed],
                        lambda opened, count, steps, seed: demonstration.translate(
                            opened, num_samples=int(count), num_inference_steps=int(steps), seed=int(seed)
                        ),
                    )
            if abilities["nearest"]:
                with gr.Tab("Nearest Suns"):
                    spans = [("27 days (one rotation)", "27D"), ("5 days", "5D"), ("any", "0h")]
                    away = gr.Radio(spans, value="27D", label="At least so far away in time")
                    panel(
                        "nearest",
                        "Search",
                        [away],
                        lambda opened, span: demonstration.nearest(opened, exclude_within=span),
                    )

        shown = [opened, sun, facts]
        for source, other, action, handler in (
            (sample, upload, sample.input, open_sample),
            (upload, sample, upload.upload, open_files),
            (upload, sample, upload.delete, open_files),
        ):
            # What was asked or answered of another file goes first, so that no answer stands beside the wrong Sun.
            action(lambda: [None] * (1 + len(results)), None, [other, *results], cancels=running, queue=False).then(
                handler, source, shown, concurrency_limit=1, concurrency_id="models"
            )
        emptied = [None, None, FIRST, *[None] * len(results)]
        upload.clear(lambda: emptied, None, [*shown, *results], cancels=running, queue=False)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Serves the page; what cannot be loaded ends in one sentence and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = parse_arguments(arguments)
    try:
        page = build(load(options))
    except (ImportError, OSError, ValueError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        sys.exit(2)
    page.queue(max_size=32).launch(
        server_name=options.host,
        server_port=options.port,
        max_file_size="128mb",
        footer_links=[],
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
    )


if __name__ == "__main__":
    main()
