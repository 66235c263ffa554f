"""A GPU's training step without a GPU: see fastadapt/prove/meta.py."""

from fastadapt.prove.meta import as_on_cuda

__all__ = ["as_on_cuda"]
