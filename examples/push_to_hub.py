"""Publishes a saved model, a translation pipeline or a prepared dataset on the Hub, with its card.

    hf auth login                                                            # once; or set HF_TOKEN
    python examples/push_to_hub.py solarchip/vit-base --repo_id OWNER/vit-base --private
    python examples/push_to_hub.py solarchip/vit-base --repo_id OWNER/vit-base --dry_run   # what would go up

A model takes its code along, so that `AutoModel.from_pretrained(..., trust_remote_code=True)` works where this package
is not installed. Optimiser states, pickles and logs never leave this machine. The same call after an interruption goes
on; after a change it replaces what changed, in one commit.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from solarchip_hf.hub.publish import Publication, collect, push_folder


def describe(publication: Publication) -> str:
    """What goes to the Hub, and what stays."""
    lines = [f"{len(publication.files)} files, {publication.size / 2**20:.1f} MiB, for {publication.repo_id}:"]
    for name, file in sorted(publication.files.items()):
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        lines.append(f"  {size:>14,}  {name}")
    if publication.skipped:
        lines.append(f"{len(publication.skipped)} files stay here:")
        lines += [f"  {'':>14}  {name}" for name in publication.skipped]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved model, a pipeline or a prepared dataset")
    parser.add_argument("--repo_id", help="OWNER/NAME; default: the folder's last two path components")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="push to this branch instead of main")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--no_code", action="store_true", help="leave the code out: loads with the package only")
    parser.add_argument("--endpoint", action="store_true", help="take handler.py for Inference Endpoints along")
    parser.add_argument("--dry_run", action="store_true", help="say what would go to the Hub, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Publishes; returns 0, or 2 with the reason on the standard error."""
    options = parse_arguments(argv)
    repo_id = options.repo_id or "/".join(Path(options.folder).resolve().parts[-2:])
    chosen = {"code": not options.no_code, "endpoint": options.endpoint}
    try:
        if options.dry_run:
            publication = collect(options.folder, repo_id, **chosen)
            validate_repo_id(repo_id)
            print(describe(publication))
            return 0
        publication = push_folder(
            options.folder,
            repo_id,
            private=options.private,
            revision=options.revision,
            message=options.message,
            **chosen,
        )
    except LocalTokenNotFoundError as error:
        print(f"push_to_hub.py: expected a token: run `hf auth login`, or set HF_TOKEN ({error}).", file=sys.stderr)
    except (HfHubHTTPError, HFValidationError, ValueError, OSError, RuntimeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"push_to_hub.py: {' '.join(f'{error}{cause}'.split())}", file=sys.stderr)
    else:
        print(f"{len(publication.files)} files, {publication.size / 2**20:.1f} MiB: {publication.url}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
