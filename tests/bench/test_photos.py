"""Batches are photographs, in CLIP's scale, in pairs, and the same every time."""

from __future__ import annotations

import torch

from bench.photos import CLIP_MEAN, CLIP_STD, views


def test_shape_dtype_and_layout() -> None:
    batch = views(2, size=32)
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()


def test_values_are_pixels_after_clips_normalisation() -> None:
    batch = views(3, size=48)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (batch * std + mean) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-2
    assert pixels.min() > -0.5 and pixels.max() < 255.5
    assert pixels.std() > 20  # a scene, not a flat colour


def test_a_seed_fixes_the_batch() -> None:
    assert torch.equal(views(2, size=32, seed=3), views(2, size=32, seed=3))
    assert not torch.equal(views(2, size=32, seed=3), views(2, size=32, seed=4))


def test_no_two_views_are_equal_and_both_photographs_are_used() -> None:
    batch = views(2, size=32)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(batch[i], batch[j])
    means = batch.mean(dim=(2, 3))
    assert (means[:2].mean(0) - means[2:].mean(0)).abs().max() > 0.1
