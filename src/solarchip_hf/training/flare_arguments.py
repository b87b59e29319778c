"""Arguments of flare tuning: how much of the network learns, at which rates, and what chooses the best checkpoint."""

from dataclasses import dataclass, field

from .arguments import SolarChipTrainingArguments

TUNINGS = ("linear", "attentive", "staged", "full", "lora")
FROZEN = ("linear", "attentive")


@dataclass
class FlareTrainingArguments(SolarChipTrainingArguments):
    """Arguments of `fit_flare_model`: those of pretraining, with defaults that suit a small head.

    Defaults that differ: 30 epochs at 1e-3, short last batches are kept, no tracker, evaluation and a checkpoint every
    epoch, and the checkpoint with the largest Brier skill score on the validation part is the one that is kept. The
    gradient cache and averaged weights belong to pretraining and are refused.

    Attributes:
        tuning: What learns. `linear`: linear layers on the tokens' mean and standard deviation; `attentive`: both under
            learned attention, and a small MLP; either on a frozen backbone. `staged`: first as `attentive` for
            `frozen_epochs`, then everything. `full`: everything from the start. `lora`: low-rank updates of the
            backbone, merged into it at the end.
        backbone_learning_rate: Largest learning rate of the backbone; None: a tenth of `learning_rate` (published).
        frozen_epochs: Epochs of the first stage of `staged` (published: 20).
        lora_rank: Rank of the updates.
        lora_alpha: Their scale is `lora_alpha / lora_rank`.
        lora_dropout: Dropout before the updates.
        lora_targets: Names of the layers to update; None: the attention's projections of a ViT, the convolutions of a
            CNN.
        early_stopping: Evaluations in a row without a better score after which training ends; 0: never.
        feature_cache_gib: Most memory for cached features of a frozen backbone; where they need more, images are
            encoded anew every epoch.
        augmentation: None: `solar` where the backbone learns, `none` where it is frozen, so that features are computed
            once. `published` is refused: it confuses the limbs.
    """

    _argument_group_name = "training (with every argument of transformers' TrainingArguments)"

    output_dir: str | None = field(
        default="solarchip/flare", metadata={"help": "Folder for checkpoints, the model, its processor and the report."}
    )
    tuning: str = field(
        default="attentive",
        metadata={
            "help": "What learns: a 'linear' or 'attentive' probe on the frozen backbone; 'staged': the probe first, "
            "then everything; 'full': everything; 'lora': low-rank updates of the backbone.",
            "choices": list(TUNINGS),
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Largest learning rate of the head."})
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Largest learning rate of the backbone; default: a tenth of learning_rate."}
    )
    frozen_epochs: float = field(default=20.0, metadata={"help": "Epochs of the first stage of 'staged'."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the low-rank updates."})
    lora_alpha: float = field(default=16.0, metadata={"help": "Scale of the low-rank updates, times the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the low-rank updates."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Layers that get low-rank updates, as q_proj v_proj."}
    )
    early_stopping: int = field(
        default=0, metadata={"help": "Evaluations without a better score before training ends; 0: never."}
    )
    feature_cache_gib: float = field(
        default=8.0, metadata={"help": "Most memory for cached features of a frozen backbone, in GiB."}
    )
    augmentation: str | None = field(
        default=None,
        metadata={
            "help": "'solar' (north-south flip with the sign of the field reversed, reversed polarity, roll of a few "
            "degrees) or 'none'; default: solar where the backbone learns, none where it is frozen.",
            "choices": ["solar", "none"],
        },
    )
    num_train_epochs: float = field(default=30.0, metadata={"help": "Epochs; of 'staged', those of the second stage."})
    dataloader_drop_last: bool = field(default=False, metadata={"help": "Drop a short last batch of an epoch."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the validation part is scored."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the checkpoint with the best score."})
    metric_for_best_model: str | None = field(
        default="bss", metadata={"help": "The validation score that chooses: bss, tss, auc, hss, or loss."}
    )
    greater_is_better: bool | None = field(default=None, metadata={"help": "Follows from the score."})
    report_to: str = field(default="none", metadata={"help": "Tracker, as tensorboard, trackio or wandb; none."})
    collapse_patience: int = field(default=0, metadata={"help": "Belongs to pretraining."})

    def __post_init__(self):
        if self.tuning not in TUNINGS:
            raise ValueError(f"tuning: expected one of {', '.join(TUNINGS)}, got {self.tuning!r}.")
        if self.augmentation is None:
            self.augmentation = "none" if self.tuning in FROZEN else "solar"
        if self.augmentation == "published":
            raise ValueError(
                "augmentation: expected 'solar' or 'none' in flare tuning, got 'published': flips from east to west "
                "confuse the limb on which regions arrive with the one on which they leave."
            )
        if self.gradient_cache_chunk is not None or self.ema_decay is not None:
            raise ValueError(
                "gradient_cache_chunk and ema_decay: expected neither in flare tuning; they are pretraining's."
            )
        for name in ("frozen_epochs", "lora_rank", "lora_alpha", "feature_cache_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        for name in ("early_stopping", "backbone_learning_rate"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected zero or more, got {getattr(self, name)}.")
        if self.label_names is None:
            self.label_names = ["labels"]
        super().__post_init__()

    @property
    def backbone_rate(self) -> float:
        """Largest learning rate of the backbone."""
        return self.learning_rate / 10 if self.backbone_learning_rate is None else self.backbone_learning_rate


__all__ = ["FROZEN", "TUNINGS", "FlareTrainingArguments"]
