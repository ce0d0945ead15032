"""The certificate: on this machine, is the fused model the model?

Every row compares something fused with the same thing computed by Hugging Face, by another batch, or by the training
forward, and has a bound: zero where bits must agree, a multiple of the dtype's own error where rounding may differ.
int8 weights are another model than Hugging Face's by design: their rows say how far, and that the packs are within half
a step of the weights and every op of a step within rounding of its reference.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.executors import PythonExecutor, StepTables
from dschat_kernels.models import DecoderSpec, decoder_spec
from dschat_kernels.ops._common import resolve_backend
from dschat_kernels.packing import fused_weight, is_lora
from dschat_kernels.patch import is_patched, patch
from dschat_kernels.plan import Decoder, OpCall

from .hybrid_engine import HybridEngine
from .packed import pack_rows
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
    """The outcome of `verify`. `facts` says what was verified: model, dtype, backend, sizes. `others`: the certificates
    of the other backends (`deep`)."""

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    diverges: str = ""
    """Of a certificate that failed: the first op that is not its reference, or the first layer whose output is not
    transformers' although every op is right, or that there is neither."""
    others: list[Certificate] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        own = bool(self.checks) and all(c.passed for c in self.checks)
        return own and all(other.passed for other in self.others)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(c), "passed": c.passed} for c in self.checks]
        own = {"passed": self.passed, "facts": self.facts, "checks": rows, "diverges": self.diverges}
        return {**own, "others": [other.to_dict() for other in self.others]}

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
        plain = self.facts.get("weights", "model") == "model" and self.facts.get("kv_cache", "auto") == "auto"
        quantised = "" if plain else " within int8"
        lines.append(
            "certificate: "
            + (f"the fused model is the model{quantised}" if self.passed else "NOT the same model")
        )
        return "\n".join([*(f"{other}\n" for other in self.others), *lines])


