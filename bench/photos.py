"""Batches of real photographs: random crops and mirror images of the two that scikit-learn carries."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
AREA = (0.2, 1.0)  # of the photograph that a crop covers
ASPECT = (3 / 4, 4 / 3)  # width over height of a crop


def views(pairs: int, size: int = 224, seed: int = 0) -> Tensor:
    """Two views of each of `pairs` scenes: float32 (2 * pairs, 3, size, size), CLIP's normalisation; rows 2 i and 2 i
    + 1 match.

    A scene is a crop of a photograph; its views are crops of that crop, resized, each mirrored or not.
    """
    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    scenes = [_crop(photographs[i % len(photographs)], rng) for i in range(pairs)]
    pixels = np.stack([_view(scene, size, rng) for scene in scenes for _ in range(2)])
    normalised = (pixels / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).float().contiguous()


def _view(scene: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    view = _crop(scene, rng).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view)


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random part: AREA of the image, ASPECT uniform in its logarithm, cut to fit."""
    area = rng.uniform(*AREA) * image.width * image.height
    aspect = math.exp(rng.uniform(*np.log(ASPECT)))
    width = min(image.width, round(math.sqrt(area * aspect)))
    height = min(image.height, round(math.sqrt(area / aspect)))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return image.crop((left, top, left + width, top + height))
