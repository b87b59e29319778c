"""Tuning for flares: what learns and what stays, the best checkpoint, resume, and a signal that is really found."""

import json
import os
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import errors, run
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from flare_world import TINY, flare_world, labelled_world
from solarchip_hf import SolarChipForPreTraining
from solarchip_hf.data import split_flares
from solarchip_hf.evaluation import ValidationScore
from solarchip_hf.training import (
    FlareDataCollator,
    FlareFit,
    FlareProbe,
    FlareTrainer,
    FlareTrainingArguments,
    FrozenFeatures,
    balanced_class_weights,
    best_flare_fit,
    build_flare_model,
    encode_observations,
    fit_flare_model,
    predict_flares,
)
from solarchip_hf.training.checkpoints import last_complete_checkpoint
from solarchip_hf.training.flare_features import features_gib, pooled_statistics
from solarchip_hf.training.flare_models import parse_class_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return flare_world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def parts(root):
    return split_flares(labelled_world(root), {"train": 0.6, "validation": 0.2, "test": 0.2})


@pytest.fixture(scope="module")
def score(parts):
    return ValidationScore(parts["train"].classes, "M+")


def fields(folder: Path, tuning: str) -> dict:
    return {
        "output_dir": str(folder),
        "tuning": tuning,
        "num_train_epochs": 2,
        "frozen_epochs": 2,
        "per_device_train_batch_size": 24,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }


def arguments(folder: Path, tuning: str, **overrides) -> FlareTrainingArguments:
    return FlareTrainingArguments(**{**fields(folder, tuning), **overrides})


def build(root: Path, tuning: str = "attentive", **fields):
    head = "linear" if tuning == "linear" else "mlp"
    return build_flare_model(root / "pretrained", classifier_head=head, **fields)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_features_give_the_logits_and_the_loss_of_the_images(root, parts):
    model = build(root, class_weights=[0.5, 1.0, 2.0, 7.0], focal_gamma=2.0)
    torch.nn.init.normal_(model.classifier.token_pool.score.weight)
    torch.nn.init.ones_(model.classifier.contrastive_gate)
    features = encode_observations(model, parts["validation"], batch_size=7, progress=False)
    on_features = predict_flares(model, features, progress=False)
    on_images = predict_flares(model, parts["validation"], batch_size=5, num_workers=1, progress=False)
    np.testing.assert_allclose(on_features.logits, on_images.logits, atol=1e-5)
    assert on_images.logits.std(axis=0).min() > 1e-4
    assert on_images.labels.tolist() == parts["validation"].classes.tolist() == on_features.labels.tolist()
    assert list(on_features.times) == list(parts["validation"].times)
    some = features.select([4, 1])
    assert (some.classes == parts["validation"].classes[[4, 1]]).all()
    assert torch.equal(some.tokens, features.tokens[[4, 1]])
    batch = FlareDataCollator(["hmi", "aia171"])([parts["validation"][i] for i in range(6)])
    own = torch.utils.data.default_collate([features[i] for i in range(6)])
    with torch.no_grad():
        torch.testing.assert_close(FlareProbe(model)(**own).loss, model(**batch).loss)
    needed = features_gib(model.config, len(features)) * 2**30
    assert needed == (features.tokens.numel() + features.contrastive.numel()) * 4


