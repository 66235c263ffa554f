"""CLIP's ResNet, whose parameters have the names of the released checkpoints, with its attention pool kept a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastadapt.models.etris.configuration import CLIPResNetConfig
from fastadapt.models.etris.positions import resized

ConvNorm = Callable[[nn.Conv2d, nn.BatchNorm2d, Tensor], Tensor]


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)), one after the other."""
    return norm(conv(x))


def folded_conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The same as one convolution with a bias, where the norm is in eval mode."""
    if norm.training:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, norm.bias - norm.running_mean * scale, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    """A residual block that shrinks its map, where it does, by average pooling in front of a convolution of stride 1."""

    def __init__(self, channels: int, width: int, stride: int, conv_norm: ConvNorm) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 1)
        self.conv2, self.bn2 = _conv(width, width, 3)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1)
        self.stride, self.conv_norm = stride, conv_norm
        whole = stride == 1 and channels == 4 * width
        self.downsample = None if whole else nn.Sequential(*_conv(channels, 4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv_norm(self.conv1, self.bn1, x))
        y = F.relu(self.conv_norm(self.conv2, self.bn2, y))
        y = self.conv_norm(self.conv3, self.bn3, self._pool(y))
        x = x if self.downsample is None else self.conv_norm(*self.downsample, self._pool(x))
        return F.relu(y + x)

    def _pool(self, x: Tensor) -> Tensor:
        return x if self.stride == 1 else F.avg_pool2d(x, self.stride)


class AttentionPool(nn.Module):
    """CLIP's attention pool at every place of the map, without its mean token, and ETRIS's shortcut around it.

        y = relu(MHA(x + p) + norm(conv1x1(x)))

    p is CLIP's position embedding, resized to the map; `connect` is no part of CLIP.
    """

    def __init__(self, positions: int, channels: int, heads: int, out_channels: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(positions**2 + 1, channels))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, out_channels)
        self.connect = nn.Sequential(*_conv(channels, out_channels, 1))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out_channels, H, W)"""
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2) + resized(self.positional_embedding, size)[1:]
        q, k, v = (
            linear(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        pooled = self.c_proj(attended).transpose(1, 2).unflatten(2, size)
        return F.relu(pooled + self.connect(x))


class CLIPResNet(PreTrainedModel):
    """CLIP's image tower of the ResNet kind (Radford et al., "Learning Transferable Visual Models", ICML 2021).

    A stem of three convolutions and average pooling, four stages of blocks with pooling in place of strides, an attention pool.
    `visual.*` of a released state dict are its parameters, but for the pool's `connect`.
    """

    config_class = CLIPResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True

    def __init__(self, config: CLIPResNetConfig, conv_norm: ConvNorm = folded_conv_norm) -> None:
        super().__init__(config)
        width = config.width
        self.conv1, self.bn1 = _conv(3, width // 2, 3, stride=2)
        self.conv2, self.bn2 = _conv(width // 2, width // 2, 3)
        self.conv3, self.bn3 = _conv(width // 2, width, 3)
        channels = [width, *config.channels]
        for stage, (before, after, blocks) in enumerate(zip(channels, channels[1:], config.layers)):
            first = Bottleneck(before, after // 4, 2 if stage else 1, conv_norm)
            rest = (Bottleneck(after, after // 4, 1, conv_norm) for _ in range(blocks - 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.attnpool = AttentionPool(config.positions, channels[-1], config.num_attention_heads, config.projection_dim)
        self.conv_norm = conv_norm
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionPool):
            std = module.positional_embedding.shape[1] ** -0.5
            for linear in (module.k_proj, module.q_proj, module.v_proj, module.c_proj):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)
            nn.init.normal_(module.positional_embedding, std=std)
        elif isinstance(module, Bottleneck):  # CLIP's blocks start as the identity
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.bias, module.running_mean):
                nn.init.zeros_(tensor)
            for tensor in (module.weight, module.running_var):
                nn.init.ones_(tensor)
            nn.init.zeros_(module.num_batches_tracked)

    def start(self, pixel_values: Tensor) -> Tensor:
        """The images as the first piece takes them."""
        if self.conv_norm is folded_conv_norm:
            return pixel_values.contiguous(memory_format=torch.channels_last)
        return pixel_values

    def pieces(self, ends: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
        """The tower up to its second stage, the third, and the fourth."""
        return [self.first_half, self.layer3, self.layer4]

    def first_half(self, x: Tensor) -> Tensor:
        """The stem and two stages."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(self.conv_norm(conv, norm, x))
        return self.layer2(self.layer1(F.avg_pool2d(x, 2)))

    def maps(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """What the decoder reads, from the streams after the three pieces."""
        return [*levels[:2], self.attnpool(levels[2])]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The attention pool's map (B, projection_dim, H / 32, W / 32) of images (B, 3, H, W)."""
        x = self.start(pixel_values)
        for piece in self.pieces(()):
            x = piece(x)
        return self.attnpool(x)


def _conv(channels: int, out_channels: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)
