"""The clocks, each with a name that says what it can see.

    gpu cold   device time alone: replay of a CUDA graph, the second-level cache overwritten before every step
    gpu warm   the same without overwriting, over ROTATION sets of inputs in turn
    wall       what a user waits for: Python, launches and device, ROTATION steps back to back, then one synchronisation
    cpu        perf_counter around one step on the CPU

A step is a callable of one integer, which of the ROTATION sets of inputs to work on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

Step = Callable[[int], object]
Sampler = Callable[[], float]  # runs what it times and returns seconds per step

ROTATION = 5
FLUSH_FACTOR = 2  # of the second-level cache's size, overwritten before a cold step


def cpu(step: Step) -> Sampler:
    """One step on the CPU."""
    turn = itertools.cycle(range(ROTATION))

    def sample() -> float:
        i = next(turn)
        start = time.perf_counter()
        step(i)
        return time.perf_counter() - start

    return sample


def wall(step: Step) -> Sampler:
    """One of ROTATION eager steps, host work included."""

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(ROTATION):
            step(i)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / ROTATION

    return sample


def gpu_cold(step: Step) -> Sampler:
    """One graph replay that finds nothing of its inputs in the second-level cache."""
    turn = itertools.cycle(_capture(step))
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSH_FACTOR * cache, dtype=torch.int8, device="cuda")

    def sample() -> float:
        graph = next(turn)
        flush.zero_()
        return _between_events(graph.replay)

    return sample


def gpu_warm(step: Step) -> Sampler:
    """One of ROTATION graph replays in turn."""
    graphs = _capture(step)

    def replay_all() -> None:
        for graph in graphs:
            graph.replay()

    return lambda: _between_events(replay_all) / ROTATION


CLOCKS: dict[str, dict[str, Callable[[Step], Sampler]]] = {
    "cpu": {"cpu": cpu},
    "cuda": {"gpu cold": gpu_cold, "gpu warm": gpu_warm, "wall": wall},
}


def _between_events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _capture(step: Step) -> list[torch.cuda.CUDAGraph]:
    """One graph for each set of inputs; they replay in turn and nothing reads their outputs, so they share a pool."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls compile, initialise libraries and allocate, which a capture must not
        for i in range(ROTATION):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    graphs = [torch.cuda.CUDAGraph() for _ in range(ROTATION)]
    pool = torch.cuda.graph_pool_handle()
    for i, graph in enumerate(graphs):
        with torch.cuda.graph(graph, pool=pool):
            step(i)
    return graphs
