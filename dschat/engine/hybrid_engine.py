"""One model that trains and generates: the state of its weights, and the way between the two.

In *training* the model's own modules hold the weights. In *rollout* the decoder runs packs built from them:
LoRA fused, layouts for the kernels; the training weight is only read. `generate` begins with a flip: it finds
what changed since the last packs and rebuilds those. Nothing has to be synchronised by the caller, and the
first log-probs after a rollout are those of the rollout: within the bound that `verify` reports, and bit for
bit with exact=True.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dschat_kernels.graphs import DecodeGraphs
from dschat_kernels.hf_generate import check_one_dtype
from dschat_kernels.kept_cache import KeptCache
from dschat_kernels.limits import available_memory
from dschat_kernels.models.spec import DecoderSpec, Unsupported
from dschat_kernels.ops._common import lasting_tensors
from dschat_kernels.patch import shared_decoder
from dschat_kernels.plan import Decoder, RefreshStats
from dschat_kernels.sharding import sharded_decoder

from .. import parallel
from ..device import synchronize
from .packed import PackedModel, check_batch, pack_rows
from .precision import LossScale, with_masters
from .rollout import Rollout, RolloutRun, RolloutStats, Rows, SamplingConfig, empty_completions
from .sharing import Sharing
from .stepper import Stepper

KEPT_SHARE = 1 / 8
"""Of the free memory: a larger cache is given back after its rollout."""


class HybridEngine:
    """Generation, log-probs and optimizer steps of one model.

    Args:
        model: a Hugging Face causal language model or a PEFT model around one, on the CPU or on one GPU, float32
            or bfloat16, or float16: whose rollouts on the CPU need `dtype` float32 or bfloat16.
        optimizer: a torch optimizer over its parameters; only `step` needs it.
        max_slots: rows that are generated at a time; more rows wait.
        dtype: of the rollout, where it is not to be the model's (float32 weights, bfloat16 rollouts).
        exact: the training forward runs the packed kernels of the rollout: `logprobs` equals
            `rollout.logprobs` bit for bit, at the cost of repacking after every step.
        backend: None (the fastest on the model's device), "cpu", "triton", "cuda" or "reference".
        rollout_weights: "model", or "int8": matrices are quantised at every flip (LoRA fused first), one scale an
            output column, so decoding reads half the bytes; or "int8_dynamic": activations are quantised too, which
            is faster from a few rows on and less precise. The training forward keeps the model's weights;
            `logprobs` against `rollout.logprobs` says how far apart they are, and PPO's and GRPO's importance_cap
            corrects for it.
        kv_cache: "auto", the rollout's dtype; or "int8": keys and values of a rollout are integers of a byte with a
            float32 scale for each token and head, half of bfloat16's memory, on the CPU only. Of training and
            importance_cap the same is true as of rollout_weights.
        cuda_graphs: on a GPU, decode steps replay CUDA graphs (`dschat_kernels.graphs`); the cache is kept for them
            between rollouts, `release()` gives it up. Where none can be recorded, a warning and `graphs.reason` say
            why.
        inference_tp_size: processes that hold one decoder together and decode the same rows in step, each with its part
            of every layer (`dschat_kernels.sharding`), for packs that do not fit beside each other; tokens and
            log-probs stay those of one process. It divides the number of processes and the model's heads.
        masters: the optimizer steps float32 masters of weights of 16 bits; `optimizer` is a `MasterOptimizer` then.
        loss_scale: of float16 (dschat/engine/precision.py); with it there are masters in any case, since gradients
            that are divided by it are too small for float16.

    In a patched model engine and patch have one decoder, and so one copy of the packs, where backend and dtype are the
    same and nothing is quantised.

    Raises `dschat_kernels.models.Unsupported` (a ValueError) for a model that no adapter covers exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        max_slots: int = 64,
        dtype: torch.dtype | None = None,
        exact: bool = False,
        backend: str | None = None,
        rollout_weights: str = "model",
        kv_cache: str = "auto",
        cuda_graphs: bool = True,
        inference_tp_size: int = 1,
        masters: bool = False,
        loss_scale: LossScale | None = None,
    ):
        if max_slots < 1:
            raise ValueError(f"max_slots is {max_slots}: give at least 1 row to generate at a time.")
        if hasattr(model, "zero_optimization") and hasattr(model, "module"):
            raise ValueError(
                "the model is a DeepSpeed engine: give the model to dschat.engine.zero.ZeroEngine, which makes it one."
            )
        self.model = model
        masters = masters or loss_scale is not None
        self.stepper = Stepper(
            with_masters(optimizer) if masters and optimizer is not None else optimizer, loss_scale
        )
        self.optimizer: Any = self.stepper.optimizer
        self.max_slots = max_slots
        if exact:
            _check_exact(rollout_weights, kv_cache)
            _check_undivided(inference_tp_size)
        self.exact = exact
        self.sharing = Sharing(inference_tp_size)
        self.packed = PackedModel(model, backend=backend)
        check_one_dtype(self.spec)
        self._dtype, self._backend, self._weights, self._kv_cache = dtype, backend, rollout_weights, kv_cache
        self._cuda_graphs = cuda_graphs
        self.graphs: DecodeGraphs | None = None
        self._kept: KeptCache | None = None
        self._rolling_out = threading.Lock()
        """Held by the rollout that has what is kept between rollouts; another one at the same time has its own."""
        self.decoder, self._described = self._make_decoder(), self.spec
        embed: Any = self.spec.embed
        model_dtype = embed.weight.dtype
        if exact and self.decoder.dtype != model_dtype:
            raise ValueError(
                f"dtype is {dtype} and the model {model_dtype}: exact mode needs one dtype for both."
            )
        self.epoch = 0
        """Optimizer steps taken; the packs remember which epoch they were made in."""
        self._packed_epoch = -1

    @property
    def spec(self) -> DecoderSpec:
        """What the model computes; replaced when the model's modules change."""
        return self.packed.spec

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.decoder.device

    def _make_decoder(self) -> Decoder:
        if self.spec.lm_head is None:
            raise Unsupported(
                f"{type(self.model).__name__} has no language head: generation needs a causal language model."
            )
        how: dict[str, Any] = {
            "dtype": self._dtype, "backend": self._backend, "weights": self._weights, "kv_cache": self._kv_cache,
        }  # fmt: skip
        if self.sharing.size > 1:
            sharing = self.sharing
            return sharded_decoder(self.spec, sharing.part, sharing.size, sharing.columns, **how)
        plain = self._weights == "model" and self._kv_cache == "auto"
        decoder = shared_decoder(self.model, self._backend) if plain else None
        if decoder is None or self._dtype not in (None, decoder.dtype):
            decoder = Decoder(self.spec, **how)
        on_gpu = decoder.device.type == "cuda" and decoder.backend in ("cuda", "triton")
        self.graphs = DecodeGraphs(decoder) if on_gpu and self._cuda_graphs else None
        self._kept = KeptCache(decoder) if decoder.device.type == "cpu" else None
        return decoder

    # ------------------------------------------------------------------------------------------------- rollout

    def flip(self) -> RefreshStats:
        """Brings the packs up to the present weights, adapters and modules. `generate` does it by itself."""
        self.packed.sync()
        embed: Any = self.spec.embed
        now = (self._dtype or embed.weight.dtype, embed.weight.device)
        if self._described is not self.spec or (self.decoder.dtype, self.decoder.device) != now:
            check_one_dtype(self.spec)
            self.decoder = self._make_decoder()
            self._described = self.spec
        self._check_memory()
        start = time.perf_counter()
        stats = self.decoder.refresh()
        synchronize(self.device)
        stats.seconds = time.perf_counter() - start
        self._packed_epoch = self.epoch
        return stats

    def _check_memory(self) -> None:
        """Raises MemoryError before packs are made that memory has no room for."""
        groups = {name: group for name, group in self.decoder.groups.items() if group.packed is None}
        if not groups or self.decoder.device.type != "cpu":
            return
        free = available_memory()
        numbers = sum(part.weight.numel() for name, group in groups.items() for part in group.resolve(name))
        need = numbers * (self.decoder.dtype.itemsize if self._weights == "model" else torch.int8.itemsize)
        if free is not None and need > free:
            raise MemoryError(
                f"the packed weights need {need / 2**20:.1f} MiB beside the model's own and {free / 2**20:.1f} MiB are "
                "free: take a smaller model, or load it as bfloat16."
            )

    @lasting_tensors()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sampling: SamplingConfig | None = None,
        *,
        on_token: Callable[[int, int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> Rollout:
        """Samples `sampling.n` completions of every prompt.

        Args:
            input_ids: int64 [prompts, P], left-padded as for HF generate, on the CPU or on the model's device.
            attention_mask: bool or 0/1 [prompts, P]; None: no padding.
            sampling: where its eos_token_id is unset the completions run to max_new_tokens.
            on_token: called with (row, token) for every token as it is drawn.
            limits: most tokens of a completion for each prompt, at most sampling.max_new_tokens.

        The rollout's tensors are on the model's device.

        Raises ValueError or TypeError, before anything is generated, for a bad batch, an empty prompt, or a
        prompt that leaves no room in the model's context; MemoryError, before they are allocated, where the packs
        or the cache of one row do not fit (more rows than fit wait for their turn).
        """
        start = time.perf_counter()
        sampling = sampling or SamplingConfig()
        mask = attention_mask
        if mask is None and isinstance(input_ids, Tensor):
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        check_batch(input_ids, mask)
        assert mask is not None
        if input_ids.shape[0] == 0:
            raise ValueError("input_ids hold no prompt: give at least one row.")
        input_ids, mask = input_ids.cpu(), mask.bool().cpu()  # rows are scheduled there
        rows = pack_rows(input_ids, mask)
        prompts = list(rows.ids.split(rows.cu_seqlens.diff().tolist()))
        self._check_prompts(prompts, sampling)
        if limits is not None:
            _check_limits(limits, len(prompts), sampling.max_new_tokens)

        self.packed.check_hooks()
        flip = self.flip()
        completions, stats = self._roll_out(prompts, sampling, on_token, limits)
        stats.flip = flip.seconds
        stats.total = time.perf_counter() - start
        device = self.decoder.device
        return Rollout(
            input_ids.repeat_interleave(sampling.n, 0).to(device),
            mask.repeat_interleave(sampling.n, 0).to(device),
            *completions,
            sampling=sampling,
            stats=stats,
        )

    def release(self) -> None:
        """Gives up what is kept between rollouts: the cache, and recordings of CUDA graphs."""
        for kept in (self.graphs, self._kept):
            if kept is not None:
                kept.release()

    def _roll_out(
        self,
        prompts: Sequence[Tensor],
        sampling: SamplingConfig,
        on_token: Callable[[int, int], None] | None,
        limits: Sequence[int] | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], RolloutStats]:
        """(completions of all prompts as `RolloutRun.completions` gives them, stats of this process). Each team of
        processes takes some of the prompts; none waits for another before there is nothing left to decode."""
        self._check_epoch()
        sharing, pad = self.sharing, self._pad_token(sampling)
        reserved = -(-self.max_slots // sampling.n)  # what a team starts with, nobody takes
        counts = sharing.counts(len(prompts))
        first = sum(counts[: sharing.team])
        queue = sharing.queue(len(prompts), reserved)
        own = range(first, first + counts[sharing.team])
        if queue is not None:
            own = own[:reserved]
        taken: Sequence[int] = []
        found, stats = empty_completions(self.device), RolloutStats()
        if own:
            with self._kept_for_rollout() as (graphs, kept):
                run = RolloutRun(
                    self.decoder, prompts, sampling, self.max_slots, pad, on_token, limits, graphs,
                    kept, own=own, more=None if queue is None else queue.take, agree=sharing.smallest,
                )  # fmt: skip
                run.run()
                found, taken, stats = run.completions(), run.taken, run.stats
                if kept is not None:
                    kept.trim(int(KEPT_SHARE * (available_memory() or 0)))
        if parallel.world() > 1:
            found = self._together(found, taken, len(prompts), sampling, pad)
            stats.completion_tokens = int(found[1].sum())
        if queue is not None:
            queue.close()
        return found, stats

    @contextlib.contextmanager
    def _kept_for_rollout(self) -> Iterator[tuple[DecodeGraphs | None, KeptCache | None]]:
        """Recordings and cache of the rollouts before, for the one rollout that may write to them: not for one that
        runs at the same time, in another thread or from `on_token`."""
        if not self._rolling_out.acquire(blocking=False):
            yield None, None
            return
        try:
            yield self.graphs, self._kept
        finally:
            self._rolling_out.release()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled: copy its model, and make an engine of the copy."
        )

    def _together(
        self,
        found: tuple[Tensor, Tensor, Tensor, Tensor],
        taken: Sequence[int],
        prompts: int,
        sampling: SamplingConfig,
        pad: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The completions of all processes, cut to the longest of all."""
        ids, mask, logprobs, finished = found
        more = (0, sampling.max_new_tokens - ids.shape[1])
        wide = (
            nn.functional.pad(ids, more, value=pad), nn.functional.pad(mask, more),
            nn.functional.pad(logprobs, more), finished,
        )  # fmt: skip
        ids, mask, logprobs, finished = self.sharing.together(wide, taken, prompts, sampling.n)
        width = int(mask.sum(1).max())
        return ids[:, :width], mask[:, :width], logprobs[:, :width], finished

    def _check_prompts(self, prompts: Sequence[Tensor], sampling: SamplingConfig) -> None:
        for i, prompt in enumerate(prompts):
            low, high = int(prompt.min()), int(prompt.max())
            if low < 0 or high >= self.spec.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(
                    f"prompt {i} holds token {bad}, outside the vocabulary of {self.spec.vocab_size}: "
                    "check the tokenizer."
                )
            if len(prompt) + sampling.max_new_tokens > self.spec.context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}, "
                    f"more than the model's context of {self.spec.context}: shorten the prompt or lower "
                    "max_new_tokens."
                )

    def _check_epoch(self) -> None:
        if self._packed_epoch != self.epoch:
            raise RuntimeError(
                f"the packs are of epoch {self._packed_epoch} and the weights of {self.epoch}: call flip()."
            )

    def _pad_token(self, sampling: SamplingConfig) -> int:
        if sampling.pad_token_id is not None:
            return sampling.pad_token_id
        configs = [getattr(self.model, name, None) for name in ("generation_config", "config")]
        pads = [getattr(c, "pad_token_id", None) for c in configs]
        eos = sampling.eos_ids
        return next((int(p) for p in pads if isinstance(p, int) and p >= 0), eos[0] if eos else 0)

    # ------------------------------------------------------------------------------------------------ training

    def logprobs(
        self,
        rollout: Rows,
        *,
        temperature: float | None = None,
        entropy: bool = False,
        gap: bool = False,
        exact: bool | None = None,
    ) -> Any:
        """Log-probs of the completion tokens under the present weights, with gradient: float32 [rows, C], 0
        where masked.

        temperature: default that of the rollout. entropy, gap: returns (logprobs, entropies, gaps), of
        the last two what is asked for, all [rows, C]; a gap is 0 exactly where no token is likelier, and without
        gradient. exact: default the engine's. Padding is not computed, and only the completions' positions reach
        the head.
        """
        exact = self.exact if exact is None else exact
        if temperature is None:
            if not isinstance(rollout, Rollout):
                raise ValueError(
                    "these rows are no rollout, whose temperature would be taken: give temperature."
                )
            temperature = rollout.sampling.logprob_temperature
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}: give a number above 0.")
        decoder = None
        if exact:
            _check_exact(self._weights, self._kv_cache)
            _check_undivided(self.sharing.size)
            self.flip()
            decoder = self.decoder
        rows, select, targets, places = completion_rows(rollout)
        result = self.packed.token_logprobs(
            rows, select, targets, temperature=temperature, entropy=entropy, gap=gap, exact=decoder
        )  # fmt: skip
        shape = rollout.completion_ids.shape
        if entropy or gap:
            return tuple(scatter(part, places, shape) for part in result)
        return scatter(result, places, shape)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen reference: the model with its LoRA adapters switched off, inside the context.

        An exact engine packs the base weights for it and the adapter's again after it, so that a policy which is
        still its reference has KL 0 to it, bit for bit.
        """
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                f"{type(self.model).__name__} has no adapters to switch off: use a PEFT model, or keep a frozen "
                "copy as reference."
            )
        model: Any = self.model
        with model.disable_adapter():
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients."""
        self.stepper.backward(loss)

    def step(self, max_grad_norm: float | None = None) -> float:
        """Optimizer step and zero_grad; the next generate sees the new weights.

        Gradients are clipped to `max_grad_norm` (None: not). Returns their norm before that. A norm that is nan or
        infinite steps nothing: the gradients are dropped and the weights stay as they are.
        """
        self.ready(max_grad_norm)
        self.apply()
        return self.stepper.norm

    def ready(self, max_grad_norm: float | None = None) -> float:
        """The first half of `step`, which changes no weight: gradients put together, clipped, and their norm before
        that (through DeepSpeed's stages 1 to 3 a bound on it)."""
        return self.stepper.ready(max_grad_norm)

    def apply(self, skip: bool = False) -> None:
        """The other half. skip: drop the gradients instead."""
        self.stepper.apply(skip)
        if math.isfinite(self.stepper.norm) and not skip:
            self.epoch += 1

    # -------------------------------------------------------------------------------------------------- report

    def memory(self) -> dict[str, int]:
        """Bytes of the weights (of this process's part), of the packs kept beside them, and of the cache that is kept
        for the next rollout."""
        kept = [k.bytes for k in (self.graphs, self._kept) if k is not None]
        return {"weights": self._weight_bytes(), "packs": self.decoder.packed_bytes, "cache": sum(kept)}

    def _weight_bytes(self) -> int:
        weights = {p.data_ptr(): p.numel() * p.element_size() for p in self.model.parameters()}
        return sum(weights.values())


def _check_exact(rollout_weights: str, kv_cache: str) -> None:
    if rollout_weights != "model":
        raise ValueError(
            f"rollout_weights is {rollout_weights!r}: exact mode trains on the rollout's weights and needs "
            "rollout_weights='model'."
        )
    if kv_cache != "auto":
        raise ValueError(
            f"kv_cache is {kv_cache!r}: exact mode trains on the keys and values of the rollout and needs "
            "kv_cache='auto'."
        )


def _check_undivided(inference_tp_size: int) -> None:
    if inference_tp_size > 1:
        raise ValueError(
            f"inference_tp_size is {inference_tp_size}: exact mode trains on the whole packs of the rollout and needs "
            "inference_tp_size=1."
        )


def _check_limits(limits: Sequence[int], prompts: int, most: int) -> None:
    if len(limits) != prompts:
        raise ValueError(f"limits has {len(limits)} numbers for {prompts} prompts: give one for each.")
    for limit in limits:
        if not 1 <= limit <= most:
            raise ValueError(f"limits holds {limit}: give numbers from 1 to max_new_tokens, which is {most}.")


def completion_rows(rollout: Rows) -> Any:
    """What a log-prob pass over a rollout computes: (packed rows, select, targets, places).

    The last token of a completion predicts nothing and is not fed. select: packed places whose hidden state
    predicts a completion token; targets: those tokens; places: where they stand in the flattened [rows, C].
    """
    mask = rollout.completion_mask.bool()
    if not bool(mask.any()):
        raise ValueError("the rollout has no completion token: every completion_mask entry is false.")
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(1)
    if bool(holes.any()):
        raise ValueError(
            f"completion_mask of row {int(holes.nonzero()[0])} has tokens after a gap: a completion starts in "
            "the first column and ends once; mask its log-probs instead."
        )
    fed = mask.clone()
    lengths = mask.sum(1)
    present = lengths > 0
    fed[present.nonzero().squeeze(1), lengths[present] - 1] = False
    prompt = rollout.prompt_mask.bool()
    rows = pack_rows(rollout.input_ids, torch.cat([prompt, fed], dim=1))
    # The place before a row's first completion token is its last prompt token; the others follow it.
    before = rows.cu_seqlens[:-1].long() + prompt.sum(1) - 1
    offsets = torch.arange(mask.shape[1], device=mask.device)[None].expand_as(mask)
    places = mask.reshape(-1).nonzero().squeeze(1)
    select = (before[:, None] + offsets).reshape(-1)[places]
    return rows, select, rollout.completion_ids.reshape(-1)[places], places


def scatter(values: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """values at `places` of a zero tensor [rows, C], differentiable."""
    out = values.new_zeros(shape[0] * shape[1])
    return out.index_put((places,), values).view(*shape)


def greedy(sampling: SamplingConfig) -> SamplingConfig:
    """The same settings at temperature 0, one sample."""
    return replace(sampling, temperature=0.0, n=1)


__all__ = [
    "HybridEngine",
    "Rollout",
    "RolloutStats",
    "SamplingConfig",
    "completion_rows",
    "greedy",
    "scatter",
]
