"""The Trainer: real steps of a tiny model, terms by name, accumulation, resume, retrieval, one draw a step."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import MODALITIES, STATISTICS, Blobs, Processor, arguments, tiny_model
from transformers import TrainerCallback

from solarchip_hf.models.configuration_solarchip import SolarChipConfig
from solarchip_hf.models.modeling_solarchip import SolarChipForPreTraining
from solarchip_hf.training import SolarChipDataCollator, SolarChipTrainer
from solarchip_hf.training.augmentation import AugmentationDraw
from solarchip_hf.training.trainer import LOSS_TERMS, TEMPERATURES


def test_steps_log_every_term_and_learn(tmp_path):
    trainer = SolarChipTrainer(
        tiny_model(), arguments(tmp_path, max_steps=60, logging_steps=5), train_dataset=Blobs(64)
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 12
    names = set(LOSS_TERMS) - {"kl_loss"}
    assert all(names | set(TEMPERATURES) | {"grad_norm", "learning_rate"} <= set(line) for line in lines)
    config = trainer.model.config
    for line in lines:
        assert line["loss"] == pytest.approx(
            sum(getattr(config, f"{name}_weight") * line[name] for name in names), rel=1e-3
        )
        assert line["cls_temperature"] == pytest.approx(0.07, rel=0.3)
    for name in names - {"intra_loss"}:
        assert lines[-1][name] < 0.9 * lines[0][name], name


def test_evaluation_gives_terms_and_retrieval_on_every_held_out_observation(tmp_path):
    trainer = SolarChipTrainer(
        tiny_model(),
        arguments(tmp_path, max_steps=120, learning_rate=5e-3),
        train_dataset=Blobs(256),
        eval_dataset=Blobs(21, seed=1),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_patch_loss"] < before["eval_patch_loss"]
    assert after["eval_reconstruction_loss"] < before["eval_reconstruction_loss"]
    assert after["eval_patch_recall@1"] > 3 * after["eval_retrieval_chance@1"]
    assert after["eval_patch_recall@1"] > 2 * before["eval_patch_recall@1"]
    rows = {(row["method"], row["pair"]): row for row in trainer.retrieval_table.rows}
    assert rows["patch similarity", "hmi / aia171"]["gallery"] == 21  # two batches of 8 and a short one
    assert rows["patch similarity", "hmi / aia304"]["gallery"] == 16  # five are missing
    assert after["eval_loss"] == pytest.approx(
        sum(
            getattr(trainer.model.config, f"{name}_weight") * after[f"eval_{name}"]
            for name in LOSS_TERMS
            if f"eval_{name}" in after
        ),
        rel=1e-4,
    )


def test_evaluation_draws_nothing_and_changes_nothing(tmp_path):
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path), eval_dataset=Blobs(10, seed=1))
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_cls_loss"] == second["eval_cls_loss"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())


def test_gallery_limit_and_no_retrieval(tmp_path):
    held = Blobs(20, seed=1, missing=False)
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path, retrieval_gallery=11), eval_dataset=held)
    assert trainer.evaluate()["eval_retrieval_chance@1"] == pytest.approx(1 / 11)
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path, retrieval_gallery=0), eval_dataset=held)
    assert not [key for key in trainer.evaluate() if "recall" in key]


def test_accumulated_gradient_is_the_mean_over_micro_steps(tmp_path):
    """The Trainer must divide by the accumulation steps itself, whatever the model's signature looks like."""
    data = Blobs(32, missing=False)
    gradients = {}
    for steps, batch in ((4, 8), (1, 8)):
        model = tiny_model()
        seen = []

        class Spy(SolarChipTrainer):
            def _clip_grad_norm(self, model, seen=seen):
                seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
                return super()._clip_grad_norm(model)

        options = {"max_steps": 1 if steps == 4 else 4, "learning_rate": 0.0, "augmentation": "none"}
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, weight_decay=0.0, **options
        )
        Spy(model, args, train_dataset=data).train()
        gradients[steps] = seen
    assert len(gradients[4]) == 1
    assert len(gradients[1]) == 4
    torch.testing.assert_close(gradients[4][0], torch.stack(gradients[1]).mean(0), rtol=1e-4, atol=1e-6)
    assert gradients[4][0].norm() > 1e-3


