"""Clocks, power and temperature of the GPU around a measurement, from its driver; nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOVED = 0.02  # a cell whose SM clock changes by more is flagged


def sensor() -> Callable[[], dict[str, Any]]:
    """A function that reads the current CUDA device; it returns {} without a GPU, a driver or nvidia-ml-py."""
    if not torch.cuda.is_available():
        return dict
    try:
        import pynvml
    except ImportError:
        return dict
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return dict

    readings: dict[str, Callable[[], Any]] = {
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
    }

    def read() -> dict[str, Any]:
        state = {}
        for name, reading in readings.items():
            try:
                state[name] = reading()
            except pynvml.NVMLError:  # a virtual GPU may report some of these and not others
                continue
        return state

    return read


def around(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both readings and whether the SM clock moved between them; {} where there are none."""
    if not before:
        return {}
    clocks = [state.get("sm_clock_mhz") for state in (before, after)]
    moved = None not in clocks and abs(clocks[1] - clocks[0]) > MOVED * clocks[0]
    return {"before": before, "after": after, "sm_clock_moved": moved}
