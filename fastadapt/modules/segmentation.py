"""HiVG's segmentation head, which is linear, as the few vectors that it is for each sentence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadapt.core.checks import check_tensor, fail


class SegmentationHead(nn.Module):
    """Logits of a mask from image tokens and a sentence: transposed convolutions and a dot product, collapsed to one product.

        logits = <deconv_3(deconv_2(deconv_1(x))), e>,      deconv_l a ConvTranspose2d of kernel and stride 2, without bias

    (Xiao et al., "HiVG: Hierarchical Multimodal Fine-grained Modulation for Visual Grounding", ACM MM 2024, auxiliary head.)
    There is nothing between the layers, and no kernel overlaps its neighbour, so for the token x_p and the places a, b and c
    (each one of 2 x 2) that lead to a pixel

        logit(p, a, b, c) = x_p^T W_1[:, :, a] W_2[:, :, b] W_3[:, :, c] e

    The sentence is taken backwards through the weights, to 4, 16 and then 64 vectors, and one product with the tokens gives
    all pixels.  At 14 x 14 tokens of width 512 this is 28.4 million multiply-adds a sample in place of 4,316, and the backward
    keeps the 84 vectors, 0.16 MiB a sample in float32, in place of enlarged maps and a sentence spread over the last, 56.7 MiB;
    besides it keeps a copy of each weight in the products' order.

    Args:
        channels: width of the tokens and of the sentence.
        depth: transposed convolutions; the mask is 2^depth times as fine as the tokens.
        device, dtype: of the parameters, `layers[l].weight` (channels, channels, 2, 2), drawn as nn.ConvTranspose2d's.

    Values and gradients equal the long form's up to rounding.
    """

    def __init__(
        self,
        channels: int = 512,
        depth: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            fail("depth", "at least 1", depth)
        self.channels = channels
        like = {"bias": False, "device": device, "dtype": dtype}
        self.layers = nn.Sequential(*(nn.ConvTranspose2d(channels, channels, 2, 2, **like) for _ in range(depth)))

    def forward(self, tokens: Tensor, sentence: Tensor, size: tuple[int, int]) -> Tensor:
        """The logits of one mask for each sentence.

        Args:
            tokens: (B, H W, channels), places row by row.
            sentence: (B, channels).
            size: (H, W).

        Returns:
            (B, 1, 2^depth H, 2^depth W).

        Raises:
            ValueError: tokens are not H W, or a shape is not as above.
        """
        height, width = size
        check_tensor("tokens", tokens, (None, height * width, self.channels), tokens.device)
        check_tensor("sentence", sentence, (tokens.shape[0], self.channels), tokens.device)
        vectors = sentence[:, None, None]  # (B, places down, places across, channels)
        for layer in reversed(self.layers):
            vectors = torch.einsum("bhwo,ioyx->byhxwi", vectors, layer.weight).flatten(3, 4).flatten(1, 2)
        fine = vectors.shape[1]
        logits = tokens @ vectors.flatten(1, 2).transpose(1, 2)  # (B, H W, places)
        pixels = logits.unflatten(2, (fine, fine)).unflatten(1, (height, width)).transpose(2, 3)
        return pixels.flatten(3, 4).flatten(1, 2)[:, None]