def test_one_draw_a_micro_step_on_the_whole_batch(tmp_path):
    class Recorder(SolarChipTrainer):
        draws: list = []  # noqa: RUF012

        def augment(self, inputs):
            result = super().augment(inputs)
            self.draws.append((self._micro_key, self.augmentation.draw(self.args.seed, *self._micro_key)))
            expected = self.augmentation.apply(inputs["pixel_values"], self.draws[-1][1])
            torch.testing.assert_close(result["pixel_values"], expected, equal_nan=True)
            return result

    trainer = Recorder(
        tiny_model(),
        arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3),
        train_dataset=Blobs(64),
        processing_class=Processor(),
    )
    trainer.train()
    assert [key for key, _ in trainer.draws] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({draw for _, draw in trainer.draws}) == 6
    assert trainer.augmentation.shifts == [pytest.approx(2 * 0.2 / 1.1), None, None]
    assert AugmentationDraw() not in [draw for _, draw in trainer.draws]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_ends_with_the_weights_of_the_undisturbed_one(tmp_path, accumulation):
    data = Blobs(40)
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8,
    }
    whole = SolarChipTrainer(tiny_model(), arguments(tmp_path / "whole", **options), train_dataset=data)
    whole.train()
    again = SolarChipTrainer(tiny_model(seed=9), arguments(tmp_path / "again", **options), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, resumed = whole.model.state_dict(), again.model.state_dict()
    start = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert not torch.equal(start["logit_scales"], expected["logit_scales"])
    assert set(expected) == set(resumed)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


class Poison(TrainerCallback):
    """Makes a weight no number behind the third step, as a division by zero would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).data.view(-1)[0] = torch.nan


def test_a_diverged_training_ends_in_words_and_leaves_the_good_checkpoints(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    poisoned = {"train_dataset": Blobs(24), "callbacks": [Poison()]}
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path, **options), **poisoned)
    with pytest.raises(
        FloatingPointError, match=r"weights: .*at step 4: the training has diverged. Lower learning_rate"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    unsaved = SolarChipTrainer(tiny_model(), arguments(tmp_path, max_steps=6, save_strategy="no"), **poisoned)
    with pytest.raises(FloatingPointError, match="at step 6"):
        unsaved.train()
    spoiled = SolarChipTrainer(
        tiny_model(), arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=Blobs(24)
    )
    statistics = next(each for each in spoiled.model.buffers() if each.is_floating_point())
    statistics.view(-1)[0] = torch.inf  # of the running centring, which no gradient mends
    with pytest.raises(FloatingPointError, match="at step 2"):
        spoiled.train()
    wild = arguments(tmp_path, max_steps=6, save_strategy="no", learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match=r"Lower learning_rate \(1e\+30\) or max_grad_norm \(0.0\)"):
        SolarChipTrainer(tiny_model(), wild, train_dataset=Blobs(24)).train()


def test_saved_folder_holds_model_and_processor(tmp_path):
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path), processing_class=Processor())
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text()) == STATISTICS
    assert json.loads((tmp_path / "saved" / "training_args.json").read_text())["augmentation"] == "solar"
    assert not list((tmp_path / "saved").glob("*.bin"))
    loaded = SolarChipForPreTraining.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


def test_arguments_refuse_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns"):
        arguments(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="augmentation: expected one of solar, published, none"):
        arguments(tmp_path, augmentation="mirror")
    with pytest.raises(ValueError, match="retrieval_block"):
        arguments(tmp_path, retrieval_block=0)
    assert isinstance(
        SolarChipTrainer(tiny_model(), arguments(tmp_path)).data_collator,
        SolarChipDataCollator,
    )


def test_vae_logs_and_weighs_its_divergence(tmp_path):
    pytest.importorskip("diffusers")
    backbone = {
        "model_type": "solarchip_cnn",
        "image_size": 32,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "latent_channels": 8,
        "layers_per_block": 1,
        "double_z": True,
    }
    torch.manual_seed(0)
    model = SolarChipForPreTraining(
        SolarChipConfig(backbone_config=backbone, modalities=MODALITIES, projection_dim=8, kl_loss_weight=0.5)
    )
    args = arguments(tmp_path, max_steps=2, logging_steps=1)
    trainer = SolarChipTrainer(model, args, train_dataset=Blobs(16), eval_dataset=Blobs(8, seed=1))
    trainer.train()
    line = next(line for line in trainer.state.log_history if "kl_loss" in line)
    assert line["kl_loss"] > 0
    assert line["loss"] == pytest.approx(
        sum(getattr(model.config, f"{name}_weight") * line[name] for name in LOSS_TERMS), rel=1e-3
    )
    assert trainer.evaluate()["eval_kl_loss"] > 0
