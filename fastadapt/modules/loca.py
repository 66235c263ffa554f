"""MaPPER's local convolution adapter (Liu et al., "MaPPER", EMNLP 2024, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadapt import loca
from fastadapt.core.checks import fail


class LoCA(nn.Module):
    """A bottleneck with convolutions over the patches, beside the feed-forward network of a vision transformer's block.

        h    = relu(n W1^T + b1)
        z1   = relu(BN(conv1x1(h_patch)))
        z2   = relu(BN(conv3x3(relu(BN(conv1x1(h_patch))))))
        y    = h + [z1 | z2] for patches, 2 h for the class token
        loca = y W2^T + b2

    and with the sum that it is part of, out = residual + layer_scale o (mlp + scale loca).  `down_proj` holds W1 and b1,
    `up_proj` W2 and b2; `point_conv` with `point_norm`, `reduce_conv` with `reduce_norm` and `local_conv` with `local_norm` are
    the three convolutions (1x1 to z1, 1x1, 3x3 to z2) and their batch norms.  `fastadapt.loca` reads their tensors, and hooks
    on these modules do not run.  W1 and W2 start as truncated normal numbers of deviation 0.02, b1 and b2 at zero, convolutions
    and norms as torch's.

    In training mode statistics are those of the call's patches and move the running ones, as in nn.BatchNorm2d; the mode is
    that of the batch norms, so that putting them in eval mode freezes the statistics.  The biases of the convolutions then have
    a gradient of zero, as they cancel, but are part of the running means.  nn.SyncBatchNorm.convert_sync_batchnorm(module)
    makes the statistics those of all processes: one all-reduce of counts, sums and sums of squares for both 1x1 convolutions
    and one for the 3x3, and the same backward, through torch's own functions rather than the fused operation.

    Args:
        dim: width of n and of the result.
        point_channels: of z1.
        reduced_channels: of the 3x3 convolution's input.
        local_channels: of z2; the bottleneck h has point_channels + local_channels.
        scale: what multiplies loca where there is a residual.
        eps, momentum: of the batch norms.
        device, dtype: of the parameters.

    527,304 parameters at the default sizes.
    """

    def __init__(
        self,
        dim: int = 768,
        point_channels: int = 192,
        reduced_channels: int = 24,
        local_channels: int = 96,
        *,
        scale: float = 0.2,
        eps: float = 1e-3,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        like = {"device": device, "dtype": dtype}
        hidden = point_channels + local_channels
        self.down_proj = nn.Linear(dim, hidden, **like)
        self.point_conv = nn.Conv2d(hidden, point_channels, 1, **like)
        self.point_norm = nn.BatchNorm2d(point_channels, eps, momentum, **like)
        self.reduce_conv = nn.Conv2d(hidden, reduced_channels, 1, **like)
        self.reduce_norm = nn.BatchNorm2d(reduced_channels, eps, momentum, **like)
        self.local_conv = nn.Conv2d(reduced_channels, local_channels, 3, padding=1, **like)
        self.local_norm = nn.BatchNorm2d(local_channels, eps, momentum, **like)
        self.up_proj = nn.Linear(hidden, dim, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew."""
        for module in self.children():
            module.reset_parameters()
        for linear in (self.down_proj, self.up_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    @property
    def norms(self) -> tuple[nn.BatchNorm2d | nn.SyncBatchNorm, ...]:
        """The batch norms, in the order in which they share vectors."""
        return self.point_norm, self.reduce_norm, self.local_norm

    def forward(
        self,
        n: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        layer_scale: Tensor | None = None,
        mlp: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The adapter of every token, or the sum that it is part of.

        Args:
            n: (B, 1 + H W, dim), the block's normalised input, class token first.
            grid: (H, W); None for a square.
            layer_scale, mlp, residual: (dim,), frozen, and two (B, 1 + H W, dim); all or none.

        Returns:
            loca, or out, (B, 1 + H W, dim), in the dtype of `fastadapt.loca`'s.

        Raises:
            ValueError: an argument of the wrong type, shape, dtype or device; batch norms of which some train and some do not.
        """
        training = self.point_norm.training
        if any(norm.training != training for norm in self.norms):
            fail("norms", "all batch norms in one mode", [norm.training for norm in self.norms])
        if training and self.synchronised:
            out = self._over_all_processes(n, grid)
            return out if residual is None else residual + layer_scale * (mlp + self.scale * out)
        stages = zip((self.point_conv, self.reduce_conv, self.local_conv), self.norms)
        out, moments = loca(
            n,
            self.down_proj.weight,
            self.down_proj.bias,
            *(stage_tensors(convolution, norm, training) for convolution, norm in stages),
            self.up_proj.weight,
            self.up_proj.bias,
            grid=grid,
            eps=self.point_norm.eps,
            layer_scale=layer_scale,
            mlp=mlp,
            residual=residual,
            scale=1.0 if residual is None else self.scale,
        )
        if training:
            self._track(moments)
        return out

    @property
    def synchronised(self) -> bool:
        """Whether statistics are those of several processes."""
        if not isinstance(self.point_norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size(self.point_norm.process_group) > 1

    def _over_all_processes(self, n: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """loca with the statistics of all processes, as a composition of torch's functions."""
        side = math.isqrt(n.shape[1] - 1)
        h = torch.relu(self.down_proj(n))
        patches = h[:, 1:].unflatten(1, grid or (side, side)).permute(0, 3, 1, 2)
        u = torch.cat((self.point_conv(patches), self.reduce_conv(patches)), 1)
        z, point_moments = synchronised_batch_norm(u, self.norms[:2])
        z1, t = torch.relu(z).split([norm.num_features for norm in self.norms[:2]], 1)
        z2, local_moments = synchronised_batch_norm(self.local_conv(t), self.norms[2:])
        self._track(torch.cat((point_moments, local_moments), 1))
        z = torch.cat((z1, torch.relu(z2)), 1).permute(0, 2, 3, 1).flatten(1, 2)
        return self.up_proj(h + torch.cat((h[:, :1], z), 1))

    @torch.no_grad()
    def _track(self, moments: Tensor) -> None:
        """Move the running statistics towards the mean and variance of every channel."""
        running = [buffer for norm in self.norms for buffer in (norm.running_mean, norm.running_var)]
        found = moments.to(self.point_norm.running_mean.dtype).split([norm.num_features for norm in self.norms], 1)
        target = [row for pair in found for row in pair]
        torch._foreach_lerp_(running, target, self.point_norm.momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)


def stage_tensors(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm, training: bool
) -> tuple[Tensor | None, ...]:
    """A convolution and its batch norm as `fastadapt.loca` takes them."""
    running = (None, None) if training else (norm.running_mean, norm.running_var)
    return convolution.weight, convolution.bias, norm.weight, norm.bias, *running


def synchronised_batch_norm(x: Tensor, norms: Sequence[nn.SyncBatchNorm]) -> tuple[Tensor, Tensor]:
    """The batch norms of x (B, channels, H, W), one after another in its channels, over all processes, and the moments.

    One all-reduce of the count and every channel's sum and sum of squares, in float64, and torch's backward of it.
    """
    from torch.distributed.nn.functional import all_reduce  # which not every build of torch has

    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = (torch.cat([getattr(norm, role) for norm in norms])[:, None, None] for role in ("weight", "bias"))
    variance, mean = (moment.double() for moment in torch.var_mean(wide, (0, 2, 3), correction=0))
    count = mean.new_full((1,), x.numel() // x.shape[1])
    sums = torch.cat((count, count * mean, count * (variance + mean * mean)))
    sums = all_reduce(sums, group=norms[0].process_group)
    count, (mean, square) = sums[0], (sums[1:] / sums[0]).view(2, -1)
    variance = square - mean * mean
    rstd = torch.rsqrt(variance + norms[0].eps).to(wide.dtype)[:, None, None]
    normed = (wide - mean.to(wide.dtype)[:, None, None]) * (rstd * weight) + bias
    moments = torch.stack((mean, variance * (count / (count - 1)))).detach()
    return normed.to(x.dtype), moments
