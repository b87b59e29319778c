"""Features of FITS or JPEG2000 files from a pretrained SolarCHIP model.

    python examples/extract_features.py solarchip/vit-base AIA20240101_0000_0171.fits AIA20240101_0000_0304.fits
    python examples/extract_features.py solarchip/vit-base archive/ --output features.safetensors --tokens

Prints one line a file and, with --output, writes a safetensors file: `pooler_output` (N, hidden), the class tokens, and
with --tokens `last_hidden_state` (N, 1+L, hidden); file names, channels and times are in its metadata. A file that
cannot be used is reported with its reason and does not stop the others.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from solarchip_hf import SolarImageError
from solarchip_hf.data.catalog import find_image_files
from solarchip_hf.hub.command_checks import check_device, check_saved


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a saved model, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", type=Path, help="FITS or JPEG2000 files, or folders that hold them")
    parser.add_argument("--output", type=Path, help="safetensors file to write")
    parser.add_argument("--tokens", action="store_true", help="write all tokens too, not only the class token")
    parser.add_argument("--batch_size", type=int, default=4, help="images a step (default: 4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    return parser.parse_args(arguments)


def extract(options: argparse.Namespace) -> int:
    """Runs the model over the files; returns the exit status (0 all used, 1 some refused, 2 none usable)."""
    if options.batch_size < 1:
        raise ValueError(f"--batch_size: expected at least 1, got {options.batch_size}.")
    if options.output and (options.output.is_dir() or not options.output.absolute().parent.is_dir()):
        raise FileNotFoundError(f"--output: expected a file in a folder that exists, got {options.output}.")
    check_device(options.device)
    check_saved(options.model, "model")
    refused: list[str] = []
    files = find_image_files(options.inputs, refused)
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model).to(options.device).eval()

    records: list[dict] = []
    class_tokens: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    pending: list[tuple[dict, dict]] = []

    @torch.no_grad()
    def flush() -> None:
        batch = {key: torch.cat([inputs[key] for inputs, _ in pending]).to(options.device) for key in pending[0][0]}
        outputs = model(**batch)
        class_tokens.append(outputs.pooler_output.float().cpu())
        if options.tokens:
            tokens.append(outputs.last_hidden_state.float().cpu())
        records.extend(record for _, record in pending)
        pending.clear()

    for file in tqdm(files, desc="features", unit="file", disable=not sys.stderr.isatty()):
        try:
            inputs, headers = processor([file], return_tensors="pt", return_headers=True)
        except (SolarImageError, OSError) as error:
            refused.append(str(error))
            continue
        header = headers[0]
        pending.append((dict(inputs), {"file": str(file), "modality": header.modality, "time": str(header.time)}))
        if len(pending) == options.batch_size:
            flush()
    if pending:
        flush()

    for reason in refused:
        print(f"refused  {reason}", file=sys.stderr)
    if not records:
        print("No file could be used.", file=sys.stderr)
        return 2
    features = {"pooler_output": torch.cat(class_tokens)}
    if options.tokens:
        features["last_hidden_state"] = torch.cat(tokens)
    for record in records:
        print(f"{record['modality']:<8} {record['time']:<34} {record['file']}")
    for name, values in features.items():
        print(f"{name}: {tuple(values.shape)}, finite: {bool(values.isfinite().all())}")
    if options.output:
        partial = options.output.with_name(options.output.name + ".partial")
        save_file(features, partial, metadata={"model": str(options.model), "files": json.dumps(records)})
        os.replace(partial, options.output)
        print(f"written: {options.output}")
    return 1 if refused else 0


def main() -> None:
    """Runs the command; bad input ends in one sentence and status 2."""
    options = parse_arguments()
    try:
        sys.exit(extract(options))
    except (OSError, ValueError) as error:
        print(f"extract_features.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
