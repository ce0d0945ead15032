"""The certificate: on this machine, is the fused model the model?

Every row compares something fused with the same thing computed by Hugging Face, by another batch, or by the training
forward, and has a bound: zero where bits must agree, a multiple of the dtype's own error where rounding may differ.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.packing import is_lora
from dschat_kernels.plan import Decoder, OpCall, PythonExecutor, StepTables

from .hybrid_engine import HybridEngine
from .rollout import Rollout, SamplingConfig


@dataclass(frozen=True)
class Check:
    """One row: what was compared, the measured value, the bound it must not exceed, and whether it holds."""

    name: str
    value: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # NaN fails


@dataclass
class Certificate:
    """The outcome of `verify`. `facts` says what was verified: model, dtype, backend, sizes."""

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    diverges: str = ""
    """Of a certificate that failed: the first op that is not its reference, or that they all are."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(c), "passed": c.passed} for c in self.checks]
        return {"passed": self.passed, "facts": self.facts, "checks": rows, "diverges": self.diverges}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        facts = ", ".join(f"{k} {v}" for k, v in self.facts.items())
        width = max((len(c.name) for c in self.checks), default=0)
        lines = [facts]
        for c in self.checks:
            mark = "ok  " if c.passed else "FAIL"
            lines.append(
                f"{mark} {c.name:<{width}}  {c.value:10.3g}  (bound {c.bound:.3g})  {c.note}".rstrip()
            )
        if self.diverges:
            lines.append(f"first divergence: {self.diverges}")
        lines.append(
            "certificate: " + ("the fused model is the model" if self.passed else "NOT the same model")
        )
        return "\n".join(lines)


ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative."""


@torch.no_grad()
def verify(
    model: nn.Module,
    *,
    prompts: Sequence[Tensor] | None = None,
    max_new_tokens: int = 16,
    backend: str | None = None,
    seed: int = 0,
) -> Certificate:
    """Certifies `model` (a causal language model or a PEFT model); nothing of it is changed.

    Args:
        prompts: int64 token sequences of different lengths; default: four random ones.
        max_new_tokens: tokens generated in the comparisons.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return _Verifier(model, prompts, max_new_tokens, backend, seed).run()
    finally:
        for module in training:
            module.training = True


