"""CLIP's transformers, cut into the pieces between which the Bridger's stages come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection


class CLIPViT(CLIPVisionModelWithProjection):
    """transformers' CLIP ViT with its projection, piece by piece; the stream is (B, 1 + places, width)."""

    def start(self, pixel_values: Tensor) -> Tensor:
        """The embedding of images (B, 3, H, W)."""
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))

    def pieces(self, ends: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """The blocks up to each of these numbers."""
        return pieces(self.vision_model.encoder.layers, ends)

    def maps(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """What the decoder reads, (B, channels, H, W), from the streams after the pieces: the last in CLIP's common space."""
        side = self.config.image_size // self.config.patch_size
        first, second, last = (level[:, 1:] for level in levels)
        last = self.visual_projection(self.vision_model.post_layernorm(last))
        return [tokens.transpose(1, 2).unflatten(2, (side, side)) for tokens in (first, second, last)]


def text_pieces(tower: CLIPTextModelWithProjection, ends: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
    """The text blocks up to each of these numbers."""
    return pieces(tower.text_model.encoder.layers, ends, is_causal=True)


def pieces(layers: nn.ModuleList, ends: Sequence[int], **options: bool) -> list[Callable[[Tensor], Tensor]]:
    """Functions of the stream that run the layers before each end, from the end before."""
    return [partial(_run, layers[first:last], options) for first, last in zip((0, *ends), ends)]


def _run(layers: Iterable[nn.Module], options: dict[str, bool], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, None, **options)
    return x
