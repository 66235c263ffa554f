"""Published grounding methods as transformers models, each in three arms from one definition.

`fastadapt.models.m2ist` and its like are imported by name, and with them transformers, which nothing else here needs.
"""
