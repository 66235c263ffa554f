"""HiVG's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.models.common.losses import box_losses, contrastive_loss, corners, dice_loss, focal_loss

# clc: image and sentence within the batch; rtcc: tokens and sentence; mask: segmentation
WEIGHTS = {"l1": 2.0, "giou": 2.0, "clc": 1.0, "rtcc_focal": 20.0, "rtcc_dice": 2.0, "mask_focal": 20.0, "mask_dice": 2.0}


def box_masks(boxes: Tensor, size: int) -> Tensor:
    """(B, 1, size, size): 1 for the pixels whose centre lies in the box (cx, cy, w, h), 0 for the others."""
    centres = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size
    x1, y1, x2, y2 = corners(boxes).unsqueeze(-1).unbind(1)
    columns, rows = (centres >= x1) & (centres <= x2), (centres >= y1) & (centres <= y2)
    return (rows[:, None, :, None] & columns[:, None, None, :]).to(boxes.dtype)


def grounding_losses(
    boxes: Tensor,
    similarity: Tensor,
    mask_logits: Tensor,
    text: Tensor,
    image: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    mask_labels: Tensor | None,
    size: int,
) -> dict[str, Tensor]:
    """The terms of the loss, each averaged over the batch, unweighted.

    boxes, labels (B, 4); similarity (B, 1, g, g) and mask_logits (B, 1, m, m); text and image, unit vectors (B, D); mask_labels
    (B, size, size) for the pixels of what is meant, those of the box by default.
    """
    of_box = box_masks(labels, size)
    tokens = F.interpolate(of_box, similarity.shape[-2:])  # nearest
    pixels = of_box if mask_labels is None else mask_labels[:, None].to(of_box.dtype)
    fine = F.interpolate(mask_logits, (size, size), mode="bilinear", align_corners=False)
    return {
        **box_losses(boxes, labels),
        "clc": contrastive_loss(text, image, logit_scale),
        "rtcc_focal": focal_loss(similarity, tokens),
        "rtcc_dice": dice_loss(similarity, tokens),
        "mask_focal": focal_loss(fine, pixels),
        "mask_dice": dice_loss(fine, pixels),
    }
