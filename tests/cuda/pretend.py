"""A device that is not the CPU, on the CPU: tensors of device "pretend" hold a CPU tensor, and PyTorch keeps the two
apart as it does with a GPU. A call that mixes them fails where CUDA's would, and so do reading one as an array and a
kernel that gets the address of a CPU tensor. What goes from one to the other can be watched (`watching`): also what
PyTorch moves unasked, and what waits for the device to know the size of its result.

`python -m tests.cuda.pretend MODEL:BACKEND ...` runs the engine and a patched model there, beside the same on the CPU:
what differs or mixes devices fails, and so does a decode step that crosses more often than `CROSSINGS` says. `python -m
tests.cuda.pretend rules` holds the device itself to PyTorch's rules. It is a program of its own because PyTorch takes
one such device a process, for good.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dschat_kernels.ops._common import capturing, offered

COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = (
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
)  # fmt: skip
"""Calls that take CPU indices into a tensor of a device, which they move there; never the other way round."""
SCALARS = ("aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_")
"""Calls besides the pointwise ones that take a CPU tensor of no dimension for a number."""
READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
"""Calls that give a number to Python; within an op they come as they were written, not taken apart."""
SIZED_BY_VALUES = (
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
)
"""Calls whose result has a size that only the device knows."""


@dataclass(frozen=True)
class Crossing:
    """Something that went between the CPU and the device. how: "to" or "from", as asked for, or "hidden"; name: of the
    call; where: the innermost function of the project that made it, "" where there is none."""

    how: str
    name: str
    where: str


_watchers: list[list[Crossing]] = []


@contextlib.contextmanager
def watching() -> Iterator[list[Crossing]]:
    """The crossings within."""
    found: list[Crossing] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers.remove(found)


def crosses(how: str, name: str) -> None:
    if not _watchers:
        return
    frame: Any = sys._getframe()
    while frame is not None and (
        not frame.f_globals.get("__name__", "").startswith(("dschat.", "dschat_kernels."))
        or frame.f_code.co_name.startswith("<")  # a comprehension is its function's
    ):
        frame = frame.f_back
    where = "" if frame is None else f"{frame.f_globals['__name__'].split('.')[-1]}.{frame.f_code.co_name}"
    for found in _watchers:
        found.append(Crossing(how, name, where))


def is_here(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Pretended)


def check_indexing(name: str, args: Any) -> None:
    """PyTorch's rules: indices on the CPU or with the tensor, values with the tensor or one number."""
    target, indices = args[0], [x for x in args[1] if x is not None]
    if is_here(target) and not all(map(is_here, indices)):
        raise RuntimeError(f"{name}: indices should be on the same device as the indexed tensor (cpu)")
    if (
        len(args) > 2
        and is_here(args[2]) != is_here(target)
        and not (is_here(args[2]) and args[2].dim() == 0)
    ):
        raise RuntimeError(f"{name}: expected all tensors on one device, found pretend and cpu")
    if is_here(target):
        return
    if any(map(is_here, indices)) or (len(args) > 2 and is_here(args[2])):
        crosses("hidden", f"{name} moves what it gets from the CPU")
    one_number = len(args) > 2 and args[2].numel() == 1  # PyTorch makes that a masked_fill
    if any(not is_here(x) and x.dtype in (torch.bool, torch.uint8) for x in indices) and not one_number:
        crosses("hidden", f"{name} waits for the size of what a mask selects")


