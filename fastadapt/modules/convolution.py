"""A convolution with batch normalisation and ReLU, and the folding of the two for inference."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from fastadapt.core.checks import fail


class ConvNormReLU(nn.Sequential):
    """relu(norm(convolution(x))), with a BatchNorm2d of the convolution's width, dtype and device (Ioffe and Szegedy, 2015)."""

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
        weight = convolution.weight
        norm = nn.BatchNorm2d(convolution.out_channels, device=weight.device, dtype=weight.dtype)
        super().__init__(convolution, norm, nn.ReLU(inplace=True))


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold the batch norm of every ConvNormReLU inside `module` into its convolution, in place, and return `module`.

        W' = W gamma / sqrt(var + eps),      b' = beta + (b - mean) gamma / sqrt(var + eps)

    The outputs in eval mode stay what they are.  It is for inference: the statistics are constants from here on, and the
    state dict has a bias for each convolution in place of its batch norm.

    Raises:
        ValueError: a ConvNormReLU is in training mode.
    """
    blocks = [block for block in module.modules() if isinstance(block, ConvNormReLU)]
    if any(block.training for block in blocks):
        fail("module", "a module in eval mode", "one in training mode")
    for block in blocks:
        convolution, norm, _ = block
        if not isinstance(norm, nn.Identity):
            block[0] = fuse_conv_bn_eval(convolution, norm, transpose=isinstance(convolution, nn.ConvTranspose2d))
            block[1] = nn.Identity()
    return module
