"""The losses against their definitions, written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastadapt.models.common import losses
from tests.tolerance import EXACT


def rand(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def boxes(count: int) -> Tensor:
    return torch.rand(count, 4, dtype=torch.float64) * 0.4 + 0.1


def area(box: list[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def giou(a: list[float], b: list[float]) -> float:
    inner = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    overlap = area(inner) if inner[0] < inner[2] and inner[1] < inner[3] else 0
    union = area(a) + area(b) - overlap
    return overlap / union - (hull - union) / hull


def test_corners():
    assert losses.corners(torch.tensor([0.5, 0.4, 0.2, 0.6])).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])


def test_generalized_iou_of_known_boxes():
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4)
    others = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.5, 1.0], [2.0, 0.0, 3.0, 1.0], [0.25, 0.25, 0.75, 0.75]])
    expected = [1, 0.5 / 1.5, -1 / 3, 0.25]
    assert losses.generalized_iou(unit, others).tolist() == pytest.approx(expected)


def test_generalized_iou_is_that_of_each_pair():
    first, second = losses.corners(boxes(50)), losses.corners(boxes(50))
    expected = [giou(a, b) for a, b in zip(first.tolist(), second.tolist())]
    assert min(expected) < 0 < max(expected)
    assert losses.generalized_iou(first, second).tolist() == pytest.approx(expected, abs=1e-12)
    torch.autograd.gradcheck(losses.generalized_iou, (first.requires_grad_(), second.requires_grad_()))


def test_box_losses_are_averages_over_the_batch():
    predicted, labels = boxes(7), boxes(7)
    found = losses.box_losses(predicted, labels)
    expected = {
        "l1": sum((predicted - labels).abs().flatten().tolist()) / 7,
        "giou": sum(1 - giou(*pair) for pair in zip(*(losses.corners(b).tolist() for b in (predicted, labels)))) / 7,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.4, 1.5)])
def test_focal_loss(alpha, gamma):
    logits, labels = rand(3, 5), torch.randint(2, (3, 5)).double()
    expected = 0.0
    for x, y in zip(logits.flatten().tolist(), labels.flatten().tolist()):
        p = 1 / (1 + math.exp(-x))
        p_t, a = (p, alpha) if y else (1 - p, 1 - alpha)
        expected -= a * (1 - p_t) ** gamma * math.log(p_t) / 15
    assert losses.focal_loss(logits, labels, alpha, gamma).item() == pytest.approx(expected, abs=1e-12)
    torch.autograd.gradcheck(lambda x: losses.focal_loss(x, labels, alpha, gamma), logits)


def test_dice_loss_is_of_each_sample():
    logits, labels = rand(3, 4, 5), torch.randint(2, (3, 4, 5)).double()
    expected = 0.0
    for x, y in zip(logits.detach().flatten(1), labels.flatten(1)):
        p = x.sigmoid()
        expected += (1 - (2 * float(p @ y) + 1) / (float(p.sum() + y.sum()) + 1)) / 3
    assert losses.dice_loss(logits, labels).item() == pytest.approx(expected, abs=1e-12)
    torch.autograd.gradcheck(lambda x: losses.dice_loss(x, labels), logits)


def test_mask_loss():
    logits, labels = rand(2, 1, 3, 4), torch.randint(2, (2, 1, 3, 4)).double()
    p = logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(losses.mask_loss(logits, labels), expected, **EXACT)


def test_contrastive_loss_goes_both_ways():
    text, image, scale = rand(4, 6), rand(4, 6), rand(())
    s = scale.exp() * text @ image.T
    expected = -(s.log_softmax(1).diag().mean() + s.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(losses.contrastive_loss(text, image, scale), expected, **EXACT)


def test_sixteen_bits_are_widened():
    predicted, labels = boxes(5).bfloat16(), boxes(5).bfloat16()
    expected = losses.box_losses(predicted.float(), labels.float())
    torch.testing.assert_close(losses.box_losses(predicted, labels), expected, rtol=0, atol=0)
    logits = rand(2, 8).detach().bfloat16()
    mask = (logits > 0).bfloat16()
    for loss in (losses.focal_loss, losses.dice_loss, losses.mask_loss):
        assert torch.equal(loss(logits, mask), loss(logits.float(), mask.float()))
    assert losses.contrastive_loss(logits, logits, torch.zeros(())).dtype == torch.float32
