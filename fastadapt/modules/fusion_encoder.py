"""The transformer encoders in which grounding methods fuse image and words: MaPPER's and M2IST's, and HiVG's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadapt.core import philox
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.checks import check_dtype, check_padding_mask, check_probability, check_tensor, fail
from fastadapt.modules.attention import MultiheadAttention
from fastadapt.modules.attention_state import key_bias
from fastadapt.modules.fusion_layer import FusionLayer, Options, Weights


class FusionEncoder(nn.Module):
    """DETR's transformer encoder, with positions added to queries and keys in every layer, for training in little memory.

    With pre_norm=False (MaPPER's and M2IST's fusion encoders, which have no final norm)

        s = x + drop(MHA(x + pos, x + pos, x)),      n = LN1(s),      y = LN2(n + drop(W_2 drop(relu(W_1 n + b_1)) + b_2))

    and with pre_norm=True (HiVG's; a final LN follows the last layer)

        a = LN1(x),      s = x + drop(MHA(a + pos, a + pos, a)),      y = s + drop(W_2 drop(relu(W_1 LN2(s) + b_1)) + b_2)

    (Carion et al., "End-to-End Object Detection with Transformers", 2020, appendix A.3.)  Parameters are named and shaped as in
    nn.TransformerEncoder of nn.TransformerEncoderLayer, so that state dicts of it and of DETR's code load
    (`layers.0.linear1.weight`, `layers.0.self_attn.in_proj_weight`, `layers.0.norm1.weight` and so on, and `norm.weight` with
    pre_norm).  Matrices are drawn Xavier-uniform.

    A layer is one function (fusion_layer.py).  Beside what the attention's kernel leaves it keeps for the backward, at width
    256 and FFN 2048, 15 numbers for each token and channel (x, q, k, v, o, s, t and 8 of the FFN), or with recompute=True two
    (x and o), where torch's own modules on flash attention keep 25 and three masks.  No averaged attention map is formed.  MiB
    that a sample keeps in bfloat16, six layers, dropout on:

        M2IST   421 tokens of 256     torch 37.1     18.6     recompute  2.5
        MaPPER  1,391 tokens of 256   torch 122.6    61.5     recompute  8.4
        HiVG    275 tokens of 512     torch 32.6     16.4     recompute  3.5

    Args:
        d_model: width of the tokens.  256 in MaPPER and M2IST, 512 in HiVG with ViT-B, 768 with ViT-L.
        num_heads: heads of the attention, a divisor of d_model.
        num_layers: at least 1.
        dim_feedforward: hidden width of the FFN.
        dropout: probability in [0, 1) with which elements of the attention weights, of both residual branches and inside the
            FFN are dropped while training.
        pre_norm: which of the two.
        recompute: keep x and o of each layer, and compute the rest of it again in the backward.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_layers below 1, num_heads does not divide d_model, or dropout is outside [0, 1).

    The tokens are computed in the autocast dtype from the first layer to the last, the residual stream and its norms too; in
    16 bits the norms' statistics are float32.  There is one derivative.  Dropout outside the attention has the masks of
    PhiloxDropout, a function of a seed; inside they are the kernel's own.
    """

    def __init__(
        self,
        d_model: int = 256,
        num_heads: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        *,
        pre_norm: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            fail("num_layers", "at least 1", num_layers)
        check_probability("dropout", dropout)
        self.d_model, self.dropout, self.pre_norm, self.recompute = d_model, dropout, pre_norm, recompute
        like = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(_Layer(d_model, num_heads, dim_feedforward, **like) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model, **like) if pre_norm else None

    def forward(
        self, tokens: Tensor, positions: Tensor, key_padding_mask: Tensor | None = None, rows: int | None = None
    ) -> Tensor:
        """Encode a batch.

        Args:
            tokens: (B, T, d_model), such as [REG, words, image].
            positions: (T, d_model), or (B, T, d_model).
            key_padding_mask: (B, T) of bool, True for tokens that none attends to.  A sample with no other attends to nothing:
                its attention is out_proj's bias.  Or of a floating dtype, added to the scores, as nn.MultiheadAttention does;
                it gets no gradient.
            rows: compute the first `rows` tokens of the last layer's output alone; None for all.  Where only they are used, as
                a REG token in first place at inference (and, without HiVG's auxiliary heads, in training), this is exact, and
                with 1 the last layer is the products for keys and values and little else: 6.5 GFLOP forward in place of 7.7 in
                M2IST.

        Returns:
            (B, rows or T, d_model), in the autocast dtype under autocast.

        Raises:
            ValueError: a shape, dtype or device is not as above, or rows is not from 1 to T.
        """
        check_tensor("tokens", tokens, (None, None, self.d_model), self.layers[0].linear1.weight.device)
        batch, length = tokens.shape[:2]
        leading = () if isinstance(positions, Tensor) and positions.ndim == 2 else (batch,)
        check_tensor("positions", positions, (*leading, length, self.d_model), tokens.device)
        _check_mask(key_padding_mask, (batch, length), tokens.device)
        if rows is not None and not 1 <= rows <= length:
            fail("rows", f"None, or 1 to {length}", rows)
        dtype = autocast_dtype(tokens)
        if dtype is None:
            dtype = self.layers[0].linear1.weight.dtype
            check_dtype("tokens", tokens, (dtype,))
        x, positions = tokens.to(dtype), positions.to(dtype)
        bias = None if key_padding_mask is None else key_bias(key_padding_mask, dtype)
        for i, layer in enumerate(self.layers, 1):
            x = self._run(layer, x, positions, bias, length if i < len(self.layers) else rows or length)
        if self.norm is None:
            return x
        affine = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
        return torch.native_layer_norm(x, (self.d_model,), *affine, self.norm.eps)[0]

    def _run(self, layer: _Layer, x: Tensor, positions: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        dropout = self.dropout if self.training and philox.threshold(self.dropout) else 0.0
        seed = philox.draw_seed(x.device) if dropout else None
        options = Options(layer.self_attn.num_heads, dropout, layer.norm1.eps, self.pre_norm, self.recompute, rows)
        return FusionLayer.apply(options, x, positions, bias, seed, *layer.weights())

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, dropout={self.dropout}, pre_norm={self.pre_norm}, recompute={self.recompute}"


def _check_mask(mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return check_padding_mask("key_padding_mask", mask, shape, device)
    check_tensor("key_padding_mask", mask, shape, device)
    if mask.requires_grad:
        fail("key_padding_mask", "a mask that requires no gradient", "one that does")


class _Layer(nn.Module):
    """The parameters of one layer, in the modules that torch's has; FusionEncoder runs it."""

    def __init__(self, d_model: int, num_heads: int, dim_feedforward: int, **like: object) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, num_heads, **like)
        self.linear1, self.linear2 = nn.Linear(d_model, dim_feedforward, **like), nn.Linear(dim_feedforward, d_model, **like)
        self.norm1, self.norm2 = nn.LayerNorm(d_model, **like), nn.LayerNorm(d_model, **like)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def weights(self) -> Weights:
        attention = self.self_attn
        linears = attention.out_proj, self.linear1, self.linear2
        pairs = [(module.weight, module.bias) for module in (*linears, self.norm1, self.norm2)]
        return Weights(attention.in_proj_weight, attention.in_proj_bias, *(part for pair in pairs for part in pair))