GAP = {
    "torch.float32": {"max": 1e-3, "mean": 1e-4, "mult": 1.0001, "outside": 0.0},
    "torch.bfloat16": {"max": 0.5, "mean": math.log(1.05), "mult": 1.05, "outside": 0.1},
    "int8": {"max": 2.0, "mean": math.log(1.2), "mult": 1.2, "outside": 0.75},
    "int8 cache": {"max": 1.0, "mean": math.log(1.1), "mult": 1.1, "outside": 0.5},
    "int8_dynamic": {"max": 3.0, "mean": math.log(1.3), "mult": 1.3, "outside": 0.9},
}
"""How far the log-probs of rollout and training may be apart: that of int8 is what truncated importance weights still
correct."""

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative."""


DRAWS = 512
"""Samples that the sampling statistics are taken of."""
NEVER = {"pad_token_id": 0, "eos_token_id": None, "repetition_penalty": 1.0, "do_sample": False}


@torch.no_grad()
def verify(
    model: nn.Module,
    *,
    prompts: Sequence[Tensor] | None = None,
    max_new_tokens: int = 16,
    backend: str | None = None,
    seed: int = 0,
    rollout_weights: str = "model",
    kv_cache: str = "auto",
    deep: bool = False,
) -> Certificate:
    """Certifies `model` (a causal language model or a PEFT model); nothing of it is changed.

    Args:
        prompts: int64 token sequences of different lengths; default: four random ones, with `deep` longer ones too.
        max_new_tokens: tokens generated in the comparisons.
        rollout_weights, kv_cache: as HybridEngine's.
        deep: every backend that can run the model; the others' certificates are in `others`.

    The reference backend is PyTorch's own ops, which promise no bits across batches: its certificate has no such rows.
    Of a patched model a plain copy is certified, since its own forward is no longer Hugging Face's.
    """
    if is_patched(model):
        model = copy.deepcopy(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        certify = partial(
            _Verifier,
            model,
            prompts,
            max_new_tokens,
            seed=seed,
            weights=rollout_weights,
            kv_cache=kv_cache,
            deep=deep,
        )
        main = certify(backend=backend).run()
        if deep:
            for other in (name for name in _backends(model) if name != main.facts["backend"]):
                main.others.append(certify(backend=other).run())
        return main
    finally:
        for module in training:
            module.training = True


def _backends(model: nn.Module) -> list[str]:
    """The backends that run the model where it is."""
    weight = next(model.parameters())
    names = ("cuda", "triton", "reference") if weight.device.type == "cuda" else ("cpu", "reference")
    found = []
    for name in names:
        with contextlib.suppress(ValueError, RuntimeError):  # why not is what `dschat doctor` says
            found.append(resolve_backend("decoder", name, weight))
    return found


class _Verifier:
    def __init__(
        self,
        model: nn.Module,
        prompts: Any,
        new: int,
        *,
        backend: str | None,
        seed: int,
        weights: str,
        kv_cache: str,
        deep: bool,
    ):
        self.model, self.new, self.seed = model, new, seed
        self.engine = HybridEngine(model, backend=backend, rollout_weights=weights, kv_cache=kv_cache)
        self.engine.packed.passes_hooks = True
        self.quantised = weights != "model" or kv_cache != "auto"
        spec = self.engine.spec
        if prompts is None:
            generator = torch.Generator().manual_seed(seed)
            lengths = [n for n in (23, 9, 17, 1, *((150, 70) if deep else ())) if n + new <= spec.context]
            prompts = [
                torch.randint(spec.vocab_size, (n,), generator=generator, device="cpu") for n in lengths
            ]
        self.device = self.engine.decoder.device
        self.prompts = [p.cpu() for p in prompts]
        if not self.prompts:
            raise ValueError(
                f"there is no prompt to verify with (max_new_tokens {new}, context {spec.context}): "
                "give prompts or lower max_new_tokens."
            )
        self.ids, self.mask = left_pad(self.prompts)
        self.dtype = self.engine.decoder.dtype
        self.backend = self.engine.decoder.backend
        self.certificate = Certificate(
            {
                "model": spec.model_type,
                "layers": len(spec.layers),
                "dtype": str(self.dtype).removeprefix("torch."),
                "weights": weights,
                "kv_cache": kv_cache,
                "backend": self.backend,
                "LoRA layers": sum(is_lora(m) for m in model.modules()),
            }
        )

    def add(self, name: str, value: float | Tensor, bound: float, note: str = "") -> None:
        self.certificate.checks.append(Check(name, float(value), bound, note))

    def add_bits(self, name: str, value: float | Tensor, note: str = "") -> None:
        """A row that must be equal bit for bit, which kernels promise and PyTorch's own ops do not."""
        if self.backend != "reference":
            self.add(f"{name} (bits)", value, 0.0, note)

    def run(self) -> Certificate:
        self.engine.flip()
        if self.quantised:
            self.quantisation()
        else:
            self.logits_against_hf()
            self.greedy_against_hf(self.generate(temperature=0.0))
            self.sampling_statistics()
        self.padding_and_batch()
        self.decode_against_prefill()
        self.logprob_gap(self.generate(temperature=1.0, n=2))
        if not self.quantised:  # an unfused or patched model has the model's own weights
            if self.certificate.facts["LoRA layers"]:
                self.lora_fused_against_unfused()
            self.patched_and_undone()
        if not self.certificate.passed:
            found = first_divergence(self.engine, self.prompts[0])
            found = found or first_wrong_layer(self.model, self.engine, self.prompts[0])
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

    def hf_logits(self) -> Tensor:
        """HF's, in float64."""
        wide = copy.deepcopy(self.model).double()
        return torch.cat([wide(p[None].to(self.device)).logits[0] for p in self.prompts])

    def quantisation(self) -> None:
        """The packs against the weights, every op against its reference, the logits against HF's."""
        if self.engine.decoder.weights != "model":
            self.quantised_packs()
        found = first_divergence(self.engine, self.prompts[0])
        self.add("ops of a step that part from their reference", bool(found), 0, found)
        exact = self.hf_logits()
        error = (self.step(self.prompts, "all").double() - exact).abs()
        spread = float(exact.std())
        self.add(
            "logits, mean error against HF in float64, share of their spread", error.mean() / spread, 0.2
        )

    def quantised_packs(self) -> None:
        worst = 0.0
        decoder = self.engine.decoder
        for name, group in decoder.groups.items():
            packed = decoder.packed(name)
            weight = torch.cat([fused_weight(part, torch.float32) for part in group.resolve(name)])
            scales = packed.plain_scales()
            assert scales is not None
            steps = (weight - packed.to_dense()).abs() / scales[:, None]
            worst = max(worst, float(steps.where(scales[:, None] > 0, weight.abs()).max()))
        self.add("weights, largest error of quantising, in steps", worst, 0.501)

    def logits_against_hf(self) -> None:
        """Beside HF's own error: what HF in the same dtype loses against HF in float64."""
        fused = self.step(self.prompts, "all")
        hf = torch.cat([self.model(p[None].to(self.device)).logits[0].float() for p in self.prompts])
        exact = self.hf_logits()
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
            input_ids=ids, attention_mask=mask, max_new_tokens=self.new, min_new_tokens=self.new,
            num_beams=1, **NEVER,
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

    def sampling_statistics(self) -> None:
        """How often tokens were drawn, against their probabilities under the fused logits: chi-square of `DRAWS` draws
        as the normal deviate that is as rare (beyond 5: one in three million)."""
        logits = self.step(self.prompts[:1], "last")[0].double()
        for name, settings in {
            "": {},
            ", temperature 0.7, top_k 8": {"temperature": 0.7, "top_k": 8},
        }.items():
            sampling = SamplingConfig(max_new_tokens=1, n=DRAWS, seed=self.seed, **settings)  # type: ignore[arg-type]
            drawn = self.engine.generate(self.prompts[0][None], None, sampling).completion_ids[:, 0]
            warped = logits / sampling.temperature
            if sampling.top_k:
                least = warped.topk(min(sampling.top_k, len(warped))).values[-1]
                warped = warped.masked_fill(warped < least, float("-inf"))
            note = f"chi-square of {DRAWS} draws, in standard deviations"
            self.add(f"sampling statistics{name}", chi_square(drawn, warped.softmax(0)), 5.0, note)

    def padding_and_batch(self) -> None:
        together = self.step(self.prompts, "last")
        alone = torch.cat([self.step([p], "last") for p in self.prompts])
        self.add_bits("batch 1 against batch N, logits", (together - alone).abs().max())
        wide = torch.nn.functional.pad(self.ids, (5, 0)), torch.nn.functional.pad(self.mask, (5, 0))
        sampling = SamplingConfig(max_new_tokens=self.new, seed=self.seed)
        a, b = self.engine.generate(self.ids, self.mask, sampling), self.engine.generate(*wide, sampling)
        self.add_bits("padded against unpadded, tokens and log-probs", _unequal(a, b))
        one = [self.engine.generate(p[None], None, sampling) for p in self.prompts]
        differs = sum(int((a.logprobs[i] != r.logprobs[0]).sum()) for i, r in enumerate(one))
        self.add_bits("sampled alone against sampled in a batch", differs)
        three = self.generate(temperature=1.0, n=3)
        first = three.select(slice(0, None, 3))
        self.add_bits("first of 3 samples of a prompt against a single one", _unequal(first, a))

    def decode_against_prefill(self) -> None:
        prompt = self.prompts[0]
        prefill = self.step([prompt], "all")
        cache = self.engine.decoder.new_cache(1, len(prompt))
        decode = torch.cat(
            [self.engine.decoder.step(prompt[i : i + 1], cache, [0]) for i in range(len(prompt))]
        )
        self.add_bits("decode against prefill, logits", (decode - prefill).abs().max())

    def lora_fused_against_unfused(self) -> None:
        """W + s B A, rounded once into a pack, against the base and the adapters side by side."""
        rows = pack_rows(self.ids, self.mask)
        packed = self.engine.packed
        hidden, (weight, bias) = packed.hidden(rows), packed.head_weight()
        unfused = torch.nn.functional.linear(hidden, weight, bias).float()
        if (cap := self.engine.spec.logit_softcap) is not None:
            unfused = cap * torch.tanh(unfused / cap)
        error = (self.step(self.prompts, "all") - unfused).abs().max()
        self.add("LoRA fused against unfused, logits", error, 2 * self.logit_bound)

    def patched_and_undone(self) -> None:
        """The model with the kernels in it: its forward is the engine's, its beams are HF's; and without them again."""
        model: Any = self.model
        prompt = self.prompts[0][None].to(self.device)
        ids, mask = self.ids.to(self.device), self.mask.long().to(self.device)
        beams = {
            "input_ids": ids, "attention_mask": mask, "num_beams": 3, "max_new_tokens": self.new,
            "min_new_tokens": self.new, "length_penalty": 1.0, "output_scores": True,
            "return_dict_in_generate": True, **NEVER,
        }  # fmt: skip
        before, logits = _fingerprint(model), model(prompt).logits
        theirs = model.generate(**beams)
        with patch(model, backend=self.backend) as patched:
            ours = model.generate(**beams)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            fused = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            notes = patched.report().notes
        self.add("forwards of the patched model left to transformers", len(notes), 0, "; ".join(notes))
        step = self.step(self.prompts, "all").to(fused.dtype)
        self.add_bits(
            "patched forward against the engine's, logits", (fused.float() - step.float()).abs().max()
        )
        gap = (ours.sequences_scores - theirs.sequences_scores).abs().max()
        self.add("beams, score of the best against HF's", gap, 2 * self.logit_bound)
        if self.dtype == torch.float32:
            differs = (ours.sequences != theirs.sequences).any(1).sum()
            self.add("beams that differ from HF's", differs, 0)
        after = _fingerprint(model)
        traces = sum(before[name] != after.get(name) for name in before)
        traces += int((model(prompt).logits != logits).sum())
        self.add("undo leaves no trace, modules and logits changed", traces, 0)

    def logprob_gap(self, rollout: Rollout) -> None:
        """Rollout against training forward: max, mean, mean exp|d|, share of ratios outside [0.9, 1.1]."""
        gap = logprob_gap(self.engine.logprobs(rollout, exact=False), rollout)
        decoder = self.engine.decoder
        kind = str(self.dtype) if decoder.kv_cache == "auto" else "int8 cache"
        if decoder.weights != "model":  # which is the coarser of the two
            kind = decoder.weights
        bounds = GAP[kind]
        self.add("rollout against training log-probs, max |d|", gap["max"], bounds["max"])
        self.add("  mean |d|", gap["mean"], bounds["mean"])
        self.add("  mean exp|d|", gap["mult"], bounds["mult"], "the multiplicative error; 1 is equal")
        self.add("  share of ratios outside [0.9, 1.1]", gap["outside"], bounds["outside"])
        if self.quantised:  # nothing trains through int8
            return
        exact = self.engine.logprobs(rollout, exact=True)
        error = (exact - rollout.logprobs).abs().max()
        self.add_bits("rollout against training log-probs, exact mode", error)


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


