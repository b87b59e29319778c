"""SolarChipForImageClassification: fusion, missing data, the loss, ordered classes, and loading from pretraining."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODALITIES, tiny_batch, tiny_config
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForImageClassification

from gloo_pair import on_two_processes
from solarchip_hf import SolarChipForImageClassification, SolarChipForPreTraining, SolarChipModel
from solarchip_hf.models.modeling_solarchip_classification import SolarChipStatisticsPool, classification_loss

LABELS = torch.tensor([0, 3, -1, 2])


def classifier(backbone="vit", **config) -> SolarChipForImageClassification:
    torch.manual_seed(0)
    model = SolarChipForImageClassification(tiny_config(backbone, **config))
    with torch.no_grad():  # as after some training: attention that is not flat, an open gate
        for name, parameter in model.classifier.named_parameters():
            if "score" in name or "gate" in name or "thresholds" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("backbone", ["vit", "cnn", "vae"])
@torch.no_grad()
def test_shapes_and_weights(backbone):
    model = classifier(backbone)
    pixel_values, observed = tiny_batch()
    output = model(pixel_values, observed, labels=LABELS)
    tokens = 1 + (32 // model.config.patch_size) ** 2
    assert output.logits.shape == (4, 4)
    assert output.modality_weights.shape == (4, 3)
    assert output.token_weights.shape == (4, 3, tokens)
    torch.testing.assert_close(output.modality_weights.sum(1), torch.ones(4))
    torch.testing.assert_close(output.token_weights.sum(2), observed.float())
    assert torch.equal(output.modality_weights > 0, observed)
    plain = model(pixel_values, observed, labels=LABELS, return_dict=False)
    for one, other in zip(plain, output.to_tuple(), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(plain[0], output.loss)
    assert model.config.id2label == {0: "0AB", 1: "C", 2: "M", 3: "X"}


@torch.no_grad()
def test_batch_equals_single_and_one_image_equals_one_observation():
    model = classifier()
    pixel_values, observed = tiny_batch()
    batch = model(pixel_values, observed).logits
    for row in range(4):
        single = model(pixel_values[row : row + 1], observed[row : row + 1]).logits
        torch.testing.assert_close(single, batch[row : row + 1], atol=1e-5, rtol=1e-5)
    # given modality_ids, each image is an observation of one modality, so that model(**processor([path])) works
    ids = torch.tensor([2, 0, 1, 2])
    by_id = model(pixel_values[range(4), ids][:, None], modality_ids=ids).logits
    alone = model(pixel_values, torch.nn.functional.one_hot(ids, 3).bool()).logits
    torch.testing.assert_close(by_id, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected None together with modality_ids"):
        model(pixel_values[:, :1], observed[:, :1], modality_ids=ids)


@torch.no_grad()
def test_one_modality_needs_neither_ids_nor_marks():
    model = classifier(modalities=["hmi"])
    pixel_values, _ = tiny_batch(modalities=1)
    output = model(pixel_values)
    torch.testing.assert_close(output.logits, model(pixel_values, modality_ids=[0] * 4).logits)
    assert torch.equal(output.modality_weights, torch.ones(4, 1))


@pytest.mark.parametrize("ordinal", [False, True])
def test_missing_images_change_nothing_whatever_they_hold(ordinal):
    model = classifier(ordinal=ordinal)
    pixel_values, observed = tiny_batch()
    observed[2] = False  # nothing at all was observed: only the prior remains
    labels = torch.tensor([0, 3, 1, 2])
    results = []
    for filler in (0.0, math.nan, math.inf):
        one = copy.deepcopy(model)
        inputs = torch.where(observed[:, :, None, None], pixel_values, filler).requires_grad_()
        output = one(inputs, observed, labels=labels)
        output.loss.backward()
        assert inputs.grad[~observed].abs().max() == 0
        assert inputs.grad[observed].abs().amax(dim=(1, 2)).min() > 0
        results.append((output.logits, {name: p.grad for name, p in one.named_parameters()}))
    assert results[0][0].isfinite().all()
    for logits, gradients in results[1:]:
        assert torch.equal(logits, results[0][0])
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            assert torch.equal(gradient, results[0][1][name]), name


def test_every_parameter_gets_a_gradient():
    for config in ({}, {"ordinal": True}, {"backbone": "vae"}):
        model = classifier(**config).train()
        model(*tiny_batch(), labels=LABELS).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            flat = (
                "k_proj.bias" in name or "to_k.bias" in name or (config.get("ordinal") and name.endswith("output.bias"))
            )
            assert parameter.grad.abs().max() > 0 or flat, name


# --- statistics of the tokens -----------------------------------------------------------------------------------------


def test_statistics_pool_against_a_plain_loop():
    torch.manual_seed(0)
    pool = SolarChipStatisticsPool(5).double()
    torch.nn.init.normal_(pool.score.weight)
    vectors = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 2:5] = False
    pooled, weights = pool(vectors, mask)
    assert pooled.shape == (3, 10)
    for row in range(3):
        kept = [index for index in range(7) if mask[row, index]]
        scores = {index: math.exp((vectors[row, index] @ pool.score.weight[0]).item()) for index in kept}
        for column in range(5):
            values = {index: vectors[row, index, column].item() for index in kept}
            mean = sum(scores[index] * values[index] for index in kept) / sum(scores.values())
            variance = sum(scores[index] * (values[index] - mean) ** 2 for index in kept) / sum(scores.values())
            assert pooled[row, column].item() == pytest.approx(mean)
            assert pooled[row, 5 + column].item() == pytest.approx(math.sqrt(variance), rel=1e-4)
    assert not weights[~mask].any()


def test_flat_attention_gives_plain_mean_and_deviation():
    vectors = 3 * torch.randn(4, 65, 8, generator=torch.Generator().manual_seed(0)) + 2
    pool = SolarChipStatisticsPool(8)
    torch.nn.init.zeros_(pool.score.weight)
    pooled, weights = pool(vectors)
    expected = torch.cat([vectors.mean(1), vectors.std(1, unbiased=False)], dim=-1)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(weights, torch.full((4, 65), 1 / 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tokens_have_a_finite_gradient(dtype):
    vectors = torch.full((2, 9, 4), 1.5, dtype=dtype, requires_grad=True)
    pool = SolarChipStatisticsPool(4).to(dtype)
    pooled, _ = pool(vectors)
    pooled.sum().backward()
    assert pooled[:, 4:].detach().abs().max() < 0.01
    assert vectors.grad.isfinite().all()
    assert pool.score.weight.grad.isfinite().all()


@torch.no_grad()
def test_every_modality_has_a_projection_of_its_own():
    head = classifier().classifier
    tokens = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1)
    contrastive = torch.zeros(6, 16)
    ids = [2, 0, 1, 1, 0, 2]
    features, weights = head.image_features(tokens, contrastive, ids)
    for row, index in enumerate(ids):
        one, _ = head.image_features(tokens[:1], contrastive[:1], index)
        torch.testing.assert_close(features[row : row + 1], one)
    for one, other in ((0, 1), (0, 2), (1, 2)):  # of the same tokens
        assert (features[ids.index(one)] - features[ids.index(other)]).abs().max() > 1e-2
    before = features.clone()
    head.token_projections["aia171"].weight.mul_(2)
    after, _ = head.image_features(tokens, contrastive, ids)
    changed = (after != before).any(dim=1)
    assert changed.tolist() == [index == 1 for index in ids]
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


# --- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(logits, labels, weights, gamma):
    total, norm = 0.0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        largest = max(row)
        probability = math.exp(row[label] - largest) / sum(math.exp(value - largest) for value in row)
        total += weights[label] * (1 - probability) ** gamma * -math.log(probability)
        norm += weights[label]
    return total / norm


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 8.0]])
def test_loss_against_a_plain_loop(gamma, weights):
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, 2, 3, -1, 0, 2, -1, 3])
    ours = classification_loss(logits, labels, class_weights=weights, focal_gamma=gamma)
    assert ours.item() == pytest.approx(plain_loss(logits, labels, weights or [1.0] * 4, gamma), rel=1e-5)


def test_unknown_labels_add_nothing():
    logits = torch.randn(4, 4, requires_grad=True)
    loss = classification_loss(logits, torch.full((4,), -1), focal_gamma=2.0, class_weights=[1.0] * 4)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.long), r"expected 4 integers, got \(4, 4\)"),
        (torch.zeros(4), r"expected 4 integers, got \(4,\) of torch.float32"),
        (torch.tensor([0, 4, -1, 1]), r"expected classes in 0\.\.3, or -1, got 4"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"labels: {message}"):
        classification_loss(torch.randn(4, 4), labels)


def test_config_reaches_the_loss():
    model = classifier(class_weights=[1.0, 2.0, 4.0, 8.0], focal_gamma=2.0)
    output = model(*tiny_batch(), labels=LABELS)
    expected = classification_loss(output.logits, LABELS, class_weights=[1.0, 2.0, 4.0, 8.0], focal_gamma=2.0)
    torch.testing.assert_close(output.loss, expected)
    assert not torch.isclose(output.loss, classification_loss(output.logits, LABELS))


# --- the loss on two processes ----------------------------------------------------------------------------------------

SPLITS = {"uneven": (4, 2), "a process without labels": (5, 1)}
SHARED = {"class_weights": [0.2, 1.0, 3.0, 20.0], "focal_gamma": 1.5, "classifier_dropout": 0.0}


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (*tiny_batch(6), torch.tensor([0, -1, 3, 1, 0, -1]))


def step(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    loss = model(*batch[:2], labels=batch[2]).loss
    loss.backward()
    return {"loss": loss.detach(), **{name.removeprefix("module."): p.grad for name, p in model.named_parameters()}}


def steps_of_a_process(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    results = {}
    for name, split in SPLITS.items():
        model = DistributedDataParallel(classifier(**SHARED).train())
        results[name] = step(model, tuple(tensor.split(split)[rank] for tensor in whole_batch()))
    if rank == 0:  # in evaluation a process may be alone with its batch: nothing waits for another
        model = classifier(**SHARED)
        results["evaluation"] = {"loss": model(*whole_batch()[:2], labels=whole_batch()[2]).loss.detach()}
    return results


def test_two_processes_take_the_step_of_one_with_the_whole_batch(tmp_path):
    processes = on_two_processes(steps_of_a_process, tmp_path)
    expected = step(classifier(**SHARED).train(), whole_batch())
    total = torch.cat([value.flatten() for value in expected.values()]).norm()
    assert total > 0.1
    for name in processes[1]:
        losses = [results[name]["loss"] for results in processes]
        torch.testing.assert_close(sum(losses) / 2, expected["loss"], rtol=1e-6, atol=1e-6)
        for results in processes:
            for key, value in expected.items():
                if key != "loss":
                    assert (results[name][key] - value).abs().max() < 1e-6 * max(1.0, total), (name, key)
    assert set(processes[1]) == {"uneven", "a process without labels"}
    torch.testing.assert_close(processes[0]["evaluation"]["loss"], expected["loss"])
    # what is at stake: the mean of the processes' own means points elsewhere
    halves = [
        step(classifier(**SHARED).train(), tuple(t.split((4, 2))[rank] for t in whole_batch())) for rank in (0, 1)
    ]
    ours, theirs = (torch.cat([r[k].flatten() for k in expected if k != "loss"]) for r in (expected, _mean(halves)))
    assert torch.cosine_similarity(ours, theirs, dim=0) < 0.99


def _mean(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: sum(one[key] for one in results) / len(results) for key in results[0]}


# --- ordered classes --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ordered_classes_are_proportional_odds():
    model = classifier(ordinal=True)
    head = model.classifier
    severity = torch.tensor([[-40.0], [-1.0], [0.0], [0.7], [40.0]], dtype=torch.float64)
    head.double()
    head.thresholds.copy_(torch.tensor([-0.5, -6.0, 1.0]))
    logits = head._ordered_logits(severity).double()
    steps = torch.nn.functional.softplus(head.thresholds[1:]) + 1e-3
    cuts = torch.cat([head.thresholds[:1], head.thresholds[:1] + steps.cumsum(0)])
    assert (cuts.diff() > 0).all()
    at_least = torch.sigmoid(severity - cuts)
    direct = torch.cat([1 - at_least[:, :1], at_least[:, :-1] - at_least[:, 1:], at_least[:, -1:]], dim=1)
    torch.testing.assert_close(logits.exp(), direct, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logits.softmax(1), logits.exp(), atol=1e-6, rtol=1e-5)
    assert logits.isfinite().all()  # far out in the tails, where the difference of two sigmoids is 0


@torch.no_grad()
def test_ordered_thresholds_stay_monotone_whatever_is_learnt():
    model = classifier(ordinal=True)
    pixel_values, observed = tiny_batch()
    for seed in range(5):
        model.classifier.thresholds.copy_(10 * torch.randn(3, generator=torch.Generator().manual_seed(seed)))
        probabilities = model(pixel_values, observed).logits.softmax(1)
        exceed = probabilities.flip(1).cumsum(1).flip(1)  # P(class >= k)
        assert (exceed.diff(dim=1) <= 1e-6).all()
    assert classifier(ordinal=True, num_labels=2)(pixel_values, observed).logits.shape == (4, 2)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="num_labels: expected at least 2"):
        classifier(num_labels=1)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordinal", [False, True])
@torch.no_grad()
def test_pretrained_weights_reach_the_backbone(ordinal, tmp_path):
    torch.manual_seed(3)
    pretrained = SolarChipForPreTraining(tiny_config()).train()
    pretrained(*tiny_batch())
    pretrained.eval().save_pretrained(tmp_path / "pretrained")
    model, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "pretrained", ordinal=ordinal, output_loading_info=True
    )
    assert type(model) is SolarChipForImageClassification
    assert info["unexpected_keys"] == set()
    assert info["missing_keys"] == {key for key in model.state_dict() if key.startswith("classifier.")}
    for key, value in pretrained.solarchip.state_dict().items():
        assert torch.equal(model.solarchip.state_dict()[key], value), key
    head = model.classifier
    for name, parameter in head.named_parameters():
        assert parameter.isfinite().all(), name
    assert head.contrastive_gate == 0
    assert torch.equal(head.token_pool.score.weight, torch.zeros(1, 32))
    assert head.token_projections["hmi"].weight.std() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(head.token_projections["hmi"].weight, head.token_projections["aia171"].weight)
    assert head.dense.weight.std() == pytest.approx(0.02, rel=0.3)
    if ordinal:
        assert torch.equal(head.thresholds, torch.zeros(3))
    logits = model(*tiny_batch()).logits
    model.save_pretrained(tmp_path / "tuned")
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(again(*tiny_batch()).logits, logits)
    features, info = AutoModel.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(features.towers["hmi"].projection.weight, pretrained.solarchip.towers["hmi"].projection.weight)


def rewritten(folder: Path, change) -> Path:
    """The saved weights of a folder, changed by a function of the dict."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_an_earlier_version(weights: dict[str, torch.Tensor]) -> None:
    """One projection for all modalities and a vector for each, in place of a projection for each."""
    for key in [key for key in weights if key.startswith("classifier.token_projections.")]:
        del weights[key]
    weights["classifier.token_projection.weight"] = torch.zeros(16, 32)
    weights["classifier.token_projection.bias"] = torch.zeros(16)
    for name in MODALITIES:
        weights[f"classifier.modality_embedding.{name}"] = torch.zeros(16)


