"""The losses of the methods, each as its paper has it, in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) from centre and size (cx, cy, w, h) to corners (x1, y1, x2, y2)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Of each pair of boxes, corners (..., 4), overlap over union less the part of the hull that neither covers.

        GIoU = |A and B| / |A or B| - (|hull| - |A or B|) / |hull|

    (Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.)  Pairs alone: no matrix of all with all, and no
    look at the values, which would wait for the GPU.
    """
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (first, second)]
    inner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    overlap = inner.clamp(min=0).prod(-1)
    union = areas[0] + areas[1] - overlap
    hull = outer.prod(-1)
    return overlap / union - (hull - union) / hull


def box_losses(boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of boxes (B, 4) as centre and size: the absolute differences summed over a box, and 1 - GIoU, both averaged over B."""
    boxes, labels = _wide(boxes), _wide(labels)
    return {
        "l1": F.l1_loss(boxes, labels, reduction="sum") / len(boxes),
        "giou": 1 - generalized_iou(corners(boxes), corners(labels)).mean(),
    }


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of logits (B, ...), averaged over everything (Lin et al., "Focal Loss", ICCV 2017).

        p_t = p where the label is 1, 1 - p where it is 0;      loss = -alpha_t (1 - p_t)^gamma log p_t
    """
    logits, labels = _wide(logits), _wide(labels)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    p = logits.sigmoid()
    away = p * (1 - labels) + (1 - p) * labels  # 1 - p_t
    return ((alpha * labels + (1 - alpha) * (1 - labels)) * away**gamma * cross_entropy).mean()


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - (2 sum(p y) + 1) / (sum p + sum y + 1) over each sample of logits (B, ...), averaged over B."""
    p, labels = _wide(logits).sigmoid().flatten(1), _wide(labels).flatten(1)
    return (1 - (2 * (p * labels).sum(1) + 1) / (p.sum(1) + labels.sum(1) + 1)).mean()


def mask_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits with labels of the same shape, averaged over everything."""
    return F.binary_cross_entropy_with_logits(_wide(logits), _wide(labels))


def contrastive_loss(text: Tensor, image: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy within the batch: of unit vectors (B, D), each pair with itself against all others.

        (CE(S) + CE(S^T)) / 2,      S = exp(logit_scale) text image^T
    """
    logits = _wide(logit_scale).exp() * _wide(text) @ _wide(image).T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