def chi_square(drawn: Tensor, probabilities: Tensor) -> float:
    """Pearson's chi-square of the drawn tokens against their probabilities, as a standard normal deviate (Wilson and
    Hilferty, 1931); tokens that are expected less than five times are counted together. Infinite where a token of
    probability 0 was drawn."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    if bool(counts[probabilities == 0].any()):
        return math.inf
    expected = probabilities * len(drawn)
    often = expected >= 5
    pairs = [(counts[often], expected[often]), (counts[~often].sum()[None], expected[~often].sum()[None])]
    observed, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    if freedom < 1:
        return 0.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _unequal(a: Rollout, b: Rollout) -> Tensor:
    """How many tokens and log-probs differ."""
    return (a.completion_ids != b.completion_ids).sum() + (a.logprobs != b.logprobs).sum()


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a patch could change: class, instance attributes and tensors of every module."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [(n, id(t), t._version) for n, t in module.named_parameters(recurse=False)],
            [len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks")],
        )
        for name, module in model.named_modules()
    }


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 and bool [rows, longest], zeros on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts], device="cpu")
    return ids, torch.arange(width, device="cpu")[None] >= width - lengths[:, None]


@torch.no_grad()
def first_divergence(engine: HybridEngine, prompt: Tensor) -> str:
    """The first call of the plan whose output is further from the reference op than rounding explains, or "".

    Every call is compared on the inputs it had in the engine's own run, with freshly packed weights: an error
    is charged to the call that made it and to no later one.
    """
    decoder = engine.decoder
    how: dict[str, Any] = {"dtype": decoder.dtype, "weights": decoder.weights, "kv_cache": decoder.kv_cache}
    reference = Decoder(engine.spec, backend="reference", **how)
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
        slack = 4.0 if out.dtype == torch.bfloat16 else 256.0
        if self.reference.decoder.weights != "model" and call.op == "linear":
            # Where LoRA is fused, its sum's last bit decides a weight that lies between two integers.
            slack = max(slack, ROUNDING[torch.bfloat16] / ROUNDING[out.dtype])
        if not self.found and not error <= slack * ROUNDING[out.dtype] * (scale + 1e-30):
            self.found = f"{call.op} {call.weights or f'of layer {call.layer}'}: error {error:.3g} at scale {scale:.3g}"
            if (index := _layer_of(call)) is not None:
                self.found += f", in {self.reference.decoder.spec.layers[index].name}"


def _layer_of(call: OpCall) -> int | None:
    """The layer that a call belongs to, where the call tells."""
    if call.op in ("rope_append", "attention"):
        return call.layer
    found = re.match(r"layers\.(\d+)\.", call.weights)
    return int(found[1]) if found else None


@torch.no_grad()
def first_wrong_layer(model: nn.Module, engine: HybridEngine, prompt: Tensor) -> str:
    """The first layer whose output is further from HF's in float64 than rounding explains, or "": where every op is
    right, and the adapter describes another model."""
    wide = copy.deepcopy(model).double()
    there = prompt.to(engine.decoder.device)
    exact, own = (_layer_outputs(m, there) for m in (wide, model))
    outputs: dict[int, Tensor] = {}
    reached = 0

    def trace(call: OpCall, out: Tensor) -> None:
        nonlocal reached
        reached = reached if (index := _layer_of(call)) is None else index
        if call.out == "x":
            outputs[reached] = out.clone()

    decoder = engine.decoder
    before = decoder.executor
    decoder.executor = type(before)(decoder, trace)
    try:
        decoder.step(prompt, decoder.new_cache(1, len(prompt) + 1), [0], [len(prompt)], "all")
    finally:
        decoder.executor = before
    for index, layer in enumerate(engine.spec.layers):
        ours, theirs = ((x[index].double() - exact[index]).abs().max() for x in (outputs, own))
        floor = 16 * ROUNDING[decoder.dtype] * float(exact[index].abs().max())
        if not float(ours) <= 2 * float(theirs) + floor:
            return (
                f"output of {layer.name}, although every op agrees with its reference: error {float(ours):.3g}, "
                f"HF's own is {float(theirs):.3g}"
            )
    return ""


def _layer_outputs(model: nn.Module, prompt: Tensor) -> list[Tensor]:
    """What each decoder layer of the model gives for a prompt, [tokens, hidden]."""
    spec: DecoderSpec = decoder_spec(model)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(len(prompt), -1))

    hooks = [layer.module.register_forward_hook(keep) for layer in spec.layers if layer.module is not None]
    try:
        model(prompt[None])
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
