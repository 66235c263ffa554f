"""ETRIS: bridged CLIP towers for referring image segmentation (Xu et al., arXiv 2307.11545)."""

from fastadapt.models.etris.configuration import CLIPResNetConfig, ETRISConfig
from fastadapt.models.etris.modeling import ETRISForSegmentation

__all__ = ["CLIPResNetConfig", "ETRISConfig", "ETRISForSegmentation"]
