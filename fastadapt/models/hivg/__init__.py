"""HiVG: Hierarchical Multimodal Fine-grained Modulation for Visual Grounding (Xiao et al., arXiv 2404.13400)."""

from fastadapt.models.hivg.configuration import HiVGConfig
from fastadapt.models.hivg.modeling import HiVGForGrounding

__all__ = ["HiVGConfig", "HiVGForGrounding"]