def test_a_standardised_probe_gives_the_same_logits_before_and_after(root, parts):
    model = build(root, ordinal=True)
    torch.nn.init.normal_(model.classifier.token_pool.score.weight)
    features = encode_observations(model, parts["train"], batch_size=16, progress=False)
    features.observed[3, 1] = False
    mean, deviation = pooled_statistics(model, features)
    with torch.no_grad():
        pooled, _ = model.classifier.pool(features.tokens)
    seen = features.observed[:, 1]
    torch.testing.assert_close(mean[1], pooled[seen, 1].mean(0))
    torch.testing.assert_close(deviation[0], pooled[:, 0].std(0).clamp_min(1e-3))
    assert deviation.min() < 0.1  # so that something is at stake
    on_images = pooled_statistics(model, parts["train"], batch_size=16)
    torch.testing.assert_close(on_images[0][0], mean[0], atol=1e-5, rtol=1e-4)

    before = weights(model)
    batch = torch.utils.data.default_collate([features[i] for i in range(12)])
    probe = FlareProbe(model)
    with torch.no_grad():
        expected = probe(**batch).logits
        probe.standardize(mean, deviation)
        torch.testing.assert_close(probe(**batch).logits, expected, atol=1e-4, rtol=1e-4)
        projection = model.classifier.token_projections["hmi"]
        assert not torch.allclose(projection.weight, before["classifier.token_projections.hmi.weight"])
        move = torch.randn(projection.weight.shape, generator=torch.Generator().manual_seed(0))
        projection.weight.add_(move)  # as a step on standardised statistics
        learnt = probe(**batch).logits
        assert (learnt - expected).abs().max() > 1e-3
        probe.fold()
        torch.testing.assert_close(FlareProbe(model)(**batch).logits, learnt, atol=1e-4, rtol=1e-3)
    step = projection.weight - before["classifier.token_projections.hmi.weight"]
    torch.testing.assert_close(step, move / deviation[0], atol=1e-4, rtol=1e-3)


def test_of_several_tries_the_best_on_validation_is_kept(root, parts, score, tmp_path):
    shared = {**fields(tmp_path, "linear"), "num_train_epochs": 3}
    tries = [{"learning_rate": 1e-9}, {"learning_rate": 1e-2}, {"learning_rate": 1e-9, "weight_decay": 1.0}]
    built = []

    def start():
        built.append(build(root, "linear"))
        return built[-1]

    fit, records = best_flare_fit(start, parts["train"], parts["validation"], shared, tries, score=score)
    assert len(built) == 3
    scores = [record["score"] for record in records]
    best = int(np.argmax(scores))
    assert fit.model is built[best]
    assert fit.best_score == scores[best] > min(scores)
    assert [record["chosen"] for record in records] == [index == best for index in range(3)]
    assert records[2]["weight_decay"] == 1.0
    for number, record in enumerate(records, 1):  # each has its own checkpoints, which a resumed one goes on from
        assert last_complete_checkpoint(tmp_path / f"try-{number}"), record
    resumed = {**shared, "resume_from_checkpoint": "last"}
    assert best_flare_fit(start, parts["train"], parts["validation"], resumed, tries, score=score)[1] == records
    with pytest.raises(ValueError, match="at least one try"):
        best_flare_fit(start, parts["train"], parts["validation"], shared, [], score=score)


def test_a_try_that_diverges_is_passed_over(root, parts, score, tmp_path, caplog):
    shared = {**fields(tmp_path, "linear"), "max_grad_norm": 0.0}
    tries = [{"learning_rate": 1e30}, {"learning_rate": 1e-3}]
    fit, records = best_flare_fit(
        lambda: build(root, "linear"), parts["train"], parts["validation"], shared, tries, score=score
    )
    assert records[0] == {"learning_rate": 1e30, "score": None, "step": 0, "chosen": False}
    assert records[1]["chosen"]
    assert fit.best_score == records[1]["score"]
    assert "try 1 left out: logits of the validation part: expected finite numbers" in caplog.text
    json.dumps(records, allow_nan=False)
    with pytest.raises(ValueError, match="finite validation score"):
        best_flare_fit(
            lambda: build(root, "linear"), parts["train"], parts["validation"], shared, tries[:1], score=score
        )


def test_a_try_without_a_finite_score_is_never_chosen(parts, tmp_path, monkeypatch):
    scores = iter([float("nan"), 0.3, 0.4, float("nan")])

    def fitted(*args, **kwargs):  # which scores a training ends with is not what is tested here
        return FlareFit(None, "bss", next(scores), 1, 1, 0.0, 1, 1, [])

    monkeypatch.setattr("solarchip_hf.training.flare_tries.fit_flare_model", fitted)
    shared = fields(tmp_path, "linear")
    fit, records = best_flare_fit(lambda: None, parts["train"], parts["validation"], shared, [{}] * 3)
    assert fit.best_score == 0.4
    assert [record["chosen"] for record in records] == [False, False, True]
    with pytest.raises(ValueError, match="finite validation score"):
        best_flare_fit(lambda: None, parts["train"], parts["validation"], shared, [{}])


