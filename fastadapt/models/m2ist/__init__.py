"""M2IST: Multi-Modal Interactive Side-Tuning (Liu et al., arXiv 2407.01131)."""

from fastadapt.models.m2ist.configuration import M2ISTConfig
from fastadapt.models.m2ist.modeling import M2ISTForGrounding

__all__ = ["M2ISTConfig", "M2ISTForGrounding"]
