"""ETRIS's Bridger in plain PyTorch, for the arms that do without the fused operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import Bridger


class EagerBridger(Bridger):
    """`fastadapt.Bridger` on SDPA, linears and batch norms, as torch's autograd takes them."""

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_blocks: Sequence[Callable[[Tensor], Tensor]],
        text_blocks: Sequence[Callable[[Tensor], Tensor]],
        key_padding_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        levels, previous = [], None
        for stage, visual_block, text_block in zip(self.stages, visual_blocks, text_blocks):
            visual, text = visual_block(visual), text_block(text)
            v, t = self.zoom_in(stage.zoom, visual), stage.text_in(text)
            if previous is not None:
                v, t = stage.visual_norm(v + previous[0]), stage.text_norm(t + previous[1])
            previous = v, t
            found = self.interact(stage.interaction, v, t, key_padding_mask)
            visual, text = self.zoom_out(stage.zoom, found[0], visual), text + stage.text_out(found[1])
            levels.append(visual)
        return levels, text

    def zoom_in(self, zoom: nn.Module, visual: Tensor) -> Tensor:
        """(B, N, ladder_dim)"""
        if visual.ndim == 4:
            return zoom.zoom_in(visual)
        return _normed(zoom.inward, F.linear(visual[:, 1:], zoom.inward.weight))

    def zoom_out(self, zoom: nn.Module, tokens: Tensor, visual: Tensor) -> Tensor:
        """The stream with the update of the tokens."""
        if visual.ndim == 4:
            return zoom.zoom_out(tokens, visual)
        update = _normed(zoom.outward, F.linear(tokens, zoom.outward.weight))
        return torch.cat([visual[:, :1], visual[:, 1:] + update], 1)

    def interact(self, interaction: nn.Module, v: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What becomes of (B, N, ladder_dim) and (B, L, ladder_dim)."""
        if not hasattr(interaction, "attentions"):
            return interaction(v, t, mask)
        of_v, of_t = interaction.attentions
        return v * of_v(v, t, t, mask), t * of_t(t, v, v)


def _normed(linear: nn.Module, z: Tensor) -> Tensor:
    return F.relu(linear.norm(z.flatten(0, 1)).view(z.shape))
