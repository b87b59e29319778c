"""The observations of a gallery that look, to a pretrained SolarCHIP model, most like a given image.

    python examples/search.py solarchip/vit-base archive/ AIA20240101_0000_0171.fits --index similarity/
    python examples/search.py solarchip/vit-base prepared/0123abcd hmi.fits --modality 171 --exclude_within 5D

The gallery is a folder of FITS or JPEG2000 files or a prepared dataset. Its embeddings are kept in --index: a second
search embeds only what is new. Prints the nearest observations and draws them beside the query as a contact sheet.

The Sun of an hour ago is always the most alike, and the same active region comes next: observations within
--exclude_within of the query (27 days by default, one rotation) are left out. In another channel than the query's,
--exclude_within 0h asks for the co-temporal partner.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoImageProcessor, AutoModel

from solarchip_hf import resolve_modality
from solarchip_hf.data.durations import read_duration
from solarchip_hf.hub.command_checks import check_device, check_saved
from solarchip_hf.hub.similarity import EMBEDDINGS, ImageEmbedder, SimilarityIndex, contact_sheet
from solarchip_hf.training.figures import save_figure


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("gallery", type=Path, help="folder of files, or a prepared dataset")
    parser.add_argument("query", type=Path, help="a FITS or JPEG2000 file")
    parser.add_argument("--index", type=Path, default=Path("similarity"), help="folder of the index (%(default)s)")
    parser.add_argument("--embedding", choices=EMBEDDINGS, default="class", help="class token or mean patch (class)")
    parser.add_argument("--modality", help="channel to search (default: the query's)")
    parser.add_argument("-k", type=int, default=7, help="how many (default: 7)")
    parser.add_argument("--exclude_within", default="27D", help="leave out nearer to the query in time (27D)")
    parser.add_argument("--apart", default="0h", help="leave out nearer in time to a better answer (0h: none)")
    parser.add_argument("--figure", type=Path, default=Path("nearest.png"), help="contact sheet to write (%(default)s)")
    parser.add_argument("--note", default="", help="for the title: what the data are, as 'synthetic'")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser.parse_args(arguments)


def search(options: argparse.Namespace) -> None:
    """Brings the index up to date, asks it, prints and draws the answers."""
    if min(options.k, options.batch_size) < 1:
        raise ValueError(f"-k, --batch_size: expected at least 1, got {options.k} and {options.batch_size}.")
    if not options.query.is_file():
        raise FileNotFoundError(f"query: expected a FITS or JPEG2000 file, got {options.query}, which is none.")
    if options.index.is_file():
        raise NotADirectoryError(f"--index: expected a folder, got the file {options.index}.")
    for flag in ("exclude_within", "apart"):
        read_duration(getattr(options, flag), f"--{flag}", zero=True)
    check_device(options.device)
    check_saved(options.model, "model")
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model).to(options.device)
    embedder = ImageEmbedder(model, processor, embedding=options.embedding, batch_size=options.batch_size)
    vector, facts, image = embedder.embed_image(options.query)
    modality = resolve_modality(options.modality or facts.modality)

    index = SimilarityIndex(options.index, embedder)
    report = index.update(options.gallery, modalities=[modality])
    for reason in report["refused"]:
        print(f"refused  {reason}", file=sys.stderr)
    print(f"index    {options.index}: {report['known']} images known, {report['added']} added")
    answers = index.nearest(
        vector, modality, k=options.k, time=facts.time, exclude_within=options.exclude_within, apart=options.apart
    )
    if not answers:
        raise ValueError(
            f"gallery: expected observations of {modality} at least {options.exclude_within} from the query's time, "
            f"{facts.time:%Y-%m-%d %H:%M}, got none. Shorten --exclude_within, or search a longer archive."
        )
    query_time = pd.Timestamp(facts.time)
    print(f"query    {facts.modality} {query_time:%Y-%m-%d %H:%M:%S} {options.query}")
    captions = [f"query\n{query_time:%Y-%m-%d %H:%M}"]
    for rank, answer in enumerate(answers, 1):
        days = (answer.time - query_time) / pd.Timedelta("1D")
        place = answer.source if answer.row < 0 else f"{answer.source} row {answer.row}"
        print(f"{rank:>5}    cosine {answer.similarity:+.3f} {answer.time:%Y-%m-%d %H:%M:%S} ({days:+.1f} d) {place}")
        captions.append(f"{rank}: cosine {answer.similarity:.3f}\n{answer.time:%Y-%m-%d %H:%M} ({days:+.1f} d)")
    title = f"Most similar of {len(index.dataset(modality))} images, by {options.embedding} embedding"
    modalities = [str(facts.modality), *(answer.modality for answer in answers)]
    figure = contact_sheet(
        list(map(embedder.visible, [image, *map(index.image, answers)], modalities)),
        modalities,
        captions,
        limb=processor.geometry == "rsun",
        title=f"{title} ({options.note})" if options.note else title,
    )
    print(f"figure   {save_figure(figure, options.figure)}")


def main() -> None:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments()
    try:
        search(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"search.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
