"""Bringing a step's pages from the host, layer by layer beside compute: the stream, its order, who waits for what.

Owns the stream of the copies and the events on it. Does not own which pages and chunks (`kv_cache`, a benchmark), nor
how pages are moved (`kv_copies`).

Copies are enqueued AHEAD layers before the layers. All of them beforehand would keep the host from enqueueing the
first layer: 0.4 µs for each copy, 3.2 ms for eight users of 4096 tokens in eight layers. One layer's alone would leave
the bus idle while the host prepares the step's rows and page table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.kv_copies import Mover

AHEAD = 2
"""Layers whose copies are enqueued beside the one that is to be computed."""


@dataclass(slots=True)
class Span:
    """One step's copies on the stream that they run on."""

    begun: torch.cuda.Event
    done: torch.cuda.Event
    """To be asked once all copies of the step are enqueued."""

    def nanoseconds(self) -> int:
        """From the turn of the first copy to the end of the last one, which must be over."""
        milliseconds: float = self.begun.elapsed_time(self.done)
        return round(milliseconds * 1e6)


class Onload:
    """Copies of one step after another, each enqueued whole before the next begins.

    Without a GPU a step's pages are there when `start` returns, and nothing waits.
    """

    def __init__(self, pool: torch.Tensor, chunk_pages: int, overlap: bool = True) -> None:
        """As `Mover`. With `overlap` False, whoever computes waits for all copies of a step before its first layer."""
        self._layers, self._overlap, self._device = len(pool), overlap, pool.device
        self.stream: torch.cuda.Stream | None = None
        if pool.is_cuda:
            # the few programs of a copy by a kernel go before those of a layer
            self.stream = torch.cuda.Stream(pool.device, priority=-1)
        self._mover = Mover(pool, chunk_pages, to_host=False, stream=self.stream)
        if self.stream is not None:
            # the pool and the mover's table are there before anything is copied
            self.stream.wait_stream(torch.cuda.current_stream(pool.device))
        self._arrived: list[torch.cuda.Event] = []
        self._enqueued = self._layers
        self._span: Span | None = None

    @property
    def under_way(self) -> bool:
        """Whether copies of the last step remain to be enqueued."""
        return self._enqueued < self._layers

    def start(
        self,
        chunks: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int32],
        span: Span | None = None,
        after: Iterable[torch.cuda.Event] = (),
    ) -> None:
        """Begin with the copies of a step, after those of the step before; addresses and pages as `Mover.take`.

        On a GPU `span` is recorded, and copies wait for the events `after`. With `overlap` the first layers' copies are
        enqueued, else all of them, and the current stream waits.
        """
        if self.stream is None:
            self._mover.take(chunks, pages)
            self._mover.all_layers()
            return
        assert span is not None and not self.under_way
        if not self._arrived:
            # one for each layer, recorded again by every step: who was told to wait waits for what it was then
            self._arrived = [torch.cuda.Event() for _ in range(self._layers)]
        for event in after:
            self.stream.wait_event(event)
        span.begun.record(self.stream)
        self._mover.take(chunks, pages)
        self._enqueued, self._span = 0, span
        self.advance(1 + AHEAD if self._overlap else self._layers)
        if not self._overlap:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[-1])

    def advance(self, end: int) -> bool:
        """Enqueue the copies of the layers before `end`, as far as they are not yet; whether these were the last."""
        if not self.under_way:
            return False
        assert self.stream is not None and self._span is not None
        for layer in range(self._enqueued, min(end, self._layers)):
            self._mover.layer(layer)
            self._arrived[layer].record(self.stream)
        self._enqueued = max(self._enqueued, min(end, self._layers))
        if not self.under_way:
            self._span.done.record(self.stream)
        return not self.under_way

    def wait(self, layer: int, current: torch.cuda.Stream | None = None) -> bool:
        """Have a stream (None: the current one) wait for a layer's copies, those of the layers behind it enqueued.

        To be called for one layer after the other, and only for a step with copies. True where that was the call that
        enqueued the last of them.
        """
        if self.stream is None:
            return False
        last = self.advance(layer + 1 + AHEAD)
        (current or torch.cuda.current_stream(self._device)).wait_event(self._arrived[layer])
        return last

    def settle(self) -> None:
        """Wait until what is enqueued is done."""
        for event in self._arrived:
            event.synchronize()