@pytest.mark.parametrize("tuning", ["linear", "attentive", "staged", "full", "lora"])
def test_what_learns_and_what_stays(root, parts, score, tmp_path, tuning):
    model = build(root, tuning)
    before = weights(model)
    args = arguments(tmp_path, tuning, num_train_epochs=2 if tuning == "linear" else 1, frozen_epochs=1)
    fit = fit_flare_model(model, parts["train"], parts["validation"], args, score=score)
    assert fit.model is model
    assert not model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("classifier.output") for name in changed)
    backbone = {name for name in changed if name.startswith("solarchip.")}
    if tuning in ("linear", "attentive"):
        assert not backbone
    elif tuning == "lora":
        assert backbone
        assert all(name.rpartition(".")[0].endswith("_proj") for name in backbone)
    else:
        assert any("fc1" in name for name in backbone)
        assert any("patch_embedding" in name for name in backbone)
    if tuning == "linear":
        assert not model.classifier.token_pool.score.weight.any()
        assert not model.classifier.modality_pool.score.weight.any()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(model.state_dict()) == set(before)  # nothing of peft's is left
    assert np.isfinite(fit.best_score)
    assert fit.score_name == "bss"
    assert 0 < fit.learning <= fit.parameters
    scores = [line["eval_bss"] for line in fit.history if "eval_bss" in line]
    assert len(scores) == (2 if tuning in ("linear", "staged") else 1)
    assert fit.best_score == (scores[-1] if tuning == "staged" else max(scores))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        predict_flares(again, parts["validation"], progress=False).logits,
        predict_flares(model, parts["validation"], progress=False).logits,
        atol=1e-5,
    )


def test_the_signal_in_the_images_is_found(root, parts, score, tmp_path):
    options = {"num_train_epochs": 25, "learning_rate": 3e-3, "save_total_limit": 1}
    fit = fit_flare_model(
        build(root, modalities=["hmi"]),
        *(split_flares(labelled_world(root, ["hmi"]), {"train": 0.6, "validation": 0.2, "test": 0.2})[name]
          for name in ("train", "validation")),
        arguments(tmp_path, "attentive", **options),
        score=score,
    )  # fmt: skip
    assert fit.model.config.modalities == ["hmi"]
    test = split_flares(labelled_world(root, ["hmi"]), {"train": 0.6, "validation": 0.2, "test": 0.2})["test"]
    found = predict_flares(fit.model, test, progress=False)
    skill = score(found.logits, found.labels)
    assert skill["auc"] > 0.8
    assert skill["bss"] > 0.2


def test_the_checkpoint_with_the_best_score_is_kept(root, parts, tmp_path):
    planted = iter([0.1, 0.7, 0.3, 0.2])
    seen = []

    def score(logits, labels):
        seen.append(logits.copy())
        return {"bss": next(planted)}

    options = {"num_train_epochs": 4, "save_total_limit": 4}
    model = build(root)
    fit = fit_flare_model(
        model, parts["train"], parts["validation"], arguments(tmp_path, "attentive", **options), score=score
    )
    assert (fit.best_score, fit.best_step) == (0.7, 6)
    kept = predict_flares(model, parts["validation"], progress=False).logits
    np.testing.assert_allclose(kept, seen[1], atol=1e-5)
    assert abs(kept - seen[3]).max() > 1e-3
    assert json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["best_global_step"] == 6
    assert not list(tmp_path.rglob("*.bin"))


