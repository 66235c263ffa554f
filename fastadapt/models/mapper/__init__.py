"""MaPPER: Multimodal Prior-guided Parameter Efficient Tuning (Liu et al., arXiv 2409.13609)."""

from fastadapt.models.mapper.configuration import MaPPERConfig
from fastadapt.models.mapper.modeling import MaPPERForGrounding

__all__ = ["MaPPERConfig", "MaPPERForGrounding"]