def check_devices(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises for a call that a GPU would refuse, and notes one that crosses."""
    name = func._schema.name
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here, there = [x for x in given if is_here(x)], [x for x in given if not is_here(x)]
    if name == "aten::copy_" and is_here(args[0]) != is_here(args[1]):
        crosses("from" if is_here(args[0]) else "to", name)
    elif name == "aten::_to_copy" and kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]).type == "pretend"
        if goes == is_here(args[0]):
            crosses("to" if goes else "from", name)
    if not there or name in COPIES:
        return
    if name in INDEXING:
        return check_indexing(name, args)
    if here:
        number = torch.Tag.pointwise in func.tags or name in SCALARS or name.startswith("aten::_foreach_")
        written = [
            x
            for a, x in zip(func._schema.arguments, args, strict=False)
            if a.alias_info and a.alias_info.is_write
        ]
        if not number or any(x.dim() for x in here) or any(is_here(x) for x in tree_leaves(written)):
            raise RuntimeError(f"{name}: expected all tensors on one device, found pretend and cpu")
    if name in READS:
        crosses("from", name)
    elif name in SIZED_BY_VALUES or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        crosses("hidden", f"{name} waits for the size of its result")


def refuse_address(tensor: Tensor) -> int:
    if tensor.numel():
        raise RuntimeError("a kernel of the device would get the address of a CPU tensor")
    return 0


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
        inner = self.inner
        return inner.untyped_storage().data_ptr() + inner.storage_offset() * inner.element_size()

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
    check_devices(func, args, kwargs)
    if func.namespace == "dschat_cuda":  # its own implementation, on tensors of the device as on a GPU
        with Pretending():
            return offered("cuda")[func._opname](*args, **kwargs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    lands_there = bool(there) and name not in READS
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
    from dschat_kernels.ops import _common
    from dschat_kernels.ops._common import cuda_kernels
    from tests.cuda.emulated import emulated_module

    @contextlib.contextmanager
    def launching(device: torch.device) -> Iterator[None]:
        held, tensor = Tensor.data_ptr, Tensor  # type: Any, Any
        tensor.data_ptr = refuse_address
        try:
            with torch.device("pretend:0"), cuda_kernels(cuda.CudaKernels(emulated_module(), 0)):
                yield
        finally:
            tensor.data_ptr = held

    replaced: Any = cuda
    if backend == "cuda":  # for the rest of the process
        replaced.DEVICES, replaced.launching, replaced.unavailable = {"pretend"}, launching, lambda: None
    changed: Any = importlib.import_module("dschat_kernels.patch")
    plain, dtypes, swaps = (
        _common.PLAIN,
        changed._dtypes_on,
        torch.__future__.get_swap_module_params_on_conversion(),
    )
    _common.PLAIN = (*plain, Pretended)
    if backend == "cuda":
        changed._dtypes_on = lambda device: tuple(_common.DTYPES)
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # or Module.double() leaves what is inside as it was
    before = torch._C._only_lift_cpu_tensors()  # torch.tensor(..., device=) makes a CPU tensor and moves it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Pretending():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        _common.PLAIN, changed._dtypes_on = plain, dtypes


CROSSINGS = {
    "graphs": {"to graphs.fill": 2, "to cache.sync": 1, "to cache.prepare_append": 1, "from graphs.step": 1},
    "op by op": {
        "to executors._tensors": 2, "to cache.sync": 1, "to cache.prepare_append": 1, "to executors.sample": 2,
        "from sample.raise_for_bad_rows": 1, "from executors.sample": 2,
    },
    "generate": {
        "from hf_generate._run": 3, "to executors._tensors": 2, "to cache.sync": 1, "to cache.prepare_append": 1,
    },
}  # fmt: skip
"""What goes between the CPU and the device in one decode step, at most, by how it decodes: every one but a copy of a
fixed table to the device waits for it."""


@contextlib.contextmanager
def decode_steps_watched() -> Iterator[Counter[str]]:
    """Every decode step on the device is held to `CROSSINGS`; how many steps there were, by how they decoded."""
    from dschat_kernels.graphs import DecodeGraphs
    from dschat_kernels.hf_generate import FusedForward
    from dschat_kernels.plan import Decoder

    seen: Counter[str] = Counter()

    def held(kind: str, method: Any, counts: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            recorded = getattr(self, "recorded", 0)
            with watching() as crossings:
                result = method(self, *args, **kwargs)
            if counts(*args) and getattr(self, "recorded", 0) == recorded:  # recording warms up first
                found = Counter(f"{c.how} {c.where}" for c in crossings)
                over = {name: n for name, n in found.items() if n > CROSSINGS[kind].get(name, 0)}
                assert not over, f"{kind}: {over} of {crossings}"
                seen[kind] += 1
            return result

        return call

    steps: list[tuple[Any, str, str, Any]] = [
        (DecodeGraphs, "step", "graphs", lambda *args: True),
        (Decoder, "decode", "op by op", lambda *args: True),
        (FusedForward, "_run", "generate", lambda given: given["input_ids"].shape[1] == 1),
    ]
    before = [getattr(owner, name) for owner, name, *_ in steps]
    for (owner, name, kind, counts), method in zip(steps, before, strict=True):
        setattr(owner, name, held(kind, method, counts))
    try:
        yield seen
    finally:
        for (owner, name, *_), method in zip(steps, before, strict=True):
            setattr(owner, name, method)


class Rerunning:
    """A `GraphDevice` that runs the work again instead of recording it, into the results of the first time."""

    def warm_up(self, work: Any) -> None:
        work()

    def record(self, work: Any) -> Any:
        result = work()
        return (work, result), result

    def replay(self, graph: Any) -> None:
        work, result = graph
        with torch.no_grad(), capturing():
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
        back = there if away else (lambda x: x)
        with contextlib.ExitStack() as context:
            steps: Counter[str] = Counter()
            if away:
                context.enter_context(on_the_device(backend))
                move(model)
                if backend == "cuda":  # the reference looks at its arguments
                    steps = context.enter_context(decode_steps_watched())
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
            engine.graphs = None
            rollout = engine.generate(*batch, sampling)
            found += [back(rollout.completion_ids), back(rollout.logprobs)]
            rollout = HybridEngine(
                model, backend=engine.decoder.backend, rollout_weights="int8", cuda_graphs=False
            ).generate(*batch, sampling)
            found += [back(rollout.completion_ids), back(rollout.logprobs)]
            cache = engine.decoder.new_cache(1, 9)
            engine.decoder.step(torch.tensor([1, 2, 3]), cache, [0], [3])
            k, v = cache.gather(0, 0)
            cache.write(0, 0, 1, v[:, 1:2], k[:, 1:2])
            found += [back(k), back(cache.gather(0, 0)[0])]
            with dk.patch(model, backend=engine.decoder.backend) as patched:
                options = {
                    "max_new_tokens": 3,
                    "do_sample": False,
                    "pad_token_id": 0,
                    "eos_token_id": None,
                }
                found.append(back(model.generate(batch[0], attention_mask=batch[1], **options)))
                assert patched.report().notes == [], patched.report().notes
            if away and backend == "cuda":
                assert set(steps) == set(CROSSINGS), steps
            if name == "llama" and engine.decoder.backend == "cuda":
                for weights in ("model", "int8"):
                    certificate = verify(
                        model, max_new_tokens=3, backend=engine.decoder.backend, rollout_weights=weights
                    )
                    assert certificate.passed, certificate
        results.append(found)
    for i, (expected, got) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, i=i: f"result {i}: {m}")
    print(f"{name}: {len(results[0])} results agree")


def check_rules() -> None:
    """What CUDA refuses is refused, what it moves or waits for is seen, and what is right passes unseen."""
    x, here = Pretended(torch.tensor([1, 2, 3])), torch.tensor([0, 1])
    mask = torch.tensor([True, False, True])
    refused: list[Callable[[], Any]] = [
        lambda: x.add(here), lambda: torch.arange(9)[x], lambda: x.index_select(0, here), lambda: x.gather(0, here),
        lambda: torch.zeros(3).scatter_(0, x - 1, 1.0), lambda: x.masked_fill(mask, 0),
        lambda: x.clone().__setitem__(here, here), lambda: x.index_select(0, here[0]),
        lambda: torch.tensor(1).add_(x[0]), lambda: torch.stack([x[0], here[0]]), lambda: x.numpy(),
    ]  # fmt: skip
    seen: list[tuple[str, Callable[[], Any]]] = [
        ("hidden", lambda: x[here]), ("hidden", lambda: x[mask]), ("hidden", lambda: x[x > 1]),
        ("hidden", lambda: x.clone().__setitem__(here, 2)), ("hidden", lambda: x.nonzero()),
        ("hidden", lambda: x.masked_select(x > 1)), ("hidden", lambda: x.repeat_interleave(x)),
        ("to", lambda: x[[0, 1]]), ("to", lambda: here.to("pretend:0")), ("to", lambda: x.clone()[:2].copy_(here)),
        ("to", lambda: torch.tensor([1], device="pretend:0")), ("from", lambda: x.cpu()), ("from", lambda: int(x[0])),
        ("from", lambda: bool((x < 0).any())), ("from", lambda: torch.equal(x, x)), ("from", lambda: x.tolist()),
        ("from", lambda: here.clone().copy_(x[:2])),
    ]  # fmt: skip
    unseen: list[Callable[[], Any]] = [
        lambda: x + here[1], lambda: x.masked_fill(x > 1, here[1]), lambda: x[x - 1], lambda: x.index_select(0, x - 1),
        lambda: x.clone().__setitem__(x > 1, 5), lambda: torch.arange(3, device="pretend:0"), lambda: here[here],
        lambda: int(here[0]), lambda: x[1:],
    ]  # fmt: skip
    with on_the_device("reference"):
        for i, call in enumerate(refused):
            try:
                call()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError(f"call {i} is not refused")
        for i, (how, call) in enumerate([*seen, *(("", call) for call in unseen)]):
            with watching() as crossings:
                call()
            assert [c.how for c in crossings] == [how] * bool(how), (i, how, crossings)
    print(f"rules: {len(refused) + len(seen) + len(unseen)} hold")


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("pretend")
    for argument in sys.argv[1:]:
        check_rules() if argument == "rules" else run(*argument.split(":"))
