"""MaPPER's frozen towers: DINOv2 with LoCA and BERT with DyPA in some layers, and CLIP's text tower, which gives the prior.

A layer with an adapter is transformers' own object with another class and one more child, `adapter`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertModel, CLIPTextModelWithProjection, Dinov2Model
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from fastadapt import FrozenBlock, frozen_group
from fastadapt.models.common.towers import bert_embedding, key_mask


class ImageLayer(Dinov2Layer):
    """DINOv2's block with LoCA beside its MLP.

    s = x + c1 o attention(LN1(x)),   n = LN2(s),   y = s + c2 o (MLP(n) + 0.2 LoCA(n))
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        attended, _ = self.attention(self.norm1(x))
        x = x + self.layer_scale1(attended)
        return x + self.layer_scale2(self._feed(x))

    def _feed(self, x: Tensor) -> Tensor:
        n = self.norm2(x)
        return self.mlp(n) + self.adapter.scale * self.adapter(n)


class ReleasedImageLayer(ImageLayer):
    """As the authors run it: LN2 twice."""

    def _feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x)) + self.adapter.scale * self.adapter(self.norm2(x))


class FusedImageLayer(ImageLayer):
    """The same as a `FrozenBlock`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        attention, mlp = self.attention, self.mlp
        block = FrozenBlock(
            self.norm1, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, self.norm2, mlp.fc1, mlp.fc2,
            heads=attention.num_attention_heads, scale1=self.layer_scale1.lambda1, scale2=self.layer_scale2.lambda1,
            dropout=0.0, attention_dropout=attention.attention_dropout, parallel=self.adapter,
        )  # fmt: skip
        return _in_mode(block, self)(hidden_states)


class TextLayer(BertLayer):
    """BERT's layer with DyPA behind it: a = LN(x + attention(x)),   y = LN(a + FFN(a)) + DyPA(a, prior)."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, prior: Tensor) -> Tensor:
        a, _ = self.attention(hidden_states, attention_mask)
        return self.adapter(a, prior, residual=self.feed_forward_chunk(a))


class FusedTextLayer(TextLayer):
    """The same as a `FrozenBlock`."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, prior: Tensor) -> Tensor:
        attention, output = self.attention.self, self.attention.output
        block = FrozenBlock(
            output.LayerNorm, attention.query, attention.key, attention.value, output.dense,
            self.output.LayerNorm, self.intermediate.dense, self.output.dense,
            heads=attention.num_attention_heads, pre_norm=False, dropout=output.dropout.p,
            attention_dropout=attention.dropout.p, after=self.adapter,
        )  # fmt: skip
        return _in_mode(block, self)(hidden_states, attention_mask, prior=prior)


def _in_mode(block: FrozenBlock, layer: nn.Module) -> FrozenBlock:
    block.training = layer.training  # its own, and not that of the modules that it shares with the layer
    return block


class FrozenLayerNorm(nn.LayerNorm):
    """A LayerNorm that keeps its input, in the dtype that it has, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        norm = {"norm_weight": self.weight, "norm_bias": self.bias, "norm_eps": self.eps}
        return frozen_group(x, prologue="layer_norm", return_normed=True, **norm).normed


def image_states(tower: Dinov2Model, pixel_values: Tensor) -> Tensor:
    """Images (B, 3, H, W) to (B, 1 + patches, width), CLS first.  Padding is not masked."""
    x = tower.embeddings(pixel_values)
    for layer in tower.encoder.layer:
        x = layer(x)
    return tower.layernorm(x)


def text_states(tower: BertModel, input_ids: Tensor, padding: Tensor, prior: Tensor, types: bool) -> Tensor:
    """Words (B, L), their padding (B, L), True for a word to leave out, and the prior (B, L, P) to (B, L, width).

    types: whether the embedding of token type 0 is added.
    """
    x = bert_embedding(tower, input_ids, types)
    keys = key_mask(padding, x.dtype, tower.config._attn_implementation)
    for layer in tower.encoder.layer:
        x = layer(x, keys, prior) if isinstance(layer, TextLayer) else layer(x, keys)
    return x


@torch.no_grad()
def prior_states(tower: CLIPTextModelWithProjection, ids: Tensor) -> Tensor:
    """CLIP's ids (B, L) to its projected states of every word (B, L, projection_dim); a word sees no later one."""
    text = tower.text_model
    x = text.embeddings(ids)
    for layer in text.encoder.layers:
        x = layer(x, None, is_causal=True)
    return tower.text_projection(text.final_layer_norm(x))
