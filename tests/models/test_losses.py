"""The losses against loops written from their equations, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from solarchip_hf.models.losses import (
    CENTERING_EPS,
    MAX_LOGIT_SCALE,
    center_embeds,
    centering_statistics,
    contrastive_losses,
    kl_loss,
    make_pairs,
    reconstruction_loss,
)

TERMS = ("cls_loss", "patch_loss", "intra_loss")
WEIGHTS = {"cls_loss": 1.0, "patch_loss": 0.7, "intra_loss": 1.3}
NAMES = ("hmi", "aia171", "aia193", "aia304")


def loop_losses(embeds, observed, logit_scales, pairs, patch_mask=None, centering="none"):
    """The three terms one observation, one patch, one direction at a time; unobserved images are never touched."""
    batch, modalities, tokens, _ = embeds.shape
    images = {(b, m): embeds[b, m] for b in range(batch) for m in range(modalities) if observed[b, m]}
    if centering != "none":
        positions = [0] if centering == "class" else range(tokens)
        for m in range(modalities):
            owners = [b for b in range(batch) if (b, m) in images]
            for i in positions:
                values = [images[b, m][i] for b in owners]
                if not values:
                    continue
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / len(values)
                for b, value in zip(owners, values, strict=True):
                    rows = list(images[b, m])
                    rows[i] = (value - mean) / torch.sqrt(variance + CENTERING_EPS)
                    images[b, m] = torch.stack(rows)
    unit = {key: [row / max(row.norm(), 1e-8) for row in image] for key, image in images.items()}
    kept = [i for i in range(1, tokens) if patch_mask is None or patch_mask[i - 1]]
    scales = [torch.exp(scale) for scale in logit_scales]

    def both_directions(first, second, scale):
        logits = scale * torch.stack([torch.stack([one @ other for other in second]) for one in first])
        labels = torch.arange(len(first))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    terms = {name: [] for name in TERMS}
    for a, b in pairs:
        common = [o for o in range(batch) if (o, a) in unit and (o, b) in unit]
        if not common:
            continue
        terms["cls_loss"].append(
            both_directions([unit[o, a][0] for o in common], [unit[o, b][0] for o in common], scales[0])
        )
        by_patch = [
            both_directions([unit[o, a][i] for o in common], [unit[o, b][i] for o in common], scales[1]) for i in kept
        ]
        terms["patch_loss"].append(sum(by_patch) / len(kept))
        by_sample = [
            both_directions([unit[o, a][i] for i in kept], [unit[o, b][i] for i in kept], scales[2]) for o in common
        ]
        terms["intra_loss"].append(sum(by_sample) / len(common))
    return {name: sum(values) / len(values) for name, values in terms.items()}


def gradients(losses, *inputs):
    total = sum(WEIGHTS[name] * losses[name] for name in TERMS)
    return torch.autograd.grad(total, inputs)


def batch_of(batch=6, modalities=4, patches=5, width=7, *, missing=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(batch, modalities, 1 + patches, width, generator=generator, dtype=dtype)
    observed = torch.ones(batch, modalities, dtype=torch.bool)
    if missing:
        observed[0, 1] = observed[2, 0] = observed[3, 2] = observed[1, 3] = observed[4, 1] = False
        embeds[~observed] = float("nan")
    scales = torch.tensor([1.1, 0.4, 2.0], dtype=dtype)
    return embeds.requires_grad_(), observed, scales.requires_grad_()


@pytest.mark.parametrize("pairing", ["anchor", "all"])
@pytest.mark.parametrize("centering", ["none", "class", "tokens"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loops_in_value_and_gradient(pairing, centering, masked):
    embeds, observed, scales = batch_of()
    pairs = make_pairs(NAMES, "hmi", pairing)
    patch_mask = torch.tensor([True, False, True, True, False]) if masked else None
    ours = contrastive_losses(embeds, observed, scales, pairs=pairs, patch_mask=patch_mask, centering=centering)
    reference = loop_losses(embeds, observed, scales, pairs, patch_mask, centering)
    for name in TERMS:
        assert ours[name].item() == pytest.approx(reference[name].item(), rel=1e-6)
    (grad, grad_scales), (expected, expected_scales) = (gradients(terms, embeds, scales) for terms in (ours, reference))
    assert expected[observed].norm() > 0.01
    assert expected_scales.abs().min() > 1e-4
    torch.testing.assert_close(grad[observed], expected[observed], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad_scales, expected_scales, rtol=1e-6, atol=1e-9)
    assert (grad[~observed] == 0).all()
    if masked:
        assert (grad[:, :, 1:][:, :, ~patch_mask] == 0).all()


@pytest.mark.parametrize("max_logits", [1, 7, 13, 36, 50, 73])
@pytest.mark.parametrize("centering", ["none", "tokens"])
def test_slices_equal_the_dense_form(max_logits, centering):
    embeds, observed, scales = batch_of()
    options = {"pairs": make_pairs(NAMES, "hmi", "all"), "centering": centering}
    dense = contrastive_losses(embeds, observed, scales, **options)
    sliced = contrastive_losses(embeds, observed, scales, max_logits=max_logits, **options)
    for name in TERMS:
        assert sliced[name].item() == pytest.approx(dense[name].item(), rel=1e-12)
    for grad, expected in zip(gradients(sliced, embeds, scales), gradients(dense, embeds, scales), strict=True):
        assert expected.norm() > 0.01
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_what_an_unobserved_image_holds_changes_nothing():
    embeds, observed, scales = batch_of()
    results = []
    for filling in (float("nan"), float("inf"), -1e30, 0.3):
        filled = embeds.detach().masked_fill(~observed[..., None, None], filling).requires_grad_()
        losses = contrastive_losses(filled, observed, scales, pairs=[(0, 1), (1, 2)], centering="tokens")
        results.append([*losses.values(), *gradients(losses, filled, scales)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_pairs_without_and_with_one_common_observation():
    embeds, observed, scales = batch_of(batch=3, missing=False)
    observed[:] = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    pairs = make_pairs(NAMES, "hmi", "all")  # (0, 1) shares nothing, (0, 2) one observation, aia304 was never observed
    ours = contrastive_losses(embeds, observed, scales, pairs=pairs)
    reference = loop_losses(embeds, observed, scales, pairs)
    for name in TERMS:
        assert ours[name].item() == pytest.approx(reference[name].item(), rel=1e-6)
    grad, _ = gradients(ours, embeds, scales)
    expected, _ = gradients(reference, embeds, scales)
    assert expected.norm() > 0.01
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pairs", [[], [(0, 1)]])
def test_without_anything_to_compare_the_terms_are_zero_and_differentiable(pairs):
    embeds, observed, scales = batch_of(batch=2, modalities=2, missing=False)
    observed[:, 1] = False
    losses = contrastive_losses(embeds, observed, scales, pairs=pairs, centering="class")
    assert all(loss.item() == 0 for loss in losses.values())
    for grad in gradients(losses, embeds, scales):
        assert (grad == 0).all()


@pytest.mark.parametrize("centering", ["class", "tokens"])
def test_a_batch_of_one_is_finite(centering):
    embeds, observed, scales = batch_of(batch=1, missing=False, dtype=torch.float32)
    losses = contrastive_losses(embeds, observed, scales, pairs=[(0, 1)], centering=centering)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in gradients(losses, embeds, scales))


def test_bfloat16_and_autocast_are_computed_in_float32():
    embeds, observed, scales = batch_of(dtype=torch.float32)
    low = embeds.detach().bfloat16().requires_grad_()
    exact = contrastive_losses(low.detach().float(), observed, scales, pairs=[(0, 1)], centering="tokens")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = contrastive_losses(low, observed, scales, pairs=[(0, 1)], centering="tokens")
    for name in TERMS:
        assert ours[name].dtype == torch.float32
        assert ours[name].item() == pytest.approx(exact[name].item(), rel=1e-6)
    grad, grad_scales = gradients(ours, low, scales)
    assert grad.dtype == torch.bfloat16
    assert grad[observed].abs().sum() > 0
    assert grad_scales.abs().min() > 0


def test_the_scale_is_clamped():
    embeds, observed, _ = batch_of()
    high = torch.full((3,), MAX_LOGIT_SCALE + 1, dtype=torch.float64, requires_grad=True)
    ours = contrastive_losses(embeds, observed, high, pairs=[(0, 1)])
    bound = contrastive_losses(embeds, observed, torch.full((3,), math.log(100.0)), pairs=[(0, 1)])
    for name in TERMS:
        assert ours[name].item() == pytest.approx(bound[name].item(), rel=1e-6)
    assert (gradients(ours, high)[0] == 0).all()


def test_no_gradient_is_computed_without_grad_mode():
    embeds, observed, scales = batch_of()
    expected = contrastive_losses(embeds, observed, scales, pairs=[(0, 1)])
    with torch.no_grad():
        ours = contrastive_losses(embeds, observed, scales, pairs=[(0, 1)])
    for name in TERMS:
        assert not ours[name].requires_grad
        assert ours[name].item() == expected[name].item()


def test_centering_statistics_serve_inference():
    embeds, observed, _ = batch_of()
    for centering, positions in (("class", 1), ("tokens", 6)):
        mean, deviation, count = centering_statistics(embeds, observed, centering=centering)
        assert mean.shape == deviation.shape == (4, positions, 7)
        assert count.tolist() == observed.sum(0).tolist()
        seen = embeds.detach()[observed[:, 0], 0][:, :positions]
        torch.testing.assert_close(mean[0], seen.mean(0))
        torch.testing.assert_close(deviation[0], (seen.var(0, correction=0) + CENTERING_EPS).sqrt())
        centered = center_embeds(embeds[:, 0], mean[0], deviation[0])[observed[:, 0]]
        torch.testing.assert_close(centered[:, :positions].mean(0), torch.zeros(positions, 7, dtype=torch.float64))
        assert torch.equal(centered[:, positions:], embeds[observed[:, 0], 0][:, positions:])


def test_pairs():
    assert make_pairs(["aia171", "hmi", "aia94"], "hmi", "anchor") == [(1, 0), (1, 2)]
    assert make_pairs(["aia171", "hmi", "aia94"], None, "all") == [(0, 1), (0, 2), (1, 2)]
    assert make_pairs(["aia171"], "hmi", "anchor") == []
    with pytest.raises(ValueError, match="expected one of the modalities aia171, aia94"):
        make_pairs(["aia171", "aia94"], "hmi", "anchor")
    with pytest.raises(ValueError, match="pairing"):
        make_pairs(["aia171", "hmi"], "hmi", "random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeds": torch.zeros(2, 3, 4)}, "embeds: expected"),
        ({"observed": torch.ones(2, 3, dtype=torch.bool)}, "observed: expected shape"),
        ({"logit_scales": torch.zeros(2)}, "logit_scales"),
        ({"patch_mask": torch.ones(4, dtype=torch.bool)}, "patch_mask: expected shape"),
        ({"patch_mask": torch.zeros(5, dtype=torch.bool)}, "at least one kept patch"),
        ({"centering": "classes"}, "centering: expected"),
    ],
)
def test_bad_arguments_are_named(change, message):
    embeds, observed, scales = batch_of()
    arguments = {"embeds": embeds, "observed": observed, "logit_scales": scales, "pairs": [(0, 1)], **change}
    with pytest.raises(ValueError, match=message):
        contrastive_losses(**arguments)


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("masked", [False, True])
def test_reconstruction_equals_the_loops(kind, masked):
    generator = torch.Generator().manual_seed(0)
    ours, target = torch.randn(2, 3, 4, 6, 6, generator=generator, dtype=torch.float64)
    observed = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    pixel_mask = torch.rand(4, 6, 6, generator=generator) > 0.4 if masked else None
    target[~observed] = float("nan")
    ours[~observed] = float("inf")
    if masked:
        target[:, ~pixel_mask] = float("nan")
    ours.requires_grad_()
    loss = reconstruction_loss(ours, target, observed, kind, pixel_mask)
    expected = 0.0
    for m in range(3):
        errors = []
        for b in range(3):
            if observed[b, m]:
                difference = (ours[b, m] - target[b, m])[pixel_mask[m] if masked else slice(None)]
                errors.append((difference.abs() if kind == "l1" else difference**2).mean())
        expected = expected + sum(errors) / len(errors)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    (grad,), (reference,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, ours)
    assert reference.norm() > 0.01
    torch.testing.assert_close(grad, reference)
    assert (grad[~observed] == 0).all()


def test_reconstruction_refuses_what_does_not_fit():
    image, observed = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="kind: expected 'l1' or 'l2'"):
        reconstruction_loss(image, image, observed, "huber")
    with pytest.raises(ValueError, match="pixel_values"):
        reconstruction_loss(image, image[:, :2], observed)
    with pytest.raises(ValueError, match="pixel_mask"):
        reconstruction_loss(image, image, observed, "l1", torch.ones(3, 2, 4, dtype=torch.bool))


@pytest.mark.parametrize("pixels", [None, 1024])
def test_kl_equals_the_library_distribution(pixels):
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 2, 4, 5, 5, generator=generator, dtype=torch.float64)
    observed = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    each = torch.distributions.kl_divergence(posterior, prior).flatten(2).sum(2) / (pixels or 100)
    expected = sum(each[observed[:, m], m].mean() for m in range(2))
    mean[~observed] = logvar[~observed] = float("nan")
    mean.requires_grad_(), logvar.requires_grad_()
    loss = kl_loss(mean, logvar, observed, pixels=pixels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for grad in torch.autograd.grad(loss, (mean, logvar)):
        assert grad[observed].norm() > 1e-4
        assert (grad[~observed] == 0).all()
