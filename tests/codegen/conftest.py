"""These tests read compiled kernels, so they need a process that compiles them."""

from __future__ import annotations

import pytest

from fastadapt.core.launch import interpreting

if interpreting():
    raise pytest.UsageError("tests/codegen needs a process of its own: TRITON_INTERPRET=0 pytest tests/codegen")