TEMPERATURE = {"method": "temperature", "temperature": 1.5}


@pytest.mark.parametrize("calibration", [None, TEMPERATURE])
@pytest.mark.parametrize("modalities", [MODALITIES, ["hmi"]])
def test_a_head_of_an_earlier_version_is_refused(calibration, modalities, tmp_path):
    classifier(calibration=calibration).save_pretrained(tmp_path)
    rewritten(tmp_path, as_an_earlier_version)
    for load in (SolarChipForImageClassification, AutoModelForImageClassification):
        with pytest.raises(ValueError, match=r"token_projections.*others: classifier\.") as refused:
            load.from_pretrained(tmp_path, modalities=modalities)
        assert "Tune anew with examples/finetune_flare.py" in str(refused.value)
    model, info = SolarChipModel.from_pretrained(tmp_path, output_loading_info=True)  # the backbone is what it was
    assert not any(info.values())
    model.save_pretrained(tmp_path / "backbone")
    _, info = SolarChipForImageClassification.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert info["missing_keys"] == {key for key in classifier().state_dict() if key.startswith("classifier.")}


def test_a_calibration_wants_the_whole_head_that_it_was_fitted_on(tmp_path):
    def cut(weights):
        del weights["classifier.dense.weight"]

    classifier(calibration=TEMPERATURE).save_pretrained(tmp_path / "calibrated")
    with pytest.raises(ValueError, match=r"others: classifier\.dense\.bias, classifier\.dense\.weight, .* and 1 more"):
        SolarChipForImageClassification.from_pretrained(tmp_path / "calibrated", classifier_head="linear")
    with pytest.raises(ValueError, match=r"none for classifier\.dense\.weight: they belong"):
        SolarChipForImageClassification.from_pretrained(rewritten(tmp_path / "calibrated", cut))
    calibrated = classifier(calibration=TEMPERATURE)
    calibrated.save_pretrained(tmp_path / "calibrated")
    with pytest.raises(ValueError, match=r"none for classifier\.output\."):
        SolarChipForImageClassification.from_pretrained(
            tmp_path / "calibrated", num_labels=3, ignore_mismatched_sizes=True
        )
    classifier().save_pretrained(tmp_path / "raw")  # to be tuned on, with another head
    SolarChipForImageClassification.from_pretrained(tmp_path / "raw", classifier_head="linear")
    SolarChipForImageClassification.from_pretrained(rewritten(tmp_path / "raw", cut))


