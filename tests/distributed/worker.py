"""What the spawned processes do: `worker.py SCENARIO FOLDER`. The lead leaves the results as FOLDER/SCENARIO-WORLD.pt.

The same functions run in the test's own process, alone, to give what the results are compared with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dschat import config as C
from dschat import parallel
from dschat.engine import HybridEngine, SamplingConfig
from dschat.engine.frozen import frozen_engine
from dschat.engine.precision import LossScale
from dschat.engine.sharing import Sharing
from dschat.engine.zero import ZeroSettings, held, make_engine, whole
from dschat.rlhf import models

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
SAMPLING = SamplingConfig(max_new_tokens=10, n=2, seed=3, eos_token_id=[13, 426, 2])
KINDS = {  # name -> (dtype, LoRA, exact)
    "full": (torch.float32, False, False),
    "lora": (torch.float32, True, False),
    "lora-exact": (torch.float32, True, True),
    "lora-bf16": (torch.bfloat16, True, False),
    "full-bf16": (torch.bfloat16, False, False),
    "lora-f16": (torch.float16, True, False),
    "full-f16": (torch.float16, False, False),
}

CASES = [
    (k, s)
    for k in KINDS
    for s in range(4)
    if s > 1 or k in ("full", "lora", "full-f16") or (k, s) == ("lora-bf16", 1)
]
FOUR = [("full", 2), ("lora-bf16", 3)]
"""(kind, ZeRO stage) of the runs of four processes."""
TEAMS = [("lora", 3, 2), ("full-bf16", 2, 2), ("full", None, 4)]
"""(kind, ZeRO stage, inference_tp_size) of engines of four processes in teams."""
PRODUCT = [(k, s, c) for k in KINDS if k != "lora-exact" for s in (None, 0, 1, 2, 3) for c in (4, 9)]
"""(kind, ZeRO stage, rows of a backward) of the nightly runs: three backwards a step, or one."""


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Five prompts (so that two processes share them unequally), two of them alike, left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (5, 9), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    ids[4] = ids[0]
    return ids, mask


def policy(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    dtype, lora, _ = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype).eval()
    return models.add_lora(model, 4, 8, ["all-linear"], "CAUSAL_LM", 0) if lora else model


def rollout_dtype(kind: str) -> torch.dtype | None:
    """As runs on the CPU have it."""
    return torch.float32 if KINDS[kind][0] == torch.float16 else None


def engine(kind: str, settings: ZeroSettings | None, rate: float = 1e-2, **keywords: Any) -> HybridEngine:
    model = policy(kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate)
    keywords["dtype"] = rollout_dtype(kind)
    if KINDS[kind][0] == torch.float16:
        keywords["loss_scale"] = LossScale(initial_scale_power=10, hysteresis=1)
    return make_engine(model, optimizer, settings, exact=KINDS[kind][2], **keywords)


def rate(kind: str) -> float:
    """A learning rate that changes tokens in two steps, and no more."""
    return 1e-3 if "f16" in kind else 1e-2


def anew(kind: str) -> bool:
    """Whether every step has a rollout of its own. Rounded to 16 bits, weights (of an adapter: the gradients that
    signs Adam steps by) differ by who computes a row, and other tokens would be drawn."""
    return kind not in ("full-bf16", "lora-f16", "full-f16")


def train(own: HybridEngine, steps: int, chunk: int = 4, anew: bool = True) -> dict[str, list[Any]]:
    """Rolls out and steps towards what was drawn: tokens, losses, gradient norms. Several backwards a step, the last
    of fewer rows than processes. anew: roll out before every step, else once."""
    ids, mask = prompts()
    out: dict[str, list[Any]] = {"tokens": [], "logprobs": [], "loss": [], "norm": [], "gap": []}
    for step in range(steps):
        if anew or not step:
            rollout = own.generate(ids, mask, SAMPLING)
        out["tokens"].append(rollout.completion_ids.clone())
        out["logprobs"].append(rollout.logprobs.clone())
        count = rollout.completion_mask.sum()
        total = gap = 0.0
        rows = list(range(len(rollout) - 1))
        for piece, mine in parallel.shares(rows, chunk):
            batch = rollout.select(list(piece))
            logp = own.logprobs(batch)
            gap = max(gap, float((logp.detach() - batch.logprobs).abs().max()))
            loss = -(logp * batch.completion_mask).sum() / count
            own.backward(loss if mine else loss * 0.0)
            total += float(loss.detach()) * mine
        found = parallel.total({"loss": total, "gap": gap}, largest=["gap"])
        out["loss"].append(found["loss"])
        out["gap"].append(found["gap"])
        out["norm"].append(own.step(0.5))
    return out


def final(own: HybridEngine) -> dict[str, Any]:
    """The trained weights, whole, and a rollout with them."""
    trained = {n: p for n, p in own.model.named_parameters() if p.requires_grad}
    with whole(trained.values()):
        weights = {n: p.detach().clone() for n, p in trained.items()}
    rollout = own.generate(*prompts(), SAMPLING)
    return {"weights": weights, "final": (rollout.completion_ids, rollout.logprobs)}


def gathered(own: HybridEngine) -> list[str]:
    """Parameters that ZeRO-3 shards and that are whole now."""
    return [
        n
        for n, p in own.model.named_parameters()
        if hasattr(p, "ds_id") and p.ds_status.name != "NOT_AVAILABLE"
    ]


# -------------------------------------------------------------------------------------------------- scenarios


def zero(folder: Path) -> dict[str, Any]:
    """Every ZeRO stage with every kind of model; state and leftovers of ZeRO-3."""
    out: dict[str, Any] = {}
    for kind, stage in CASES:
        own = engine(kind, ZeroSettings(stage), rate(kind))
        result: dict[str, Any] = train(own, 2, anew=anew(kind)) | final(own)
        if kind in ("full", "lora"):
            result["state"] = own.optimizer.state_dict()
        result["left"] = gathered(own)
        if stage == 3 and kind == "full":
            result |= _zero3(own)
        out[f"{kind}/{stage}"] = result
    for stage in (2, 3):
        out[f"offload/{stage}"] = train(engine("lora", ZeroSettings(stage, offload=True)), 2)
    out["lengths"] = _lengths()
    out["queue/1"] = queue(1)
    out["plain"] = train(engine("full", None), 2)
    return out


def four(folder: Path) -> dict[str, Any]:
    """Engines and runs in four processes, which is more than the rows of the last backward."""
    out: dict[str, Any] = {}
    for kind, stage in FOUR:
        own = engine(kind, ZeroSettings(stage), rate(kind))
        out[f"{kind}/{stage}"] = train(own, 2, anew=anew(kind)) | final(own)
    for kind, stage, size in TEAMS:
        settings = None if stage is None else ZeroSettings(stage)
        own = engine(kind, settings, rate(kind), inference_tp_size=size)
        out[f"{kind}/{stage}/{size}"] = train(own, 1) | final(own) | {"packs": own.memory()["packs"]}
    out["queue/2"] = queue(2)
    for name in FOUR_STAGES:
        run_stage(name, folder, "4")
    return out


LONG = [10] * 6 + [1] * 6
"""Tokens of twelve prompts: the first team has all the work."""


def unequal() -> tuple[torch.Tensor, SamplingConfig]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 500, (len(LONG), 5), generator=generator)
    return ids, replace(SAMPLING, n=1, eos_token_id=None)


def queue(size: int) -> dict[str, Any]:
    """A rollout of two rows at a time whose first team, after its first token, waits until the other has taken all of
    its waiting prompts; the same as the processes come. Completions, and the decode steps of every process."""
    made: list[Any] = []
    original = Sharing.queue

    def recorded(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    def wait(row: int, token: int) -> None:
        (waiting,) = made
        until = time.monotonic() + 100
        while waiting._add(0, 0) < len(waiting.waiting[0]) and time.monotonic() < until:
            time.sleep(0.01)

    own = engine("full", None, max_slots=2, inference_tp_size=size)
    ids, sampling = unequal()
    out = {}
    Sharing.queue = recorded  # type: ignore[method-assign]
    try:
        first = own.generate(
            ids,
            None,
            sampling,
            limits=LONG,
            on_token=wait if own.sharing.team == 0 and own.sharing.part == 0 else None,
        )
    finally:
        Sharing.queue = original  # type: ignore[method-assign]
    again = own.generate(ids, None, sampling, limits=LONG)
    world = parallel.world()
    out["steps"] = parallel.gather(torch.tensor([first.stats.steps]), [1] * world)
    out["rollouts"] = [(r.completion_ids, r.logprobs, r.completion_mask) for r in (first, again)]
    left = [parallel.store().check([f"{made[0].name}/{team}"]) for team in range(2)]
    return out | {"keys": left}


def skips(folder: Path) -> dict[str, Any]:
    """`skipping` with every stage, the second process the one that overflows; `summing`."""
    return {
        f"{kind}/{stage}/{offload}": skipping(kind, ZeroSettings(stage, offload), parallel.rank() == 1)
        for kind, stage, offload in SKIPS
    } | {f"sum/{stage}/{offload}": summing(ZeroSettings(stage, offload)) for stage, offload in SUMS}


SKIPS = [
    (kind, stage, offload)
    for kind in ("lora-f16", "full-f16")
    for stage, offload in ((0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
]


def skipping(kind: str, settings: ZeroSettings | None, bad: bool) -> list[dict[str, Any]]:
    """By step of float16: an infinity in the second backward; one that is left out for another model's sake; one that
    is made; numbers that only float16 cannot hold. bad: these are this process's."""
    own = engine(kind, settings, 1e-3)
    ids, mask = prompts()
    rollout = own.generate(ids, mask, SAMPLING)
    trained = [p for p in own.model.parameters() if p.requires_grad]
    out = []
    for factor, skip in ((float("inf"), False), (1.0, True), (1.0, False), (1e6, False)):
        before = weights(trained)
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]):
            batch = rollout.select(rows[parallel.share(len(rows))])
            loss = -(own.logprobs(batch) * batch.completion_mask).sum() / 100
            own.backward(loss * (factor if bad and len(rows) > 4 else 1.0))
        bound, overflow = own.ready(0.5), own.stepper.overflow
        own.apply(skip)
        same = all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))
        steps = {float(entry["step"]) for entry in own.optimizer.state_dict()["state"].values()}
        found = {"bound": bound, "overflow": overflow, "norm": own.stepper.norm, "same": same, "steps": steps}
        out.append(found | own.stepper.numbers() | {"epoch": own.epoch, "left": gathered(own)})
    return out


