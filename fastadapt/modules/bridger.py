"""ETRIS's Bridger (Xu et al., "Bridging Vision and Language Encoders: Parameter-Efficient Tuning for Referring Image
Segmentation", ICCV 2023): side stages through which two frozen towers exchange features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadapt import light_interaction
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_dtype, check_input, check_padding_mask, check_tensor, fail
from fastadapt.modules.attention import MultiheadAttention
from fastadapt.modules.zoom import ConvZoom, LinearNormReLU, TokenZoom

State = tuple[Tensor, Tensor]


class Bridger(nn.Module):
    """Side stages between a vision tower and a text tower, each of which adds to both streams what one learns of the other.

    With x the visual and y the text stream at stage i, and d = ladder_dim:

        v, t   = zoom_in(x), y W_in^T + b_in                       both of width d
        v, t   = LN_v(v + v_prev), LN_t(t + t_prev)                after the first stage
        v', t' = interaction(v, t)
        x, y   = x + zoom_out(v'), y + t' W_out^T + b_out

    v_prev and t_prev are what the stage before gave to its own interaction (section 3.2 of the paper).  `Bridger.vit` and
    `Bridger.resnet` have the released configurations, which differ in zoom (fastadapt.modules.zoom) and interaction:

        "light"  v' = v o MHA(q = v, k = v = t),  t' = t o MHA(q = t, k = v = v): the fused `fastadapt.light_interaction`
        "full"   a post-norm decoder layer (Vaswani et al., "Attention Is All You Need", 2017) each way: self-attention,
                 attention to the other side, and an MLP of width 128, each with residual and LayerNorm

    Both directions read the same v and t.  A frozen tower calls a stage between two of its blocks, and keeps the state:

        state = None
        for i, (visual_block, text_block) in enumerate(zip(visual_blocks, text_blocks)):
            visual, text, state = bridger.stage(i, visual_block(visual), text_block(text), state)

    which is `bridger(visual, text, visual_blocks, text_blocks)`.

    Args:
        zooms: one for each stage; `TokenZoom` and `ConvZoom` show what they need.
        text_dim: width of the text stream.
        ladder_dim: d, a multiple of num_heads.
        num_heads: heads of every attention.
        interaction: "light" or "full".
        dropout: of the full interaction while training, where nn.TransformerDecoderLayer has it; the light one has none.
        recompute: whether the full interaction keeps its inputs alone for the backward, which runs it again
            (torch.utils.checkpoint); False where dropout is to be captured in a CUDA graph.
        device, dtype: of the text side's and the interactions' parameters.

    Raises:
        ValueError: no zooms, an unknown interaction, num_heads that does not divide ladder_dim, or dropout outside [0, 1).

    Linears start from N(0, 0.02) with bias 0, convolutions from Kaiming's normal distribution (fan out, ReLU), in_proj_weight
    from Xavier's uniform one.  Deterministic but for dropout: no atomics of its own.
    """

    def __init__(
        self,
        zooms: Sequence[nn.Module],
        *,
        text_dim: int,
        ladder_dim: int,
        num_heads: int,
        interaction: str,
        dropout: float = 0.1,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not zooms:
            fail("zooms", "one for each stage, at least one", "none")
        if interaction not in ("light", "full"):
            fail("interaction", "'light' or 'full'", repr(interaction))
        like = {"device": device, "dtype": dtype}

        def interact() -> nn.Module:
            if interaction == "light":
                return LightInteraction(ladder_dim, num_heads, **like)
            return FullInteraction(ladder_dim, num_heads, dropout, recompute, **like)

        self.stages = nn.ModuleList(
            BridgerStage(zoom, interact(), text_dim, ladder_dim, linked=i > 0, **like) for i, zoom in enumerate(zooms)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @classmethod
    def vit(
        cls,
        dim: int = 768,
        text_dim: int = 512,
        ladder_dim: int = 64,
        num_heads: int = 8,
        stages: int = 3,
        *,
        interaction: str = "light",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Bridger:
        """A Bridger for a ViT, whose visual stream is tokens (B, 1 + N, dim): the class token is left as it is.

        598,592 parameters by default; with ladder_dim = 128 the paper's 1,387,648.  options: the rest of Bridger's arguments.
        """
        zooms = [TokenZoom(dim, ladder_dim, device=device, dtype=dtype) for _ in range(stages)]
        sizes = {"text_dim": text_dim, "ladder_dim": ladder_dim, "num_heads": num_heads}
        return cls(zooms, **sizes, interaction=interaction, device=device, dtype=dtype, **options)

    @classmethod
    def resnet(
        cls,
        channels: Sequence[int] = (512, 1024, 2048),
        text_dim: int = 512,
        ladder_dim: int = 64,
        num_heads: int = 4,
        strides: Sequence[int] = (8, 16, 32),
        bridge_stride: int = 16,
        *,
        interaction: str = "full",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Bridger:
        """A Bridger for a ResNet, whose visual stream is a map (B, channels[i], H, W) of stride strides[i] over the image.

        Every stage works at bridge_stride: it shrinks a finer map and enlarges a coarser one.  1,942,080 parameters by default.
        options: the rest of Bridger's arguments.
        """
        if len(strides) != len(channels):
            fail("strides", f"{len(channels)} entries, one for each of channels", f"{len(strides)}")
        zooms = [
            ConvZoom(width, ladder_dim, stride, bridge_stride, device=device, dtype=dtype)
            for width, stride in zip(channels, strides)
        ]
        sizes = {"text_dim": text_dim, "ladder_dim": ladder_dim, "num_heads": num_heads}
        return cls(zooms, **sizes, interaction=interaction, device=device, dtype=dtype, **options)

    def stage(
        self,
        index: int,
        visual: Tensor,
        text: Tensor,
        state: State | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """Run one stage, between two blocks of the towers.

        Args:
            index: of the stage, from 0.
            visual: the visual stream after the block: tokens (B, 1 + N, dim) or a map (B, channels[index], H, W).
            text: the text stream after the block, (B, L, text_dim).
            state: what the stage before returned last; None for the first.
            key_padding_mask: bool (B, L), True at the words that no one attends to, as in nn.MultiheadAttention.  None, as in
                the released model, attends to padding too.

        Returns:
            (visual, text, state): the streams with their updates, in new tensors, and the state for the next stage.

        Raises:
            ValueError: a shape, dtype or device is not as above, or there is a state where there should be none, or none
                where there should be one; the message names the argument.
        """
        return self.stages[index](visual, text, state, key_padding_mask)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_blocks: Sequence[Callable[[Tensor], Tensor]],
        text_blocks: Sequence[Callable[[Tensor], Tensor]],
        key_padding_mask: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Run both towers, cut into a piece for each stage, with the stages after their pieces.

        Args:
            visual, text: what the first pieces read.
            visual_blocks, text_blocks: the pieces, each from its stream to its stream.
            key_padding_mask: as for `stage`.

        Returns:
            The visual stream after every stage, the levels that the decoder reads, and the text stream after the last.

        Raises:
            ValueError: there is not one piece for each stage, or as for `stage`.
        """
        for argument, blocks in (("visual_blocks", visual_blocks), ("text_blocks", text_blocks)):
            if len(blocks) != len(self.stages):
                fail(argument, f"{len(self.stages)} pieces, one for each stage", len(blocks))
        levels, state = [], None
        for stage, visual_block, text_block in zip(self.stages, visual_blocks, text_blocks):
            visual, text, state = stage(visual_block(visual), text_block(text), state, key_padding_mask)
            levels.append(visual)
        return levels, text

    def folded(self) -> Bridger:
        """A frozen copy for inference in which the ViT's batch norms are part of their linears.

        Equal up to rounding, a linear and a ReLU a zoom.  The copy has other state_dict keys, and train() raises a RuntimeError
        where there was a batch norm.
        """
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        for module in twin.modules():
            if isinstance(module, LinearNormReLU):
                module.fold()
        return twin


class BridgerStage(nn.Module):
    """One stage of a Bridger; `linked` says whether there is one before it."""

    def __init__(
        self, zoom: nn.Module, interaction: nn.Module, text_dim: int, ladder_dim: int, *, linked: bool, **like: Any
    ) -> None:
        super().__init__()
        self.zoom, self.interaction = zoom, interaction
        self.text_in, self.text_out = nn.Linear(text_dim, ladder_dim, **like), nn.Linear(ladder_dim, text_dim, **like)
        self.visual_norm = nn.LayerNorm(ladder_dim, **like) if linked else None
        self.text_norm = nn.LayerNorm(ladder_dim, **like) if linked else None

    def forward(
        self, visual: Tensor, text: Tensor, state: State | None = None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State]:
        """As `Bridger.stage`."""
        weight = self.text_in.weight
        for argument, stream in (("visual", visual), ("text", text)):
            check_input(argument, stream)
            if autocast_dtype(stream) is None:
                check_dtype(argument, stream, (weight.dtype,))
        check_tensor("text", text, (visual.shape[0], None, weight.shape[1]), weight.device)
        check_padding_mask("key_padding_mask", key_padding_mask, text.shape[:2], text.device)
        v, t = self._link(self.zoom.zoom_in(visual), self.text_in(text), state)
        attended = self.interaction(v, t, key_padding_mask)
        return self.zoom.zoom_out(attended[0], visual), text + self.text_out(attended[1]), (v, t)

    def _link(self, v: Tensor, t: Tensor, state: State | None) -> State:
        """Join this stage's features and those of the stage before, if there is one."""
        if self.visual_norm is None:
            if state is not None:
                fail("state", "None at the first stage", type(state).__name__)
            return v, t
        if state is None:
            fail("state", "what the stage before returned", None)
        for i, features in enumerate((v, t)):
            check_tensor(f"state[{i}]", state[i], tuple(features.shape), features.device)
        return self.visual_norm(v + state[0]), self.text_norm(t + state[1])


class LightInteraction(nn.Module):
    """Each side multiplied by what it finds in the other: one fused operation, without norm, MLP and residual.

    Its attentions are parameters only, named and drawn as nn.MultiheadAttention's: [0] reads the text for the visual side.
    """

    def __init__(self, dim: int, num_heads: int, **like: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attentions = nn.ModuleList(MultiheadAttention(dim, num_heads, **like) for _ in range(2))

    def forward(self, v: Tensor, t: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v' (B, N, dim) and t' (B, L, dim) from v and t; key_padding_mask (B, L) is True at the words to ignore."""
        both = [(a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias) for a in self.attentions]
        return light_interaction(v, t, *zip(*both), num_heads=self.num_heads, y_padding_mask=key_padding_mask)


class FullInteraction(nn.Module):
    """A decoder layer each way: layers[0] reads the text for the visual side, layers[1] the other way."""

    def __init__(self, dim: int, num_heads: int, dropout: float, recompute: bool, **like: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, dropout, **like) for _ in range(2))
        self.dropout, self.recompute = dropout, recompute

    def forward(self, v: Tensor, t: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v' (B, N, dim) and t' (B, L, dim) from v and t; key_padding_mask (B, L) is True at the words to ignore."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self._both(v, t, key_padding_mask)
        draws = self.training and self.dropout > 0
        return checkpoint(self._both, v, t, key_padding_mask, use_reentrant=False, preserve_rng_state=draws)

    def _both(self, v: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layers[0](v, t, None, mask), self.layers[1](t, v, mask, None)


class DecoderLayer(nn.Module):
    """nn.TransformerDecoderLayer with the same parameters and the defaults norm_first=False and ReLU, batch first.

    Its attention is `MultiheadAttention`, which never forms the weights and has no NaN where every key is padding.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, dim_feedforward: int = 128, **like: Any) -> None:
        super().__init__()
        self.self_attn, self.multihead_attn = (MultiheadAttention(dim, num_heads, dropout, **like) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(dim, dim_feedforward, **like), nn.Linear(dim_feedforward, dim, **like)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, **like) for _ in range(3))
        self.dropout = dropout

    def forward(self, x: Tensor, memory: Tensor, x_padding_mask: Tensor | None, memory_padding_mask: Tensor | None) -> Tensor:
        x = self.norm1(x + self._drop(self.self_attn(x, x, x, x_padding_mask)))
        x = self.norm2(x + self._drop(self.multihead_attn(x, memory, memory, memory_padding_mask)))
        hidden = self._drop(self.linear1(x).relu_())
        return self.norm3(x + self._drop(self.linear2(hidden)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
