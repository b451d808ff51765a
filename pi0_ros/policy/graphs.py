"""CUDA graphs: a function over static buffers is recorded once and launched as one from then on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable

import torch

_CAPTURING = threading.Lock()  # what another thread launched on the side stream meanwhile would be recorded, too


class Graphs:
    """Runs functions that read and write only buffers that stay; captures each key's first run when enabled."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Call `function`, or launch the graph recorded of it. `key` names everything that it depends on."""
        if not self.enabled:
            function()
            return
        if key in self._graphs:
            self._graphs[key].replay()
            return
        with _CAPTURING:
            self._capture(key, function)

    def _capture(self, key: Hashable, function: Callable[[], None]) -> None:
        # The run that counts comes first, on a side stream: libraries set themselves up lazily in it, which a capture
        # does not allow. The capture itself computes nothing. One stream for both and for all graphs: cuBLAS keeps a
        # workspace of 32 MB for every stream that it has seen.
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # Other threads may allocate meanwhile, as a second policy does.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
        self._graphs[key] = graph


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
