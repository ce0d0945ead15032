"""CUDA graphs without a GPU: a `GraphDevice` that records the calls of torch and of dschat on CPU tensors.

It holds what a graph holds: the calls, the tensors they made (the graph's own memory), and for everything else an
address only. So it fails as a graph does, or would silently compute rubbish: a host read while recording, memory that
was freed or moved since. What it cannot show is whether CUDA accepts the recording: that takes a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dschat_kernels.ops._common import offered

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")


def refuse(what: str) -> Any:
    raise RuntimeError(f"operation not permitted while a graph is recorded: {what} waits for the GPU")


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in HOST_READS:
            refuse(func._schema.name)
        return func(*args, **(kwargs or {}))


def _inside(func: Any) -> Any:
    """What an op runs: an op of dschat itself would run its implementation out of sight of the mode."""
    if func.namespace.startswith("dschat_"):
        return offered(func.namespace.removeprefix("dschat_"))[func._opname]
    return func


@dataclass
class Address:
    """A tensor that the graph does not own."""

    storage: StorageWeakRef
    place: int
    geometry: tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]

    def tensor(self) -> torch.Tensor:
        if self.storage.expired():
            raise RuntimeError("the graph reads memory that was freed after it was recorded")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        offset, size, stride, dtype = self.geometry
        if storage.data_ptr() != self.place:
            raise RuntimeError("the graph reads memory that was moved after it was recorded")
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)  # type: ignore[call-overload, no-any-return]


@dataclass
class Graph:
    """calls: (function, arguments, keyword arguments, results it makes)."""

    calls: list[tuple[Any, Any, Any, list[torch.Tensor]]]

    def replay(self) -> None:
        def resolve(x: Any) -> Any:
            return x.tensor() if isinstance(x, Address) else x

        for function, args, kwargs, made in self.calls:
            out = function(*tree_map(resolve, args), **tree_map(resolve, kwargs))
            if made:
                results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
                for place, value in zip(made, results, strict=True):
                    place.copy_(value)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph([])
        self.own: dict[int, torch.Tensor] = {}  # by address of the storage

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.untyped_storage().data_ptr() in self.own or x.dim() == 0:
            return x
        storage = x.untyped_storage()
        geometry = (x.storage_offset(), tuple(x.shape), x.stride(), x.dtype)
        return Address(StorageWeakRef(storage), storage.data_ptr(), geometry)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in HOST_READS:
            refuse(func._schema.name)
        with _NoHostReads():
            out = _inside(func)(*args, **kwargs)
        given = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        fresh = [x for x in results if x.untyped_storage().data_ptr() not in given]
        if not fresh and not func._schema.is_mutable:
            return out  # a view
        assert not fresh or len(fresh) == len(results), func
        self.graph.calls.append(
            (func, tree_map(self._argument, args), tree_map(self._argument, kwargs), fresh)
        )
        for x in fresh:
            self.own[x.untyped_storage().data_ptr()] = x
            if x.dtype.is_floating_point:
                x.fill_(float("nan"))  # recording computes nothing
        return out


@contextlib.contextmanager
def _no_reads_past_the_dispatcher() -> Iterator[None]:
    """Tensor.tolist, Tensor.numpy and torch.from_numpy, which do not pass through it, are refused too."""
    tensor: Any = torch.Tensor
    held = tensor.tolist, tensor.numpy, torch.from_numpy
    tensor.tolist = lambda self: refuse("tolist")
    tensor.numpy = lambda self, **options: refuse("numpy")
    torch.from_numpy = lambda array: refuse("from_numpy")  # type: ignore[assignment]
    try:
        yield
    finally:
        tensor.tolist, tensor.numpy, torch.from_numpy = held


class RecordingGraphs:
    """The stand-in for graphs.CudaGraphs."""

    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Graph, Any]:
        recorder = _Recorder()
        with _no_reads_past_the_dispatcher(), recorder:
            result = work()
        self.graphs.append(recorder.graph)
        return recorder.graph, result

    def replay(self, graph: Graph) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            graph.replay()
