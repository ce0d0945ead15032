"""A decode step as CUDA graphs: recorded once for each size of batch, then replayed with one call of the driver.

A step of `n` rows runs in the smallest bucket of at least `n`: rows that fill it up live in the cache's padding slot.
What varies from step to step (tokens, positions, lengths, slots, page tables, random streams) is read from device
memory at fixed addresses, so one recording serves every length and every batch. A step is two recordings, replayed
one after the other without the CPU between them: `forward` (the plan, from tokens to logits) is kept as long as its
pointers are, through weight updates too, since packs are refreshed in place; `draw` (the sampling) has the sampling
settings and the seed among its constants, and is recorded anew when these change, which costs one small op.

`GraphDevice` is all that is asked of the device: `CudaGraphs` is PyTorch's, tests have one that records on the CPU.
Where recording fails, steps run op by op, and `DecodeGraphs.reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .cache import PagedKVCache
from .executors import PythonExecutor, StepTensors
from .kept_cache import KeptCache
from .ops._common import capturing, say_once
from .ops.sample import raise_for_bad_rows, sample
from .plan import Decoder, check_length


class GraphDevice(Protocol):
    """Recording and replaying of what is launched on one device."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Runs `work` away from the current stream, and waits for it: kernels are compiled and loaded before any
        recording."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """(the graph of what `work` launches, what `work` returned). Nothing is computed. Tensors that `work`
        returned keep their place as long as the graph is kept. Raises RuntimeError for what no graph can hold."""

    def replay(self, graph: Any) -> None:
        """Launches a graph on the current stream."""


class CudaGraphs:
    """`GraphDevice` of a CUDA device, by torch.cuda.CUDAGraph. All graphs share one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        self.stream.synchronize()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = work()
        return graph, result

    def replay(self, graph: Any) -> None:
        with torch.cuda.device(self.device):
            graph.replay()


