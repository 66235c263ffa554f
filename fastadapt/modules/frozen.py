"""A frozen transformer block that keeps for the backward what nothing cheap can make anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt.core.checks import check_heads, check_input, check_probability, check_tensor, fail
from fastadapt.modules.frozen_parts import Parts, load_readers, tensors_of
from fastadapt.modules.frozen_run import Adapters, Inputs, run_block


class FrozenBlock(nn.Module):
    """A frozen transformer block with LoRA in its linears and adapters beside them.

        pre-LN:   s = x + c1 o drop(W_o attention(LN1(x)) + b_o)
                  y = s + c2 o drop(fc2(act(fc1(LN2(s)))) + parallel(LN2(s)))
        post-LN:  n = LN1(x + drop(W_o attention(x) + b_o))
                  y = LN2(n + drop(fc2(act(fc1(n))) + parallel(n))) + after(n, prior)

    Each linear is an nn.Linear, a `fastadapt.LoraLinear` or a peft.tuners.lora.Linear; the block reads their parameters and the
    norms', and hooks on them do not run.  All but LoRA's factors and the adapters has to be frozen.

    Args:
        norm1, norm2: nn.LayerNorm.
        q, k, v, out, fc1, fc2: the linears; those of attention are C -> C' and C' -> C, with heads of C' / heads.
        heads: number of heads.
        activation: "relu", "gelu", "gelu_tanh" or "quick_gelu".
        pre_norm: which of the two forms.
        scale1, scale2: LayerScale c1 and c2 (C,), or None; pre-LN only.
        dropout, attention_dropout: probabilities of drop and of dropping an attention weight, while training.
        parallel: a module that reads the MLP's input: y = parallel(n).  A `LoCA` takes the whole sum, with its own scale.
        after: post-LN only: a module called as after(n, prior, residual=LN2(...)), such as `DynamicPriorAdapter`.
        recompute: keep the block's input and the attention's output alone, and run the rest anew in the backward; a call whose
            attention_mask requires a gradient keeps all.

    Raises:
        ValueError: an argument of the wrong type or shape.

    With LoRA of rank 16 on all six linears of a ViT-B block in 16 bits it keeps 1.013 times what a frozen block does: no
    LayerNorm's output, no activation, no dropout mask.  The residual stream has the compute dtype under autocast.  Masks are
    functions of seeds, drawn once a call.  With recompute, an adapter must draw nothing at random itself.
    """

    def __init__(
        self,
        norm1: nn.LayerNorm,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        out: nn.Module,
        norm2: nn.LayerNorm,
        fc1: nn.Module,
        fc2: nn.Module,
        *,
        heads: int,
        activation: str = "gelu",
        pre_norm: bool = True,
        scale1: Tensor | None = None,
        scale2: Tensor | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        parallel: nn.Module | None = None,
        after: nn.Module | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        check_probability("attention_dropout", attention_dropout)
        if pre_norm and after is not None:
            fail("after", "None in a pre-LN block", type(after).__name__)
        if not pre_norm and (scale1 is not None or scale2 is not None):
            fail("scale1 and scale2", "None in a post-LN block", "a tensor")
        self.norm1, self.q, self.k, self.v, self.out = norm1, q, k, v, out
        self.norm2, self.fc1, self.fc2, self.parallel, self.after = norm2, fc1, fc2, parallel, after
        self.heads, self.activation, self.pre_norm, self.recompute = heads, activation, pre_norm, recompute
        self.dropout, self.attention_dropout = dropout, attention_dropout
        for name, scale in (("scale1", scale1), ("scale2", scale2)):
            parameter = scale is None or isinstance(scale, nn.Parameter)
            self.register_parameter(name, scale if parameter else nn.Parameter(scale, requires_grad=False))
        load_readers()

    @classmethod
    def from_transformers(cls, layer: nn.Module, **options: Any) -> FrozenBlock:
        """A block around the very modules of a transformers layer that `fuse` knows, fused or not, with PEFT's LoRA or without.

        options: parallel, after and recompute.  Its forward takes x and attention_mask as the layer does, DETR's
        spatial_position_embeddings as position, and is_causal.

        Raises:
            ValueError: a layer that is no such one, with the reason.
        """
        from fastadapt.integrations import transformers

        found = transformers.arguments_of(layer)
        if isinstance(found, str):
            fail("layer", "an encoder layer of CLIP, SigLIP, ViT, DINOv2, BERT or DETR as transformers makes it", found)
        return cls(**found, **options).train(layer.training)

    @property
    def parts(self) -> Parts:
        """The block as a call sees it now."""
        dropout, attention_dropout = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)
        return Parts(
            self.norm1, self.q, self.k, self.v, self.out, self.norm2, self.fc1, self.fc2, self.activation, self.heads,
            self.pre_norm, self.scale1, self.scale2, dropout, dropout, attention_dropout,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        position: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """The block's output.

        Args:
            x: (B, T, C).
            attention_mask: broadcastable to (B, heads, T, T), of bool, True where a query sees a key, or added to the scores.
            is_causal: whether a query sees no later key; attention_mask is None then.
            position: (B or 1, T, C), added to what q and k read, or None.
            prior: what `after` reads, or None without one.

        Returns:
            (B, T, C) in x's dtype; under autocast in autocast's.

        Raises:
            ValueError: an argument of the wrong type or shape, or a part that cannot be computed from its tensors, and why.
        """
        check_input("x", x)
        check_tensor("x", x, (None, None, self.norm1.normalized_shape[0]), x.device)
        parts = self.parts
        tensors = tensors_of(parts, x)
        if isinstance(tensors, str):
            fail("parts", "frozen linears and norms, with or without LoRA", tensors)
        check_heads("heads", self.heads, tensors.attention[0].weight.shape[0], "q")
        inputs = Inputs(x, position, prior)
        adapters = Adapters(self.parallel, self.after)
        return run_block(parts, tensors, inputs, attention_mask, is_causal, adapters, self.recompute)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, activation={self.activation!r}, pre_norm={self.pre_norm}, dropout={self.dropout}, "
            f"attention_dropout={self.attention_dropout}, recompute={self.recompute}"
        )
