"""The host's work for a LoRA linear, forward and backward, against PEFT's on the same core in the same run."""

from __future__ import annotations

import pytest

from bench.counters import HostTime, host_overhead

# the ratios differ between processors: 0.37 to 0.61 have been seen for the operation, 0.50 to 0.74 for the layer
MOST_FOR_THE_OPERATION = 0.7
MOST_FOR_THE_LAYER = 0.85  # the module's own call, and the look at PEFT's state that every call of it takes
ATTEMPTS = 4  # a neighbour on the machine can spoil one measurement, not make slow code fast


def good(found: HostTime) -> bool:
    return found.operation_ratio <= MOST_FOR_THE_OPERATION and found.ratio <= MOST_FOR_THE_LAYER


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_lora_costs_the_host_less_than_peft_takes(dropout_p: float) -> None:
    found = [host_overhead(dropout_p)]
    while not good(found[-1]) and len(found) < ATTEMPTS:
        found.append(host_overhead(dropout_p))
    print(*found, sep="\n")
    assert good(found[-1]), found