def test_early_stopping_and_the_loss_as_judge(root, parts, tmp_path):
    scores = iter([0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
    options = {"num_train_epochs": 6, "early_stopping": 2}
    fit = fit_flare_model(
        build(root),
        parts["train"],
        parts["validation"],
        arguments(tmp_path / "a", "attentive", **options),
        score=lambda logits, labels: {"bss": next(scores)},
    )
    assert fit.steps == 9
    by_loss = fit_flare_model(
        build(root),
        parts["train"],
        parts["validation"],
        arguments(tmp_path / "b", "attentive", metric_for_best_model="loss"),
    )
    losses = [line["eval_loss"] for line in by_loss.history if "eval_loss" in line]
    assert by_loss.best_score == min(losses)
    without = fit_flare_model(build(root), parts["train"], None, arguments(tmp_path / "c", "attentive"))
    assert np.isnan(without.best_score)
    assert without.best_step == without.steps == 6


def test_the_backbone_has_its_own_rate(root, parts, tmp_path):
    model = build(root)
    options = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    args = arguments(tmp_path, "full", learning_rate=2e-3, backbone_learning_rate=5e-5, **options)
    trainer = FlareTrainer(model, args, train_dataset=parts["train"])
    groups = trainer.create_optimizer().param_groups
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(named)
    assert all(rate == (5e-5 if name.startswith("solarchip.") else 2e-3) for name, rate in rates.items())
    assert {group["weight_decay"] for group in groups} == {0.0, args.weight_decay}
    assert arguments(tmp_path, "full", learning_rate=2e-3).backbone_rate == 2e-4


class Dying(Dataset):
    """Ends the process's run at a read, as a crash would."""

    def __init__(self, dataset, after: int):
        self.dataset, self.left, self.processor = dataset, after, dataset.processor

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.dataset[index]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(root, parts, score, tmp_path, tuning):
    whole = build(root, tuning)
    fit_flare_model(whole, parts["train"], parts["validation"], arguments(tmp_path / "whole", tuning), score=score)
    dying = Dying(parts["train"], after=len(parts["train"]) + 30)
    with pytest.raises(KeyboardInterrupt):
        fit_flare_model(
            build(root, tuning), dying, parts["validation"], arguments(tmp_path / "cut", tuning), score=score
        )
    resumed = build(root, tuning)
    args = arguments(tmp_path / "cut", tuning, resume_from_checkpoint="last")
    fit_flare_model(resumed, parts["train"], parts["validation"], args, score=score)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)


def test_staged_tuning_goes_on_behind_its_first_stage(root, parts, score, tmp_path):
    dying = Dying(parts["train"], after=len(parts["train"]) + 30)  # features take one pass
    with pytest.raises(KeyboardInterrupt):
        fit_flare_model(build(root), dying, parts["validation"], arguments(tmp_path, "staged"), score=score)
    assert (tmp_path / "frozen" / "classifier.safetensors").exists()
    assert not (tmp_path / "checkpoint-3").exists()
    model = build(root)
    args = arguments(tmp_path, "staged", resume_from_checkpoint="last")
    fit = fit_flare_model(model, parts["train"], parts["validation"], args, score=score)
    whole = build(root)
    reference = fit_flare_model(
        whole, parts["train"], parts["validation"], arguments(tmp_path / "whole", "staged"), score=score
    )
    assert len([line for line in fit.history if "eval_bss" in line]) == 2
    assert len([line for line in reference.history if "eval_bss" in line]) == 4
    assert fit.best_score == pytest.approx(reference.best_score, abs=1e-6)


@pytest.mark.parametrize("tuning", ["attentive", "staged", "full"])
def test_a_run_of_another_head_is_not_resumed(root, parts, score, tmp_path, tuning):
    options = {"num_train_epochs": 1, "frozen_epochs": 1}
    first = arguments(tmp_path, "attentive" if tuning == "staged" else tuning, **options)
    fit_flare_model(build(root), parts["train"], parts["validation"], first, score=score)
    if tuning == "staged":  # cut off behind its first stage
        (tmp_path / "frozen").mkdir()
        save_file(build(root).classifier.state_dict(), tmp_path / "frozen" / "classifier.safetensors")
        shutil.rmtree(tmp_path / "checkpoint-3")
    again = arguments(tmp_path, tuning, resume_from_checkpoint="last", **options)
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: expected weights of this.* is \(4,\) and here \(1,\)"
    ):
        fit_flare_model(build(root, ordinal=True), parts["train"], parts["validation"], again, score=score)


