"""The hybrid engine on a DeepSpeed engine: ZeRO 0 to 3, with the optimizer or the parameters in the CPU's memory.

DeepSpeed keeps the optimizer's state, the gradients (2) and the weights (3) in shards and steps them; everything
else is what one process does. Under ZeRO-3 nothing relies on module hooks: the forward is cut into segments (what is
before the layers, each layer, the end, the head), and the weights of a segment are whole only while it runs, in the
forward and again in the backward, which computes the segment anew. Packing for a rollout gathers a layer at a time.
No parameter stays gathered, whatever raises.

What DeepSpeed-Chat's own engine got wrong here is listed with our tests in tests/distributed/test_ledger.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dschat_kernels.plan import Decoder

from .. import parallel
from .hybrid_engine import HybridEngine
from .packed import PackedModel
from .precision import LossScale, MasterOptimizer, with_masters
from .stepper import Stepper, check_max_grad_norm


@dataclass(frozen=True)
class ZeroSettings:
    """stage: 0 nothing is sharded, 1 the optimizer's state, 2 the gradients too, 3 the weights too.
    offload: optimizer state (and with stage 3 the weights' shards) lie in the CPU's memory. config: a DeepSpeed
    configuration to lay under that."""

    stage: int = 0
    offload: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, stage: int | None, offload: bool, path: str) -> ZeroSettings | None:
        """From a run's keys; None where they ask for no DeepSpeed. Raises ValueError, one sentence, for a file that
        cannot be used, and for settings that contradict each other."""
        if stage is None and not path:
            if offload:
                raise ValueError("offload is true without ZeRO: set zero_stage to 1, 2 or 3.")
            return None
        config = read_config(path) if path else {}
        own = int(config.get("zero_optimization", {}).get("stage", 0))
        if stage is not None and path and "zero_optimization" in config and stage != own:
            raise ValueError(f"zero_stage is {stage} and {path} has stage {own}: keep one of the two.")
        stage = own if stage is None else stage
        if offload and stage == 0:
            raise ValueError(
                "offload is true and zero_stage 0: set zero_stage to 1, 2 or 3, or leave offload out."
            )
        return cls(stage, offload, config)

    def require_wide_sums(self, path: str) -> None:
        """Raises ValueError, one sentence, where the configuration wants gradients of float16 added up in less than
        float32: a sum could overflow that `ZeroStepper.ready` has vouched for."""
        types: Mapping[str, Any] = self.config.get("data_types", {})
        wanted = {"communication_data_type": self.config.get("communication_data_type")}
        wanted |= {f"data_types.{key}": types.get(key) for key in ("grad_accum_dtype", "param_dtype")}
        for key, value in wanted.items():
            if value not in (None, "fp32"):
                raise ValueError(
                    f"dtype is float16 and {path} has {key} {value}, but float16's gradients are added up in float32; "
                    f"leave {key} out, or set it to fp32."
                )

    def at(self, stage: int | None) -> ZeroSettings:
        """The same with another stage; None: the same."""
        return self if stage is None else ZeroSettings(stage, self.offload and stage > 0, self.config)


OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "steps_per_print", "hybrid_engine",
)  # fmt: skip
"""Keys of a DeepSpeed file that the run's own keys decide."""
REFUSED = {
    "optimizer": "give learning_rate, weight_decay and adam_beta1 as keys of the run",
    "scheduler": "give lr_schedule and warmup_steps as keys of the run",
    "fp16": "give dtype, loss_scale and the other settings of float16 as keys of the run",
}


def read_config(path: str) -> dict[str, Any]:
    """A DeepSpeed configuration file (JSON). "auto" values are left out; what the run decides is left out with a
    note; what would change the run's result is refused."""
    if not os.path.isfile(path):
        raise ValueError(f"deepspeed is {path}, which is no file: give DeepSpeed's JSON configuration.")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON (line {error.lineno}): {error.msg}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, but it holds a {type(config).__name__}.")
    config = _without_auto(config)
    for key, instead in REFUSED.items():
        if config.get(key) and config[key] != {"enabled": False}:
            raise ValueError(f"{path} has {key}, which is not passed on: {instead}.")
        config.pop(key, None)
    if ignored := [key for key in OURS if config.pop(key, None) is not None]:
        warnings.warn(
            f"{', '.join(ignored)} of {path} have no effect: the run's own keys decide", stacklevel=2
        )
    return config


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value


def deepspeed_config(settings: ZeroSettings, dtype: torch.dtype) -> dict[str, Any]:
    """What `deepspeed.initialize` gets. dtype: of what the optimizer has; DeepSpeed's stages 1 to 3 make float32
    masters of 16 bits. Of float16 it hears nothing: it then adds gradients up in float32, where a sum of finite ones is
    finite, and unscales by what it is told."""
    config = {k: v for k, v in settings.config.items() if k != "bf16"}
    zero = {
        "overlap_comm": False,  # streams of other ranks' gradients would need bucket memory twice
        # It would stand in the place of torch's linear for the rest of the process; a segment keeps no weights anyway.
        "memory_efficient_linear": False,
        **config.pop("zero_optimization", {}),
        "stage": settings.stage,
        # Every parameter is gathered for its segment and let go: none is exempt.
        "stage3_param_persistence_threshold": 0,
    }
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    half = dtype == torch.bfloat16
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # step() says to what
        "managed_gradient_accumulation": False,  # the trainer says when to step
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        **({"data_types": {"grad_accum_dtype": "bf16"}} if half else {}),
        "zero_optimization": zero,
    }


