"""A device that is not the CPU, on the CPU: tensors of device "pretend" hold a CPU tensor, and PyTorch keeps the two
apart as it does with a GPU. A call that mixes them fails, and so does reading one as an array.

`python -m tests.cuda.pretend MODEL:BACKEND ...` runs the engine and a patched model there, beside the same on the
CPU: what differs or mixes devices fails. It is a program of its own because PyTorch takes one such device a process,
for good.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dschat_kernels.ops._common import offered

MIXING = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)
"""Calls that take tensors of both devices: copies, and CPU indices into a tensor of a GPU."""


class Pretended(Tensor):
    """A tensor of the device "pretend"."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("pretend", 0),
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert a tensor of device pretend to numpy: use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Any = Pretended(self.inner.detach().clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self, **options: Any) -> str:
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs a call on the tensors inside, and puts its results on the device that they belong to."""
    name = func._schema.name
    if func.namespace == "dschat_cuda":  # its own implementation, on tensors of the device as on a GPU
        with Pretending():
            return offered("cuda")[func._opname](*args, **kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    here = [x for x in given if not isinstance(x, Pretended) and x.dim() > 0]
    if there and here and name not in MIXING:
        raise RuntimeError(f"{name}: expected all tensors on one device, found pretend and cpu")
    lands_there = bool(there) and name != "aten::_local_scalar_dense"
    if kwargs.get("device") is not None:
        lands_there = torch.device(kwargs["device"]).type == "pretend"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::_to_copy":
        kwargs = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")}

    def unwrap(x: Any) -> Any:
        return x.inner if isinstance(x, Pretended) else x

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    known = {id(x.inner): x for x in there}  # what was written in place is itself

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return Pretended(x) if lands_there else x

    return tree_map(wrap, out)


class Pretending(TorchDispatchMode):
    """Makes the tensors that are asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def on_the_device(backend: str) -> Iterator[None]:
    """The device is there; the cuda backend takes its tensors and runs on the CPU."""
    import dschat_kernels.cuda as cuda
    from dschat_kernels.ops._common import cuda_kernels
    from tests.cuda.emulated import emulated_module

    @contextlib.contextmanager
    def launching(device: torch.device) -> Iterator[None]:
        with torch.device("pretend:0"), cuda_kernels(cuda.CudaKernels(emulated_module(), 0)):
            yield

    replaced: Any = cuda
    if backend == "cuda":  # for the rest of the process
        replaced.DEVICES, replaced.launching, replaced.unavailable = {"pretend"}, launching, lambda: None
    before = torch._C._only_lift_cpu_tensors()  # torch.tensor(..., device=) makes a CPU tensor and moves it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Pretending():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


class Rerunning:
    """A `GraphDevice` that runs the work again instead of recording it, into the results of the first time."""

    def warm_up(self, work: Any) -> None:
        work()

    def record(self, work: Any) -> Any:
        result = work()
        return (work, result), result

    def replay(self, graph: Any) -> None:
        work, result = graph
        with torch.no_grad():
            result.copy_(work())


def move(model: nn.Module) -> nn.Module:
    """`model.to("pretend")`."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(Pretended(parameter.detach().clone()))
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = Pretended(buffer.detach().clone())
    return model


def there(x: Tensor) -> Tensor:
    """x, which must be on the device, brought back."""
    assert x.device.type == "pretend", f"a result is on {x.device}"
    return x.cpu()


def run(name: str, backend: str) -> None:
    """Rollout, log-probs, a step, another rollout and a patched `generate`: there and here."""
    import dschat_kernels as dk
    from dschat import HybridEngine, SamplingConfig
    from dschat.engine.verify import verify
    from dschat_kernels.graphs import DecodeGraphs
    from tests.tiny_models import build

    ids = torch.tensor([[0, 0, 1, 3, 7], [1, 4, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    sampling = SamplingConfig(max_new_tokens=4, n=2, top_k=9, seed=5)
    results = []
    for away in (False, True):
        model = build(name, num_hidden_layers=1) if name != "gpt2" else build(name)
        context = on_the_device(backend) if away else contextlib.nullcontext()
        back = there if away else (lambda x: x)
        with context:
            if away:
                move(model)
            batch = (ids.to("pretend:0"), mask.to("pretend:0")) if away else (ids, mask)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            engine = HybridEngine(model, optimizer, backend=backend if away else "reference")
            if away and backend == "cuda":
                engine.graphs = DecodeGraphs(engine.decoder, Rerunning())
            found = []
            for _ in range(2):
                rollout = engine.generate(*batch, sampling)
                assert engine.graphs is None or rollout.stats.graph_steps == rollout.stats.steps > 0
                logprobs = engine.logprobs(rollout)
                found += [back(rollout.completion_ids), back(rollout.logprobs), back(logprobs.detach())]
                engine.backward(-(logprobs * rollout.completion_mask).mean())
                engine.step(max_grad_norm=1.0)
            cache = engine.decoder.new_cache(1, 9)
            engine.decoder.step(torch.tensor([1, 2, 3]), cache, [0], [3])
            k, v = cache.gather(0, 0)
            cache.write(0, 0, 1, v[:, 1:2], k[:, 1:2])
            found += [back(k), back(cache.gather(0, 0)[0])]
            with dk.patch(model, backend=engine.decoder.backend):
                options = {
                    "max_new_tokens": 3,
                    "do_sample": False,
                    "pad_token_id": 0,
                    "eos_token_id": None,
                }
                found.append(back(model.generate(batch[0], attention_mask=batch[1], **options)))
            if name == "llama" and engine.decoder.backend == "cuda":
                certificate = verify(model, max_new_tokens=3, backend=engine.decoder.backend)
                failed = [c.name for c in certificate.checks if not c.passed]
                # Module.double() does not reach tensors of this device: its float64 is float32. And they are a subclass
                # of Tensor, which a patched forward leaves to transformers.
                excused = (
                    "logits, max error",
                    "logits, mean error",
                    "forwards of the patched model",
                    "patched forward",
                )
                assert all(c.startswith(excused) for c in failed), certificate
        results.append(found)
    for i, (expected, got) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}")
    print(f"{name}: {len(results[0])} results agree")


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("pretend")
    for argument in sys.argv[1:]:
        run(*argument.split(":"))