def test_large_features_are_not_kept(root, parts, score, tmp_path, caplog):
    cached, uncached = build(root), build(root)
    args = arguments(tmp_path / "a", "attentive", num_train_epochs=1)
    fit_flare_model(cached, parts["train"], parts["validation"], args, score=score)
    args = arguments(tmp_path / "b", "attentive", num_train_epochs=1, feature_cache_gib=1e-6)
    with caplog.at_level("WARNING"):
        fit_flare_model(uncached, parts["train"], parts["validation"], args, score=score)
    assert "computed anew every epoch" in caplog.text
    for name, value in cached.state_dict().items():  # the same training either way
        torch.testing.assert_close(uncached.state_dict()[name], value, rtol=0, atol=2e-5, msg=name)


def test_features_serve_several_heads(root, parts, score, tmp_path):
    model = build(root)
    train, validation = (encode_observations(model, parts[name], progress=False) for name in ("train", "validation"))
    assert isinstance(train, FrozenFeatures)
    results = []
    for seed in (0, 1):
        head = build_flare_model(root / "pretrained", seed=seed)
        args = arguments(tmp_path / str(seed), "attentive", seed=seed, num_train_epochs=1)
        results.append(fit_flare_model(head, train, validation, args, score=score).best_score)
    assert results[0] != results[1]
    with pytest.raises(ValueError, match="features of a frozen backbone"):
        fit_flare_model(model, train, validation, arguments(tmp_path, "full"), score=score)