def test_a_foreign_key_of_the_head_is_reported(tmp_path):
    classifier(ordinal=True).save_pretrained(tmp_path)
    _, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, ordinal=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["unexpected_keys"] == {"classifier.thresholds"}


@torch.no_grad()
def test_a_tuned_model_of_some_modalities(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    part, info = AutoModelForImageClassification.from_pretrained(tmp_path, modalities=["hmi"], output_loading_info=True)
    assert not any(info.values())
    pixel_values, observed = tiny_batch()
    alone = torch.zeros_like(observed)
    alone[:, 0] = True
    torch.testing.assert_close(
        part(pixel_values[:, :1]).logits, model(pixel_values, alone).logits, atol=1e-5, rtol=1e-5
    )
    assert list(part.solarchip.towers) == ["hmi"]
    assert MODALITIES[0] == "hmi"


def test_a_tiny_task_is_learnt():
    """A bright patch somewhere on an otherwise noisy disk decides the class."""
    model = classifier(modalities=["hmi"], num_labels=2).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def draw(count):
        pixel_values = 0.3 * torch.randn(count, 1, 32, 32, generator=generator)
        labels = torch.randint(0, 2, (count,), generator=generator)
        for row, label in enumerate(labels):
            x, y = torch.randint(8, 20, (2,), generator=generator)
            pixel_values[row, 0, x : x + 5, y : y + 5] += 2.0 * label
        return pixel_values, labels

    for _ in range(60):
        pixel_values, labels = draw(32)
        optimizer.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        optimizer.step()
    pixel_values, labels = draw(128)
    with torch.no_grad():
        accuracy = (model.eval()(pixel_values).logits.argmax(1) == labels).double().mean()
    assert accuracy > 0.9