def bucket_of(rows: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... that holds `rows`."""
    size = 1
    while size < rows:
        size *= 2
    return 3 * size // 4 if size >= 32 and rows <= 3 * size // 4 else size


class _Bucket:
    """The tables of a batch size at fixed places, and what was recorded with them."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        width = -(-size // 4) * 4  # rows of a table begin at multiples of 16 bytes
        self.long = np.zeros((3, width), dtype=np.int64)  # tokens, streams, counts
        self.short = np.zeros((3, width), dtype=np.int32)  # positions, slots, lengths
        self.device_long = torch.zeros(3, width, dtype=torch.int64, device=device)
        self.device_short = torch.zeros(3, width, dtype=torch.int32, device=device)
        tokens, self.streams, self.counts = (row[:size] for row in self.device_long)
        positions, slots, lengths = (row[:size] for row in self.device_short)
        bounds = torch.arange(size + 1, dtype=torch.int32, device=device)
        selected = torch.arange(size, device=device)
        self.tables = StepTensors(tokens, positions, slots, bounds, lengths, slots, selected, True)
        self.forward: Any = None
        self.draw: Any = None
        self.draws: Any = None  # the sampling that `draw` was recorded with
        self.logits: Tensor | None = None
        self.drawn: Tensor | None = None  # float64 [2, size]: tokens and log-probs

    def fill(
        self,
        tokens: np.ndarray,
        streams: np.ndarray,
        counts: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        padding: int,
    ) -> None:
        """Puts the rows of a step where the recording reads them, and padding behind them."""
        n = len(tokens)
        if n > self.size:
            raise ValueError(f"{n} rows do not fit the {self.size} of this graph: use a larger bucket.")
        self.long[:, n:] = 0
        for row, values in zip(self.long, (tokens, streams, counts), strict=True):
            row[:n] = values
        self.short[:, n:] = np.array([[0], [padding], [1]])
        for place, values in zip(self.short, (lengths, slots, lengths + 1), strict=True):
            place[:n] = values
        self.device_long.copy_(torch.from_numpy(self.long), non_blocking=True)
        self.device_short.copy_(torch.from_numpy(self.short), non_blocking=True)

    def fill_with_padding(self, padding: int) -> None:
        none = np.zeros(0, dtype=np.int64)
        self.fill(none, none, none, none, none, padding)


class DecodeGraphs(KeptCache):
    """Decode steps of a `Decoder` by recording and replaying, for the cache that `new_cache` made last: kept, what was
    recorded with it stays good.

    Args:
        decoder: on the triton or cuda backend; another one's ops read their arguments on the CPU.
        device: default the CUDA device of the decoder.

    `recorded` and `replayed` count; `reason` says why steps run op by op, or is None.
    """

    def __init__(self, decoder: Decoder, device: GraphDevice | None = None):
        super().__init__(decoder, padding=True)
        self.device = device or CudaGraphs(decoder.device)
        self.reason: str | None = None
        self.recorded = self.replayed = 0
        self.executor = PythonExecutor(decoder)
        self._forget()

    # ------------------------------------------------------------------------------------------------ memory

    def release(self) -> None:
        """Gives up the recordings and the cache, for instance to train in their memory; later steps record anew."""
        self._forget()
        super().release()

    def _forget(self) -> None:
        """Drops the recordings."""
        self._buckets: dict[int, _Bucket] = {}
        self._addresses: Any = None
        self._bindings = -1

    # ----------------------------------------------------------------------------------------------- a step

    def step(
        self,
        tokens: np.ndarray,
        slots: Sequence[int],
        streams: np.ndarray,
        counts: np.ndarray,
        sampling: Mapping[str, Any],
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Appends one token to each row of the cache and draws its next: (tokens int64, log-probs float32), each
        [rows]; None where nothing can be recorded, see `reason`: nothing was changed then.

        streams, counts: of the draws, int64 [rows]. sampling: temperature, top_k, top_p, min_p and seed of `sample`.

        Raises OutOfPages, and ValueError for a row that is too long or has no token to draw.
        """
        cache = self.cache
        if self.reason is not None or cache is None:
            return None
        places = np.asarray(slots, dtype=np.int64)
        check_length(self.decoder.limit, int(cache._lengths[places].max()) + 1)
        try:
            bucket = self._ready(bucket_of(len(places)), cache, sampling)
        except RuntimeError as error:
            self._forget()
            self.reason = f"no CUDA graph of a decode step could be recorded: {error}".strip()
            say_once(f"{self.reason}; steps run op by op.")
            return None
        cache.prepare_append(places, 1)
        cache.sync()
        padding: Any = cache.padding_slot
        bucket.fill(tokens, streams, counts, places, cache._lengths[places], padding)
        self.device.replay(bucket.forward)
        self.device.replay(bucket.draw)
        cache.advance(places, 1)
        self.replayed += 1
        assert bucket.drawn is not None
        drawn = bucket.drawn.cpu()[:, : len(places)]  # the one time a step waits for the GPU
        chosen = drawn[0].to(torch.int64)
        raise_for_bad_rows(chosen, sampling["temperature"])
        return chosen.numpy(), drawn[1].to(torch.float32).numpy()

    def _ready(self, size: int, cache: PagedKVCache, sampling: Mapping[str, Any]) -> _Bucket:
        """The bucket with both recordings, made where they are not there or no longer true."""
        self.decoder.rope_tables(cache.max_length)  # they must not grow, that is move, while rows do
        if self._bindings != self.decoder.bindings:
            addresses = self.decoder.addresses()
            if addresses != self._addresses:
                self._forget()
            self._addresses, self._bindings = addresses, self.decoder.bindings
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = _Bucket(size, self.decoder.device)
            padding: Any = cache.padding_slot
            cache.sync()
            bucket.fill_with_padding(padding)  # a step while warming up changes nothing but the padding page
        if bucket.forward is None:
            bucket.forward, bucket.logits = self._record(lambda: self.executor.walk(bucket.tables, cache))
        if bucket.draw is None or bucket.draws != sampling:
            bucket.draws = None
            bucket.draw, bucket.drawn = self._record(lambda: self._draw(bucket, sampling))
            bucket.draws = dict(sampling)
        return bucket

    def _record(self, work: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        with capturing(), torch.no_grad():
            self.device.warm_up(work)
            made: tuple[Any, Tensor] = self.device.record(work)
        self.recorded += 1
        return made

    def _draw(self, bucket: _Bucket, sampling: Mapping[str, Any]) -> Tensor:
        """Tokens and log-probs side by side, so that one copy fetches both; float64 holds either exactly."""
        assert bucket.logits is not None
        tokens, logprobs = sample(
            bucket.logits, **sampling, streams=bucket.streams, positions=bucket.counts,
            backend=self.decoder.backend,
        )  # fmt: skip
        return torch.stack([tokens.double(), logprobs.double()])