def test_a_pretrained_backbone_is_loaded_and_a_scratch_one_is_not(root):
    source = SolarChipForPreTraining.from_pretrained(root / "pretrained").state_dict()
    pretrained, scratch = build(root), build(root, from_scratch=True)
    own = {name: value for name, value in pretrained.state_dict().items() if name.startswith("solarchip.")}
    assert len(own) > 20
    assert all(torch.equal(value, source[name]) for name, value in own.items())
    assert not torch.equal(_patches(scratch), _patches(pretrained))
    first, second = (_patches(build(root, from_scratch=True, seed=5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, _patches(scratch))
    named = build_flare_model("vit-tiny", from_scratch=True, modalities=["hmi"], ordinal=True, **TINY)
    assert named.config.ordinal
    assert named.config.modalities == ["hmi"]


def _patches(model) -> torch.Tensor:
    return next(value for name, value in model.state_dict().items() if name.endswith("patch_embedding.weight"))


def test_class_weights_are_of_the_training_labels():
    balanced = balanced_class_weights([0] * 6 + [1] * 3 + [2] + [-1] * 5)
    assert balanced == pytest.approx([10 / 18, 10 / 9, 10 / 3, 0.0])
    assert np.average(balanced[:3], weights=[6, 3, 1]) == pytest.approx(1)
    assert parse_class_weights(["balanced"], [0, 1, 2, 3]) == [1.0] * 4
    assert parse_class_weights(["1", "2", "3", "4.5"], [0]) == [1.0, 2.0, 3.0, 4.5]
    assert parse_class_weights(None, [0]) is None
    assert parse_class_weights(["none"], [0]) is None
    with pytest.raises(ValueError, match="'balanced' or a number"):
        parse_class_weights(["heavy"], [0])
    with pytest.raises(ValueError, match="expected labels"):
        balanced_class_weights([-1])


def test_arguments_choose_augmentation_and_refuse_what_confuses_the_limbs(tmp_path):
    assert arguments(tmp_path, "linear").augmentation == "none"
    assert arguments(tmp_path, "full").augmentation == "solar"
    assert arguments(tmp_path, "attentive", augmentation="solar").augmentation == "solar"
    for bad, message in (
        ({"augmentation": "published"}, "confuse the limb"),
        ({"gradient_cache_chunk": 4}, "neither in flare tuning"),
        ({"ema_decay": 0.9}, "neither in flare tuning"),
        ({"lora_rank": 0}, "lora_rank: expected a positive"),
        ({"early_stopping": -1}, "early_stopping: expected zero or more"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, "full", **bad)
    with pytest.raises(ValueError, match="tuning: expected one of linear, attentive"):
        arguments(tmp_path, "head")


@pytest.mark.parametrize(
    ("tuning", "change", "message"),
    [
        ("linear", {"model": "attentive"}, "classifier_head='linear'"),
        ("full", {"score": None}, "ValidationScore"),
        ("full", {"validation": []}, "at least one observation in each"),
        ("lora", {"lora_targets": ["nowhere"]}, "q_proj.*got nowhere"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_words(root, parts, score, tmp_path, tuning, change, message):
    model = build(root, change.get("model", tuning))
    options = {"lora_targets": change["lora_targets"]} if "lora_targets" in change else {}
    with pytest.raises(ValueError, match=message):
        fit_flare_model(
            model,
            parts["train"],
            change.get("validation", parts["validation"]),
            arguments(tmp_path, tuning, **options),
            score=change.get("score", score),
        )


def test_an_undefined_score_ends_in_words(root, parts, score, tmp_path):
    quiet = parts["validation"].select(parts["validation"].classes < 2)
    args = arguments(tmp_path, "attentive", metric_for_best_model="tss")
    with pytest.raises(ValueError, match="tss is undefined on the validation part"):
        fit_flare_model(build(root), parts["train"], quiet, args, score=score)


def test_lora_without_peft_says_what_to_install(root, parts, score, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"solarchip_hf\[lora\]"):
        fit_flare_model(
            build(root, "lora"), parts["train"], parts["validation"], arguments(tmp_path, "lora"), score=score
        )


@pytest.mark.parametrize(("tuning", "judged"), [("attentive", True), ("attentive", False), ("full", False)])
def test_a_training_that_diverges_ends_in_words(root, parts, tmp_path, tuning, judged):
    options = {"learning_rate": 1e30, "max_grad_norm": 0.0, "metric_for_best_model": "loss"}
    args = arguments(tmp_path, tuning, **options)
    validation = parts["validation"] if judged else None
    with pytest.raises(FloatingPointError, match=r"(logits|weights).*has diverged. Lower learning_rate \(1e\+30\)"):
        fit_flare_model(build(root), parts["train"], validation, args, score=lambda *_: {})
    assert not list(tmp_path.glob("checkpoint-*"))  # nothing of it is kept


def test_an_interrupted_probe_leaves_a_model_that_can_be_used(root, parts, tmp_path):
    class DyingFeatures(FrozenFeatures):
        def __getitem__(self, index):
            if Path(tmp_path, "checkpoint-3").exists():
                raise KeyboardInterrupt
            return super().__getitem__(index)

    model = build(root)
    whole = encode_observations(model, parts["train"], progress=False)
    features = DyingFeatures(whole.tokens, whole.contrastive, whole.observed, whole.classes)
    before = predict_flares(model, whole, progress=False).logits
    with pytest.raises(KeyboardInterrupt):  # behind an epoch that changes nothing to speak of
        fit_flare_model(model, features, None, arguments(tmp_path, "attentive", learning_rate=1e-9))
    np.testing.assert_allclose(predict_flares(model, whole, progress=False).logits, before, atol=1e-4)


def test_low_rank_updates_that_diverge_leave_the_model_as_it_was(root, parts, tmp_path):
    pytest.importorskip("peft")
    model = build(root, "lora")
    before = {name: value.clone() for name, value in weights(model).items() if name.startswith("solarchip.")}
    args = arguments(tmp_path, "lora", learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match="has diverged"):
        fit_flare_model(model, parts["train"], None, args)
    after = weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not [name for name in after if "lora" in name or "base_layer" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tuning", "options"), [("attentive", {}), ("attentive", {"feature_cache_gib": 1e-6}), ("lora", {})]
)
def test_a_checkpoint_that_is_no_model_yet_is_not_taken_for_one(root, parts, score, tmp_path, tuning, options):
    model = build(root, tuning)
    args = arguments(tmp_path, tuning, num_train_epochs=1, **options)
    fit_flare_model(model, parts["train"], parts["validation"], args, score=score)
    checkpoint = tmp_path / "checkpoint-3"
    model.config.save_pretrained(checkpoint)  # as somebody does who wants to load it
    with pytest.raises(ValueError, match="checkpoint-3: expected a saved model, got a checkpoint from the middle of a"):
        AutoModelForImageClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="finish it with resume_from_checkpoint"):
        build_flare_model(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    kept = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, weights(model)[name]) for name, value in kept.state_dict().items())


def test_full_tuning_leaves_checkpoints_that_are_models(root, parts, score, tmp_path):
    model = build(root)
    args = arguments(tmp_path, "full", num_train_epochs=1)
    fit_flare_model(model, parts["train"], parts["validation"], args, score=score)
    kept = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in weights(model).items())


def test_a_flare_model_of_an_earlier_version_is_refused_by_the_task_too(root, tmp_path):
    model = build(root)
    model.config.calibration = {"method": "temperature", "temperature": 1.5}
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(root / "pretrained").save_pretrained(tmp_path)
    assert pipeline("solar-flare-forecasting", model=str(tmp_path)).model.config.calibration
    tensors = load_file(tmp_path / "model.safetensors")
    own = [key for key in tensors if key.startswith("classifier.token_projections.")]
    tensors = {key: value for key, value in tensors.items() if key not in own}
    tensors |= {f"classifier.token_projection.{name}": torch.zeros(32) for name in ("weight", "bias")}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (lambda folder: pipeline("solar-flare-forecasting", model=str(folder)), build_flare_model):
        with pytest.raises(ValueError, match=r"others: classifier\.token_projection\.bias, .*Tune anew"):
            load(tmp_path)


# --- two processes ----------------------------------------------------------------------------------------------------


def probe_and_features(folder: Path) -> tuple[FlareProbe, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    probe = FlareProbe(build(folder, class_weights=[0.2, 1.0, 3.0, 20.0], classifier_dropout=0.0)).train()
    config = probe.config
    batch = {
        "observed": torch.ones(6, 2, dtype=torch.bool),
        "tokens": torch.randn(6, 2, 17, config.hidden_size),
        "contrastive": torch.randn(6, 2, config.projection_dim),
        "labels": torch.tensor([0, -1, 3, 1, -1, -1]),  # the last two tell nothing
    }
    return probe, batch


def gradients(probe: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in probe.named_parameters() if p.grad is not None}


def on_a_process(folder: Path, world: str) -> None:
    """A step of the probe on a part of a batch, then a tuning that ends well and one that diverges."""
    root, rank = Path(world), int(os.environ["RANK"])
    alive = {}
    wrappers = []
    wrap = DistributedDataParallel.__init__

    def remembered(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        wrappers.append(weakref.ref(self))

    DistributedDataParallel.__init__ = remembered
    parts = split_flares(labelled_world(root), {"train": 0.6, "validation": 0.2, "test": 0.2})
    score = ValidationScore(parts["train"].classes, "M+")
    for name, rate in (("ends", 1e-3), ("diverges", 1e30)):
        args = arguments(
            folder / name, "attentive", learning_rate=rate, max_grad_norm=0.0, per_device_train_batch_size=12
        )
        try:
            fit_flare_model(build(root), parts["train"], parts["validation"], args, score=score)
        except FloatingPointError:
            alive["diverged"] = True
        alive[name] = [wrapper() is not None for wrapper in wrappers]
    (folder / f"alive_{rank}.json").write_text(json.dumps(alive))
    probe, batch = probe_and_features(root)
    wrapped = DistributedDataParallel(probe, find_unused_parameters=True)
    wrapped(**{name: value.split((4, 2))[rank] for name, value in batch.items()}).loss.backward()
    torch.save(gradients(wrapped), folder / f"gradients_{rank}.pt")


@pytest.fixture(scope="module")
def two(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    codes = run(on_a_process, folder, 2, world=str(root))
    assert codes == [0, 0], errors(folder)
    return folder


def test_a_probe_on_two_processes_takes_the_step_of_one(root, two):
    probe, batch = probe_and_features(root)
    probe(**batch).loss.backward()
    expected = gradients(probe)
    assert max(value.abs().max() for value in expected.values()) > 0.01
    for rank in (0, 1):
        found = torch.load(two / f"gradients_{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_no_wrapper_outlives_a_tuning_whether_it_ends_or_diverges(two):
    for rank in (0, 1):
        alive = json.loads((two / f"alive_{rank}.json").read_text())
        assert alive == {"ends": [False], "diverges": [False, False], "diverged": True}


def test_a_named_size_without_weights_is_refused():
    with pytest.raises(ValueError, match="--from_scratch"):
        build_flare_model("vit-tiny")