SUMS = [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


def summing(settings: ZeroSettings | None) -> list[float]:
    """Norms of one and of three backwards of all rows in each process, whose largest gradient in float16 is 50,000."""

    def loss(own: HybridEngine) -> torch.Tensor:
        return own.logprobs(own.generate(*prompts(), SAMPLING)).mean()

    probe = engine("full-f16", None, 0.0)
    probe.backward(loss(probe))
    factor = 5e4 / max(float(p.grad.abs().max()) for p in probe.model.parameters() if p.grad is not None)
    own = engine("full-f16", settings, 0.0)
    out = []
    for times in (1, 3):
        for _ in range(times):
            own.backward(loss(own) * factor)
        out.append(own.step(1.0))
    return out


def weights(trained: list[Any]) -> list[torch.Tensor]:
    with whole(trained):
        return [p.detach().clone() for p in trained]


def dies(folder: Path) -> dict[str, Any]:
    """Process DIES kills itself in the middle of a rollout; what the other then says is left in folder/DIES.txt."""
    victim = int(os.environ["DIES"])
    own = engine("full", None, max_slots=2)
    ids, sampling = unequal()

    def kill(row: int, token: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        own.generate(ids, None, sampling, limits=LONG, on_token=kill if parallel.rank() == victim else None)
    except RuntimeError as error:
        (folder / f"{victim}.txt").write_text(f"{parallel.is_parted(error)}: {error}")
        os._exit(3)
    return {}


def dies_scoring(folder: Path) -> dict[str, Any]:
    """Process DIES kills itself between two layers of a frozen model in shards; what the other then says is left in
    folder/scoring-DIES.txt."""
    victim = int(os.environ["DIES"])
    rollout = HybridEngine(policy("full")).generate(*prompts(), SAMPLING)
    own = frozen_engine(policy("full"), False, ZeroSettings(3))
    down = own.packed.spec.layers[1].down.module
    original = down.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if parallel.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(x)

    down.forward = forward
    try:
        with torch.no_grad():
            own.logprobs(rollout)
    except RuntimeError as error:
        (folder / f"scoring-{victim}.txt").write_text(f"{parallel.is_parted(error)}: {error}")
        os._exit(3)
    return {}


def product(folder: Path) -> dict[str, Any]:
    """ZeRO stage x LoRA x dtype x accumulation."""
    out = {}
    for kind, stage, chunk in PRODUCT:
        own = engine(kind, None if stage is None else ZeroSettings(stage), rate(kind))
        out[f"{kind}/{stage}/{chunk}"] = train(own, 3, chunk, anew(kind))
    return out


def _lengths() -> torch.Tensor:
    """Tokens of each row of a rollout under ZeRO-3 in which the rows of one process end long before the other's."""
    own = engine("lora", ZeroSettings(3))
    ids, mask = prompts()
    first = HybridEngine(policy("lora")).generate(ids, mask, replace(SAMPLING, eos_token_id=None))
    stop = sorted(
        {int(t) for t in first.completion_ids[6:, 0]}
    )  # the first tokens of the second process's rows
    return own.generate(ids, mask, replace(SAMPLING, eos_token_id=stop)).completion_mask.sum(1)


def _zero3(own: Any) -> dict[str, Any]:
    """What is left gathered after a failure in the middle of a forward, and how much is whole at a time."""
    from dschat.engine import zero as module

    sizes: list[int] = []
    original = module.whole

    @contextlib.contextmanager
    def counting(parameters: Any, write: bool = False) -> Any:
        with original(parameters, write):
            sizes.append(sum(p.numel() for p in own.model.parameters()))
            yield

    module.whole = counting
    try:
        own.flip()
        own._check_epoch()
        ids, mask = prompts()
        rollout = own.generate(ids, mask, SAMPLING)
        own.logprobs(rollout)
    finally:
        module.whole = original
    layer, own.packed.spec.layers[1].down.module.forward = own.packed.spec.layers[1].down.module.forward, None
    with contextlib.suppress(TypeError):
        own.logprobs(rollout)
    own.packed.spec.layers[1].down.module.forward = layer
    total = sum(p.ds_numel for p in own.model.parameters())
    return {"after_failure": gathered(own), "largest": max(sizes), "total": total, "memory": own.memory()}


def frozen(folder: Path) -> dict[str, Any]:
    """Frozen models in shards: their scores, what of them a process has, what is whole at a time, and what is left
    whole afterwards and after a failure in a layer."""
    from dschat.engine import zero as module

    rollout = HybridEngine(policy("full")).generate(*prompts(), SAMPLING)
    out: dict[str, Any] = {}
    for kind in ("full", "full-bf16", "full-f16"):
        own = frozen_engine(policy(kind), False, ZeroSettings(3), dtype=rollout_dtype(kind))
        with torch.no_grad():
            out[kind] = own.logprobs(rollout)
    exact = frozen_engine(policy("full"), False, ZeroSettings(3), exact=True)
    with torch.no_grad():
        out["exact"] = exact.logprobs(rollout)
    model = models.load_scorer(str(folder / "scorer"), torch.float32)
    scorer = models.frozen_scorer(model, offload=True, zero=ZeroSettings(3))
    out["scores"] = scorer.rate(rollout)
    parameters = [p for m in (own.model, exact.model, model) for p in m.parameters()]
    out["held"] = sum(held(p).numel() for p in parameters) / sum(p.ds_numel for p in parameters)

    sizes: list[int] = []
    original = module.whole

    @contextlib.contextmanager
    def counting(parameters: Any, write: bool = False) -> Any:
        with original(parameters, write):
            sizes.append(sum(p.numel() for p in model.parameters()))
            yield

    module.whole = counting
    try:
        scorer.forget()
        scorer.rate(rollout)
    finally:
        module.whole = original
    out["largest"] = max(sizes) / sum(p.ds_numel for p in model.parameters())
    scorer.forget()
    scorer.packed.spec.layers[1].down.module.forward = None
    with contextlib.suppress(TypeError):
        scorer.rate(rollout)
    out["left"] = [p.ds_id for p in parameters if p.ds_status.name != "NOT_AVAILABLE"]
    return out


def stages(folder: Path) -> dict[str, Any]:
    """The stages as runs, each with ZeRO as STAGES has it; those of HALF end after their second checkpoint."""
    return {name: run_stage(name, folder, str(parallel.world())) for name in STAGES}


STAGES: dict[str, dict[str, Any]] = {
    "sft": {"zero_stage": 2, "lora_r": 0, "gradient_accumulation_steps": 2},
    "reward": {"zero_stage": 3, "lora_r": 4},
    "dpo": {"zero_stage": 3, "lora_r": 4, "gradient_accumulation_steps": 2},
    "ppo": {"zero_stage": 3, "lora_r": 4, "exact": True, "critic_update": "lora", "ppo_epochs": 2},
    "ppo-full": {"zero_stage": 3, "lora_r": 0, "critic_update": "all", "critic_zero_stage": 2},
    "grpo": {"zero_stage": 2, "lora_r": 4, "reward": ["worker:short"]},
    "rloo": {"zero_stage": 1, "lora_r": 4, "reward": ["worker:short"], "gradient_accumulation_steps": 2},
    "ppo-mixed": {"zero_stage": 3, "lora_r": 4, "critic_update": "head", "unsup_coef": 0.5, "unsup_length": 12,
                  "ema_decay": 0.5},
    "ppo-shared": {"zero_stage": 2, "critic_zero_stage": 1, "lora_r": 4, "reward_trunk": "policy",
                   "critic_trunk": "policy", "critic_lora_r": 2, "ppo_epochs": 2},
    "ppo-frozen": {"zero_stage": 3, "lora_r": 0, "critic_update": "all", "offload_reward": True},
    "dpo-frozen": {"zero_stage": 3, "lora_r": 0, "cache_reference": False, "offload_reference": True},
    "ppo-f16": {"zero_stage": 3, "lora_r": 4, "critic_update": "all", "critic_zero_stage": 2, "dtype": "float16",
                "initial_scale_power": 8},
    "sft-half": {"zero_stage": 3, "lora_r": 0},
    "sft-half-f16": {"zero_stage": 3, "lora_r": 0, "dtype": "float16", "initial_scale_power": 8},
    "grpo-half": {"lora_r": 4, "reward": ["worker:short"]},
    "grpo-half3": {"zero_stage": 3, "lora_r": 4, "reward": ["worker:short"], "ema_decay": 0.5},
}  # fmt: skip
HALF = tuple(name for name in STAGES if "half" in name)
FOUR_STAGES = ("ppo",)


def short(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """Shorter answers are better."""
    return [-len(c) / 20 for c in completions]


class Ended(BaseException):
    """Ends a run after a checkpoint."""


def run_stage(name: str, folder: Path, output: str, **more: Any) -> dict[str, Any]:
    """The result of one stage's run in folder/NAME-OUTPUT; {} where it was ended early."""
    import importlib

    from dschat.rlhf.run import Run

    command = name.partition("-")[0]
    keys = {
        "model": str(STORIES), "data": [str(folder / "pairs.jsonl")], "eval_data": [str(folder / "pairs.jsonl")],
        "output_dir": str(folder / f"{name}-{output}"), "dtype": "float32", "tensorboard": False,
        "progress": False, "batch_size": 5, "learning_rate": 2e-3, "max_steps": 3, "keep_checkpoints": 9,
    } | STAGES[name] | more  # fmt: skip
    if command in ("sft", "reward", "dpo"):
        keys |= {"max_length": 64}
    else:
        keys |= {"max_new_tokens": 8, "max_prompt_length": 16, "prompts_per_step": 3, "samples_per_prompt": 2,
                 "batch_size": 4}  # fmt: skip
        keys = {"reward": [str(folder / ("adapted" if "reward_trunk" in keys else "scorer"))]} | keys
    if command == "sft":
        keys |= {"response": "chosen"}
    if command == "ppo":
        keys |= {"critic_learning_rate": 1e-3}
    if "unsup_coef" in keys:
        keys |= {"unsup_data": [str(folder / "pairs.jsonl")]}
    config = C.COMMANDS[command](**keys)
    trainer = importlib.import_module(f"dschat.rlhf.{command}")
    if name not in HALF or more:
        return trainer.train(config)
    original = Run.save

    def save(self: Run, step: int, *args: Any, **kw: Any) -> None:
        original(self, step, *args, **kw)
        if step == 2:
            raise Ended

    Run.save = save  # type: ignore[method-assign]
    try:
        return trainer.train(config)
    except Ended:
        return {}
    finally:
        Run.save = original  # type: ignore[method-assign]


if __name__ == "__main__":
    import faulthandler

    faulthandler.dump_traceback_later(int(os.environ["LIMIT"]) - 20, exit=True)
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    name, where = sys.argv[1], Path(sys.argv[2])
    found = globals()[name](where)
    if parallel.lead():
        torch.save(found, where / f"{name}-{parallel.world()}.pt")
    parallel.barrier()
