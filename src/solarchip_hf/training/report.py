"""What a pretraining run says and leaves behind: skipped files with reasons, metrics, retrieval table, figures."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.distributed.tensor import DTensor

from ..models.modeling_solarchip import SolarChipForPreTraining
from .controls import batches_of, compare_with_controls, embed_observations
from .figures import spread, write_figures
from .order import observations_of
from .retrieval import RetrievalTable, class_similarity, patch_disk_mask, patch_similarity, retrieval_pairs
from .trainer import SolarChipTrainer


def describe_catalog(catalog: pd.DataFrame, limit: int = 20) -> str:
    """How many files of an archive can be used, and why others cannot.

    Args:
        catalog: A table of `scan_archive`.
        limit: Most files that are named.

    Returns:
        Lines of text.
    """
    usable = catalog["usable"] & catalog["full_disk"].fillna(False).astype(bool) & catalog["modality"].notna()
    counts = ", ".join(f"{name} {count}" for name, count in catalog[usable]["modality"].value_counts().items())
    lines = [f"{len(catalog)} files, {int(usable.sum())} usable{': ' + counts if counts else ''}."]
    skipped = catalog[~usable]
    for row in skipped.head(limit).itertuples():
        lines.append(f"  skipped {Path(row.path).name}: {_reason(row)}")
    if len(skipped) > limit:
        kinds = Counter(re.sub(r"[\d.]+", "#", _reason(row)) for row in skipped.iloc[limit:].itertuples())
        lines += [f"  skipped {count} more: {kind}" for kind, count in kinds.most_common(limit)]
    return "\n".join(lines)


def _reason(row: Any) -> str:
    if isinstance(row.reason, str) and row.reason:
        name = Path(row.path).name
        return row.reason.removeprefix(f"{row.path}: ").removeprefix(f"{name}: ")
    if row.modality is None or pd.isna(row.modality):
        return "no channel of AIA and no magnetogram of HMI"
    return "shows a part of the disk only"


def describe_pairs(pairs: pd.DataFrame, labels: list[str]) -> str:
    """How many observations the files make, what each has, and how they are split in time.

    Args:
        pairs: A table of `pair_observations`.
        labels: The part of each row, as `"train"`.

    Returns:
        Lines of text.
    """
    names = list(pairs.attrs.get("modalities", []))
    counts = ", ".join(f"{name} {int(pairs[name].notna().sum())}" for name in names)
    lines = [f"{len(pairs)} observations: {counts}."]
    for label in dict.fromkeys(labels):
        times = pairs["time_nominal"][np.asarray(labels) == label]
        lines.append(f"  {label}: {len(times)}, {times.min():%Y-%m-%d %H:%M} to {times.max():%Y-%m-%d %H:%M}")
    dropped = pairs.attrs.get("report", {}).get("dropped")
    if dropped:
        text = ", ".join(f"{count} {reason}" for reason, count in dict(dropped).items() if count)
        lines += [f"  not used: {text}"] if text else []
    return "\n".join(lines)


def report_pretraining(
    trainer: SolarChipTrainer, metrics: Mapping[str, float], *, note: str = "", figures: bool = True
) -> str:
    """Writes `metrics.json`, `retrieval.md` and `figures/` beside the model that `save_model` wrote, on one process.

    Retrieval with its controls is on the held-out observations; without any, there is none, and the figures show
    training observations.

    Args:
        trainer: After training; its datasets have `metadata`, as `load_observations` gives them.
        metrics: Figures of training and evaluation.
        note: What the data are, as `"SyntheticSun"`; put into titles.
        figures: Whether to draw.

    Returns:
        Text for a terminal: the retrieval table, or a sentence that there is none.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / "retrieval.md", *sorted((folder / "figures").glob("*.png"))):  # of an earlier run
        stale.unlink(missing_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or any(isinstance(weight, DTensor) for weight in model.parameters()):
        # a sharded forward would wait for the other processes, which do not come here
        model = SolarChipForPreTraining.from_pretrained(folder).to(trainer.args.device)
    config, args = model.config, trainer.args
    train = observations_of(trainer.train_dataset) or trainer.train_dataset  # of a stream, what it reads
    shown = trainer.eval_dataset if trainer.eval_dataset is not None else train
    facts = getattr(shown, "metadata", None)
    table, similarities = None, {}
    limit = args.retrieval_gallery or args.per_device_eval_batch_size
    if trainer.eval_dataset is not None and args.retrieval_gallery:
        place = f" ({note})" if note else ""
        table, held = compare_with_controls(
            model,
            shown,
            train,
            statistics=getattr(trainer.processing_class, "statistics", None),
            metadata=facts,
            limit=limit,
            batch_size=args.per_device_eval_batch_size,
            block=args.retrieval_block,
            seed=args.seed,
            title=f"Cross-modal retrieval of the co-temporal image among held-out observations{place}",
        )
        similarities = _similarities(held, config)
    else:
        held = embed_observations(model, batches_of(shown, args.per_device_eval_batch_size, limit))
    _write_metrics(folder, metrics, table, config, note)
    if figures:
        times = list(facts["time_nominal"].iloc[: len(held["embeds"])]) if facts is not None else None
        write_figures(
            folder / "figures",
            {name: held[name].numpy() for name in ("pixel_values", "observed")},
            _reconstruct(model, held, spread(len(held["embeds"]), 3)),
            config.modalities,
            table=table,
            similarities=similarities,
            log_history=trainer.state.log_history,
            times=times,
            support=_support(trainer.processing_class, config.modalities),
            limb=getattr(trainer.processing_class, "geometry", "rsun") == "rsun",
            note=note,
        )
    return table.to_text() if table is not None and table.rows else "No held-out observations: no retrieval."


def _write_metrics(
    folder: Path, metrics: Mapping[str, float], table: RetrievalTable | None, config: Any, note: str
) -> None:
    facts = {"data": note, "modalities": config.modalities, "metrics": dict(metrics)}
    if table is not None:
        facts["retrieval"] = table.rows
        (folder / "retrieval.md").write_text(f"{table.title}\n\n{table.to_markdown()}\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")


def _similarities(held: Mapping[str, torch.Tensor], config: Any) -> dict[str, np.ndarray]:
    """Panels for the first pair that is observed throughout: class tokens and patches."""
    anchor = config.anchor_modality if config.pairing == "anchor" else None
    embeds, observed = held["embeds"], held["observed"]
    for first, second in retrieval_pairs(config.modalities, anchor):
        if not bool((observed[:, first] & observed[:, second]).all()):
            continue
        mask = patch_disk_mask(embeds.shape[2] - 1, held["pixel_values"].shape[-1], config.min_disk_fraction)
        pair = f"{config.modalities[first]} against {config.modalities[second]}"
        return {
            f"class token, {pair}": class_similarity(embeds[:, first, 0], embeds[:, second, 0]).numpy(),
            f"patches, {pair}": patch_similarity(embeds[:, first, 1:], embeds[:, second, 1:], mask).numpy(),
        }
    return {}


@torch.no_grad()
def _reconstruct(model: torch.nn.Module, held: Mapping[str, torch.Tensor], indices: list[int]) -> np.ndarray:
    device = next(model.parameters()).device
    batch = {name: held[name][indices].to(device) for name in ("pixel_values", "observed")}
    return model(**batch, return_loss=False).reconstruction.float().cpu().numpy()


def _support(processor: Any, modalities: list[str]) -> np.ndarray | None:
    if not hasattr(processor, "support"):
        return None
    masks = [processor.support(name) for name in modalities]
    full = np.ones((processor.size, processor.size), dtype=bool)
    return np.stack([full if mask is None else mask for mask in masks])


__all__ = ["describe_catalog", "describe_pairs", "report_pretraining"]