def deepspeed(device: torch.device | None = None) -> Any:
    """The package, quiet. device: what it is to run on, which it decides when it is first imported. Raises ImportError
    with what to do."""
    try:
        os.environ.setdefault("DS_BUILD_OPS", "0")
        if device is not None and device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
    except ImportError as error:
        raise ImportError(
            f"ZeRO needs DeepSpeed, which cannot be imported ({error}); run: pip install 'dschat[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel("ERROR")
    # It would compile an all-reduce over shared memory when the first engine is made, every process waiting on the
    # lock of one, or of one that was killed. PyTorch's gloo does that work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settle_deepspeed() -> None:
    """Before transformers saves a model: it then imports DeepSpeed, where that is installed, which says on standard
    output what device it has chosen. Imported here it is quiet, and takes the same."""
    if "deepspeed" not in sys.modules and importlib.util.find_spec("deepspeed") is not None:
        with contextlib.suppress(ImportError):  # transformers then raises its own
            deepspeed(None if torch.cuda.is_available() else torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ whole weights


def parameters_of(modules: Iterable[Any]) -> list[Any]:
    """The parameters of some modules, each once."""
    found = {id(p): p for module in modules for p in module.parameters()}
    return list(found.values())


@contextlib.contextmanager
def whole(parameters: Iterable[Any], write: bool = False) -> Iterator[None]:
    """Inside, these parameters are whole on every process; outside, those that ZeRO-3 shards are shards again. All
    processes must enter. write: what the lead writes into them is kept, on all."""
    missing = {
        id(p): p for p in parameters if hasattr(p, "ds_id") and (write or p.ds_status.name == "NOT_AVAILABLE")
    }
    if not missing:
        yield
        return
    # Each only once and only if it is not whole already: DeepSpeed gathers a parameter twice otherwise, and the
    # inner of two contexts lets go of what the outer one still reads.
    with deepspeed().zero.GatheredParameters(list(missing.values()), modifier_rank=0 if write else None):
        yield


def held(parameter: Any) -> Tensor:
    """What this process has of a parameter: under ZeRO-3 its shard, flat and padded, else all of it."""
    found: Tensor = getattr(parameter, "ds_tensor", parameter)
    return found


def float_copies(parameters: Sequence[nn.Parameter]) -> nn.ParameterList:
    """float32 copies of parameters, cut into the same shards where ZeRO-3 shards those. All processes must call."""
    with whole(parameters):
        copies = nn.ParameterList([nn.Parameter(p.detach().float().clone()) for p in parameters])
    if any(hasattr(p, "ds_id") for p in parameters):
        shard(copies, torch.float32, copies[0].device)
    return copies


def shard(module: nn.Module, dtype: torch.dtype, device: torch.device, host: bool = False) -> None:
    """Cuts the parameters of a module that DeepSpeed does not train into ZeRO-3's shards, on `device`, where they are
    whole when they are gathered, or in the host's memory. All processes must call."""
    ds = deepspeed(device)
    parallel.start(device, alone=True)
    zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}  # as deepspeed_config()
    if host:
        zero["offload_param"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    ds.zero.Init(module=module, dtype=dtype, config_dict_or_path=config)


def gather_modules(modules: Sequence[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """`whole` for the parameters of some modules."""
    return whole(parameters_of(modules))


class _Segment(torch.autograd.Function):
    """f(x) with the weights whole while f runs. They are not kept for the backward, which gathers them again, runs
    f again, and lets the gradients of its weights flow into the shards before it lets go."""

    @staticmethod
    def forward(ctx: Any, f: Any, modules: Any, anchor: Tensor, x: Tensor) -> Any:
        ctx.f, ctx.modules = f, modules
        ctx.save_for_backward(x)
        with gather_modules(modules):
            return f(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        with gather_modules(ctx.modules):
            with torch.enable_grad():
                found = ctx.f(x)
            outputs = found if isinstance(found, tuple) else (found,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        # Into the shards before the next segment: a weight that two segments share (an embedding that is the head
        # too) may not wait in a bucket twice.
        for optimizer in {id(o): o for o in _sharded_by(ctx.modules)}.values():
            optimizer.independent_gradient_partition_epilogue()
        return None, None, None, x.grad


def _sharded_by(modules: Sequence[Any]) -> list[Any]:
    """The DeepSpeed optimizers that shard the trained parameters of some modules."""
    return [
        p._z3_optimizer for p in parameters_of(modules) if p.requires_grad and hasattr(p, "_z3_optimizer")
    ]


def sharded_segment(modules: Sequence[Any], f: Callable[[Tensor], Any], x: Tensor) -> Any:
    """f(x), differentiable in x and in the parameters of `modules`, which are whole only while f runs."""
    trained = any(p.requires_grad for p in parameters_of(modules))
    if torch.is_grad_enabled() and (trained or x.requires_grad):
        anchor = torch.zeros((), requires_grad=trained, device=x.device)
        return _Segment.apply(f, modules, anchor, x)
    with gather_modules(modules):
        return f(x)


# ---------------------------------------------------------------------------------------------------- the engine


class _Loss(nn.Module):
    """What DeepSpeed is given as the model: it owns the weights, and its forward hands the loss through. So what
    DeepSpeed does around a forward happens once before each backward, and however often the model ran before."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer."""
    device = next(model.parameters()).device
    ds = deepspeed(device)
    parallel.start(device, alone=True)
    dtype = optimizer.param_groups[0]["params"][0].dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, inner, *_ = ds.initialize(
            model=_Loss(model), optimizer=optimizer, dist_init_required=False,
            config=deepspeed_config(settings, dtype),
        )  # fmt: skip
    return engine, inner


class WholeStepper(Stepper):
    """`Stepper` through DeepSpeed's stage 0, where every process has everything: gradients are put together and masters
    kept as without DeepSpeed, and its engine steps."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings,
        loss_scale: LossScale | None = None,
    ):  # fmt: skip
        super().__init__(with_masters(optimizer), loss_scale)
        self.engine, _ = _initialize(model, optimizer, settings)
        self.engine.enable_backward_allreduce = False  # `ready` adds up, in float32

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(self.engine(loss))

    def _step(self) -> None:
        self.engine.step()
        if isinstance(self.optimizer, MasterOptimizer):
            self.optimizer.round()


class ZeroStepper(Stepper):
    """`Stepper` through DeepSpeed's stages 1 to 3. `optimizer` has the interface of a torch optimizer's state:
    param_groups, state_dict and load_state_dict, whole and in the order of the optimizer that was given.

    With a loss scale every process's gradients are those of the scaled loss, as without DeepSpeed, which takes their
    mean and then the rest of the scale out of it.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings,
        loss_scale: LossScale | None = None,
    ):  # fmt: skip
        self.settings = settings
        self._limit: float | None = None
        self._backwards, self._bound = 0, 0.0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._squares = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        if len({p.dtype for p in parameters}) > 1:
            # DeepSpeed shards weights of one dtype: a head of 16 bits beside a float32 adapter is its own master.
            for parameter in parameters:
                parameter.data = parameter.data.float()
        for parameter in parameters:
            parameter.register_hook(self._look)
        own = ZeroOptimizer(self, optimizer)
        self.engine, self.inner = _initialize(model, optimizer, settings)
        if settings.stage == 3:
            # The segments gather; hooks on the modules would gather a second time.
            self.inner.parameter_offload._remove_module_hooks()
        super().__init__(None, loss_scale)
        self.optimizer = own

    @property
    def _scale(self) -> float:
        """What the mean of the processes' gradients is too large by: the mean, as the loss is a sum."""
        return (1.0 if self.loss_scale is None else self.loss_scale.value) / parallel.world()

    def backward(self, loss: Tensor) -> None:
        self._backwards += 1
        self.inner.override_loss_scale(self._scale)
        handed = self.engine(loss) * parallel.world()
        if self.settings.stage == 3 and self.inner.micro_step_id == 0:
            # DeepSpeed overwrites with the first gradient of a step and adds the others, counting backwards; a
            # weight that two segments share has two in the first.
            self.inner.grad_partitions_flat_buffer.zero_()
            self.inner.micro_step_id = 1
        self.engine.backward(handed)

    def _look(self, gradient: Tensor) -> None:
        self._squares += torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).double() ** 2

    def ready(self, max_grad_norm: float | None = None) -> float:
        """Whether `apply` will have gradients to step with: a bound on their norm, nan or infinite where they are.

        DeepSpeed puts gradients together, finds their norm and steps at once, so `norm` is known after `apply`. A sum
        of K gradients is at most sqrt(K) times as long as the root of their squares' sum: where that is finite, no
        process finds an overflow later. DeepSpeed adds squares in float32, as torch's norm does in one process: a norm
        beyond 1.8e19, finite as it may be, is no step to either, and none here. Without a backward since the last step
        there is nothing to step with, which DeepSpeed takes for granted and torch's optimizers pass over: so does
        this."""
        check_max_grad_norm(max_grad_norm)
        self._limit, self._bound = max_grad_norm, 0.0
        if self._backwards:
            together = 2 * self._backwards * parallel.world()  # 2: a head that is the embedding too
            squares = together * parallel.total({"squares": float(self._squares)})["squares"]
            finite = squares < torch.finfo(torch.float32).max
            self._bound = math.sqrt(squares) / (self._scale * parallel.world()) if finite else math.nan
        self.norm = self._bound
        self._look_for_overflow()
        return self.norm

    def apply(self, skip: bool = False) -> None:
        """DeepSpeed clips and steps, or leaves the step out."""
        if not self._backwards:
            return
        self._backwards = 0
        self._squares.zero_()
        if skip or not math.isfinite(self._bound):
            self._leave_out()
        else:
            self.inner.clip_grad = self._limit or 0.0
            self.engine.step()
            self.norm = math.nan if self.inner.overflow else float(self.engine.get_global_grad_norm())
        self._rescale(skip)

    def _leave_out(self) -> None:
        """Drops the gradients. DeepSpeed does where their norm is not finite, in all the places where it keeps them:
        so that is what its optimizer is told."""
        name = "_get_norm_groups" if self.settings.stage == 3 else "scaled_global_norm"
        norm = torch.tensor(math.inf, device=self._squares.device)
        setattr(self.inner, name, lambda: [norm] if self.settings.stage == 3 else norm)
        try:
            self.engine.step()
        finally:
            delattr(self.inner, name)
        if self.settings.stage < 3:
            # With its optimizer's state in the CPU's memory it leaves float32 sums where they are, for the next step.
            self.inner.averaged_gradients = dict.fromkeys(self.inner.averaged_gradients)


class ZeroOptimizer:
    """An optimizer's state as one process would hold it, put together from the shards of stages 1 to 3 and cut into
    them again: so a checkpoint does not depend on the stage or the number of processes. Every process has to call."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, stepper: ZeroStepper, optimizer: torch.optim.Optimizer):
        self.stepper = stepper
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = {id(p): i for i, p in enumerate(self.parameters)}
        self.members = [[numbers[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    @property
    def base(self) -> Any:
        """The torch optimizer, of shards."""
        return self.stepper.inner.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.base.param_groups
        return groups

    def _flat(self) -> list[Tensor]:
        """The optimizer's own parameters: this process's part of float32 weights, several ones in a row."""
        inner: Any = self.stepper.inner
        if self.stepper.settings.stage == 3:
            return list(inner.fp32_partitioned_groups_flat)
        return list(inner.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Tells DeepSpeed's parameters of stage 1 and 2 where their moments are. It does so itself when the first group
        of its first step is done, and so forgets the other groups."""
        inner: Any = self.stepper.inner
        if self.stepper.settings.stage in (1, 2):
            inner._hp_optimizer_states_linked = False
            inner._lazy_init_hp_params_optimizer_state()

    def state_dict(self) -> dict[str, Any]:
        """{"state": {index: {step, exp_avg, exp_avg_sq, and master where the weights are not float32}},
        "param_groups": ...}, on the CPU."""
        base = self.base
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        steps = [base.state[flat]["step"] for flat in self._flat() if base.state.get(flat)]
        state: dict[int, dict[str, Any]] = {}
        if steps:
            self._link()
        for i, p in enumerate(self.parameters):
            if not steps:
                break
            entry = {"step": torch.as_tensor(float(steps[0]), device="cpu")}
            for name in self.MOMENTS:
                entry[name] = safe_get_full_optimizer_state(p, name).detach().cpu().clone()
            if p.dtype != torch.float32:
                entry["master"] = safe_get_full_fp32_param(p).detach().cpu().clone()
            state[i] = entry
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": members}
            for group, members in zip(self.param_groups, self.members, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave, of whichever stage and number of processes; float32 masters are the
        weights where it holds none."""
        base = self.base
        for group, values in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in values.items() if k != "params"})
        state = {int(k): v for k, v in saved["state"].items()}
        if state:
            for flat in self._flat():
                moments = {name: torch.zeros_like(flat) for name in self.MOMENTS}
                base.state[flat] = {
                    "step": torch.as_tensor(float(next(iter(state.values()))["step"]), device="cpu"),
                    **moments,
                }
            self._link()
        for i, p in enumerate(self.parameters):
            entry = state.get(i, {})
            with whole([p]):
                weight = entry.get("master", p.detach()).float().clone()
            self._put(p, weight, None)
            for name in self.MOMENTS:
                if name in entry:
                    self._put(p, entry[name], name)

    def _put(self, parameter: Any, value: Tensor, name: str | None) -> None:
        """This process's part of `value` into the optimizer's weights (None) or moments."""
        from deepspeed import utils

        if self.stepper.settings.stage == 3:
            each = parameter.ds_tensor.numel()
            padded = nn.functional.pad(
                value.reshape(-1).float(), (0, each * parallel.world() - value.numel())
            )
            parameter._z3_optimizer.set_local_hp_param(
                padded[each * parallel.rank() :][:each], parameter, name
            )  # fmt: skip
        elif name is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, name)


def _stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings, loss_scale: LossScale | None
) -> Stepper:
    return (ZeroStepper if settings.stage else WholeStepper)(model, optimizer, settings, loss_scale)


class ZeroEngine(HybridEngine):
    """`HybridEngine` through `deepspeed.initialize`.

    Args:
        model, optimizer: as given to HybridEngine; DeepSpeed takes both over. The optimizer is a torch one, and
            trains at least one parameter.
        settings: the ZeRO stage, offload, and a DeepSpeed configuration.
        loss_scale: of float16.

    `generate` gives the tokens that one process gives; prompts are divided among the processes. `optimizer` is a
    `ZeroOptimizer` (with stage 0 the one given, or a `MasterOptimizer`). Other arguments and errors: as HybridEngine.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings,
        loss_scale: LossScale | None = None, **keywords: Any,
    ):  # fmt: skip
        self.settings = settings
        parallel.start(next(model.parameters()).device, alone=True)
        super().__init__(model, optimizer, **keywords)
        self.stepper = _stepper(model, optimizer, settings, loss_scale)
        self.optimizer = self.stepper.optimizer
        if settings.stage == 3:
            self.packed.segment = sharded_segment

    def _make_decoder(self) -> Decoder:
        decoder = super()._make_decoder()
        decoder.gather = gather_modules if self.settings.stage == 3 else None
        return decoder

    def _weight_bytes(self) -> int:
        parts = {id(p): held(p) for p in self.model.parameters()}
        return sum(t.numel() * t.element_size() for t in parts.values())


def make_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings | None,
    loss_scale: LossScale | None = None, **keywords: Any,
) -> HybridEngine:  # fmt: skip
    """The engine of a stage, with masters of 16-bit weights: through DeepSpeed where `settings` are given."""
    if settings is None:
        return HybridEngine(model, optimizer, masters=True, loss_scale=loss_scale, **keywords)
    return ZeroEngine(model, optimizer, settings, loss_scale, **keywords)


def make_stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: ZeroSettings | None, packed: PackedModel,
    loss_scale: LossScale | None = None,
) -> Stepper:  # fmt: skip
    """Backward and step of a model that does not generate (reward model, critic); `packed` is its forward."""
    if settings is None:
        return Stepper(with_masters(optimizer), loss_scale)
    stepper = _stepper(model, optimizer, settings, loss_scale)
    if settings.stage == 3:
        packed.segment = sharded_segment
    return stepper