class _Verifier:
    def __init__(self, model: nn.Module, prompts: Any, new: int, backend: str | None, seed: int):
        self.model, self.new, self.seed = model, new, seed
        self.engine = HybridEngine(model, backend=backend)
        spec = self.engine.spec
        if prompts is None:
            generator = torch.Generator().manual_seed(seed)
            lengths = [n for n in (23, 9, 17, 1) if n + new <= spec.context]
            prompts = [torch.randint(spec.vocab_size, (n,), generator=generator) for n in lengths]
        self.device = self.engine.decoder.device
        self.prompts = [p.cpu() for p in prompts]
        if not self.prompts:
            raise ValueError(
                f"there is no prompt to verify with (max_new_tokens {new}, context {spec.context}): "
                "give prompts or lower max_new_tokens."
            )
        self.ids, self.mask = left_pad(self.prompts)
        self.dtype = self.engine.decoder.dtype
        self.certificate = Certificate(
            {
                "model": spec.model_type,
                "layers": len(spec.layers),
                "dtype": str(self.dtype).removeprefix("torch."),
                "backend": self.engine.decoder.backend,
                "LoRA layers": sum(is_lora(m) for m in model.modules()),
            }
        )

    def add(self, name: str, value: float | Tensor, bound: float, note: str = "") -> None:
        self.certificate.checks.append(Check(name, float(value), bound, note))

    def run(self) -> Certificate:
        self.engine.flip()
        self.logits_against_hf()
        greedy = self.generate(temperature=0.0)
        self.greedy_against_hf(greedy)
        self.padding_and_batch()
        self.decode_against_prefill()
        self.logprob_gap(self.generate(temperature=1.0, n=2))
        if not self.certificate.passed:
            found = first_divergence(self.engine, self.prompts[0])
            self.certificate.diverges = found or "none, every op of a step agrees with its reference"
        return self.certificate

    def generate(self, **settings: Any) -> Rollout:
        sampling = SamplingConfig(max_new_tokens=self.new, seed=self.seed, **settings)
        return self.engine.generate(self.ids, self.mask, sampling)

    def step(self, prompts: Sequence[Tensor], logits: Any) -> Tensor:
        cache = self.engine.decoder.new_cache(len(prompts), max(len(p) for p in prompts) + 1)
        lens = [len(p) for p in prompts]
        return self.engine.decoder.step(
            torch.cat(list(prompts)), cache, list(range(len(prompts))), lens, logits
        )

    def logits_against_hf(self) -> None:
        """Beside HF's own error: what HF in the same dtype loses against HF in float64."""
        fused = self.step(self.prompts, "all")
        there = [p[None].to(self.device) for p in self.prompts]
        hf = torch.cat([self.model(p).logits[0].float() for p in there])
        wide = copy.deepcopy(self.model).double()
        exact = torch.cat([wide(p).logits[0] for p in there])
        del wide
        ours, theirs = ((x.double() - exact).abs() for x in (fused, hf))
        floor = 8 * ROUNDING[self.dtype] * float(exact.abs().max())
        self.logit_bound = 2 * float(theirs.max()) + floor
        note = f"HF's own is {float(theirs.max()):.3g}"
        self.add("logits, max error against HF in float64", ours.max(), self.logit_bound, note)
        note = f"HF's own is {float(theirs.mean()):.3g}"
        self.add("logits, mean error", ours.mean(), 2 * float(theirs.mean()) + floor / 32, note)

    def greedy_against_hf(self, rollout: Rollout) -> None:
        """Tokens may part only where HF's own logits of the two tokens are closer than the errors of both sides."""
        model: Any = self.model
        ids, mask = self.ids.to(self.device), self.mask.long().to(self.device)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False,
            num_beams=1, repetition_penalty=1.0, pad_token_id=0, eos_token_id=None,
        )[:, self.ids.shape[1] :]  # fmt: skip
        rows = (out != rollout.completion_ids).any(1).nonzero().squeeze(1).tolist()
        worst = 0.0
        for row in rows:
            t = int((out[row] != rollout.completion_ids[row]).nonzero()[0])
            so_far = torch.cat([self.prompts[row].to(self.device), out[row, :t]])
            logits = self.model(so_far[None]).logits[0, -1].float()
            worst = max(worst, float(logits[out[row, t]] - logits[rollout.completion_ids[row, t]]))
        note = f"{len(rows)} of {len(out)} rows part from HF's" if rows else "all rows are HF's"
        self.add("greedy tokens, HF's logit gap where they part", worst, 2 * self.logit_bound, note)
        if self.dtype == torch.float32:
            self.add("greedy rows that differ from HF's", len(rows), 0)

    def padding_and_batch(self) -> None:
        together = self.step(self.prompts, "last")
        alone = torch.cat([self.step([p], "last") for p in self.prompts])
        self.add("batch 1 against batch N, logits (bits)", (together - alone).abs().max(), 0.0)
        wide = torch.nn.functional.pad(self.ids, (5, 0)), torch.nn.functional.pad(self.mask, (5, 0))
        sampling = SamplingConfig(max_new_tokens=self.new, seed=self.seed)
        a, b = self.engine.generate(self.ids, self.mask, sampling), self.engine.generate(*wide, sampling)
        unequal = (a.completion_ids != b.completion_ids).sum() + (a.logprobs != b.logprobs).sum()
        self.add("padded against unpadded, tokens and log-probs (bits)", unequal, 0.0)
        one = [self.engine.generate(p[None], None, sampling) for p in self.prompts]
        differs = sum(int((a.logprobs[i] != r.logprobs[0]).sum()) for i, r in enumerate(one))
        self.add("sampled alone against sampled in a batch (bits)", differs, 0.0)

    def decode_against_prefill(self) -> None:
        prompt = self.prompts[0]
        prefill = self.step([prompt], "all")
        cache = self.engine.decoder.new_cache(1, len(prompt))
        decode = torch.cat(
            [self.engine.decoder.step(prompt[i : i + 1], cache, [0]) for i in range(len(prompt))]
        )
        self.add("decode against prefill, logits (bits)", (decode - prefill).abs().max(), 0.0)

    def logprob_gap(self, rollout: Rollout) -> None:
        """Rollout against training forward: max, mean, mean exp|d|, share of ratios outside [0.9, 1.1]."""
        gap = logprob_gap(self.engine.logprobs(rollout, exact=False), rollout)
        loose = self.dtype == torch.bfloat16
        self.add("rollout against training log-probs, max |d|", gap["max"], 0.5 if loose else 1e-3)
        self.add("  mean |d|", gap["mean"], math.log(1.05) if loose else 1e-4)
        self.add(
            "  mean exp|d|", gap["mult"], 1.05 if loose else 1.0001, "the multiplicative error; 1 is equal"
        )
        self.add("  share of ratios outside [0.9, 1.1]", gap["outside"], 0.1 if loose else 0.0)
        exact = self.engine.logprobs(rollout, exact=True)
        self.add(
            "rollout against training log-probs, exact mode (bits)",
            (exact - rollout.logprobs).abs().max(),
            0.0,
        )


def logprob_gap(logprobs: Tensor, rollout: Rollout) -> dict[str, float]:
    """How far training log-probs are from the rollout's on the completion tokens."""
    d = (logprobs.detach() - rollout.logprobs)[rollout.completion_mask]
    ratio = d.exp()
    outside = ((ratio < 0.9) | (ratio > 1.1)).float().mean()
    d = d.abs()
    return {
        "max": float(d.max()),
        "mean": float(d.mean()),
        "mult": float(d.exp().mean()),
        "outside": float(outside),
    }


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 and bool [rows, longest], zeros on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, torch.arange(width)[None] >= width - lengths[:, None]


@torch.no_grad()
def first_divergence(engine: HybridEngine, prompt: Tensor) -> str:
    """The first call of the plan whose output is further from the reference op than rounding explains, or "".

    Every call is compared on the inputs it had in the engine's own run, with freshly packed weights: an error
    is charged to the call that made it and to no later one.
    """
    decoder = engine.decoder
    reference = Decoder(engine.spec, dtype=decoder.dtype, backend="reference")
    reference.refresh()
    probe = _Probe(PythonExecutor(reference), reference.new_cache(1, len(prompt) + 1), prompt)
    own = decoder.executor
    decoder.executor = type(own)(decoder, probe)
    try:
        decoder.step(prompt, decoder.new_cache(1, len(prompt) + 1), [0], [len(prompt)], "all")
    finally:
        decoder.executor = own
    return probe.found


class _Probe:
    """A trace that runs the reference op beside every call, on the inputs of that call."""

    def __init__(self, reference: PythonExecutor, cache: PagedKVCache, prompt: Tensor):
        count = len(prompt)
        cache.prepare_append([0], count)
        decoder = reference.decoder
        decoder.rope_tables(count)
        self.reference, self.cache, self.found = reference, cache, ""
        self.buffers: dict[str, Tensor] = {}
        places = np.arange(count)
        zeros = np.zeros(count, dtype=np.int32)
        tables = StepTables(
            prompt.numpy(), places.astype(np.int32), zeros, np.array([0, count], dtype=np.int32),
            np.array([count], dtype=np.int32), zeros[:1], places,
        )  # fmt: skip
        cache.sync()
        self.tables = tables.on(decoder.device)

    def __call__(self, call: OpCall, out: Tensor) -> None:
        expected = self.reference.execute(call, self.buffers, self.tables, self.cache)
        self.buffers[call.out] = out.clone()
        scale = float(expected.float().abs().max())
        error = float((out.float() - expected.float()).abs().max())
        slack = 4 if out.dtype == torch.bfloat16 else 256
        if not self.found and not error <= slack * ROUNDING[out.dtype] * (scale + 1e-30):
            self.found = f"{call.op} {call.weights or f'of layer {call.layer}'}: error {error:.3g} at scale {scale:.3g}"
