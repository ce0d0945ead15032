"""Runs of the trainers here, on another device, and begun on one and finished on the other: the same numbers.

`python -m tests.cuda.training FOLDER STAGE ...` does that with the pretended device of tests/cuda/pretend.py, which is
for a whole process.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dschat import config as configs
from dschat import device as devices
from dschat.engine import frozen
from dschat.rlhf import dpo, evals, grpo, models, ppo, replay, reward, rloo, sft, trunk
from dschat.rlhf.metrics import read_lines
from dschat.rlhf.run import Run
from tests.cuda.pretend import move, on_the_device

STORIES = Path(__file__).resolve().parents[1] / "data" / "stories260k"
PROMPTS = ("Once upon a time", "One day, a girl", "Tom and his dog", "Lily saw")
ROWS = [
    {"prompt": p, "chosen": " there was a happy dog.", "rejected": " fell." + " No." * i, "number": i}
    for i, p in enumerate(PROMPTS)
]
JUDGE = ["judge"]
"""Stands for what `judge` makes."""
ONLINE = {
    "reward": JUDGE, "max_new_tokens": 5, "max_prompt_length": 16, "prompts_per_step": 2,
    "samples_per_prompt": 2, "batch_size": 2, "ppo_epochs": 2, "compare_hf": 2,
}  # fmt: skip
TURNS = {
    "environment": f"{__file__}:Turns", "reward": [], "compare_hf": 0, "max_turns": 2, "turn_tokens": 4,
    "max_new_tokens": 24, "critic_update": "lora", "critic_lora_r": 2,
}  # fmt: skip
STAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (sft.train, configs.SFTConfig, {"response": "chosen"}),
    "reward": (reward.train, configs.RewardConfig, {"margin": "number"}),
    "reward-all": (reward.train, configs.RewardConfig, {"loss": "per_token", "lora_r": 0}),
    "dpo": (dpo.train, configs.DPOConfig, {}),
    "dpo-all": (dpo.train, configs.DPOConfig, {"lora_r": 0, "cache_reference": False, "loss": "ipo"}),
    "ppo": (ppo.train, configs.PPOConfig, {
        **ONLINE, "exact": True, "ratio_tolerance": 1e-4, "critic_update": "head",
    }),
    "ppo-all": (ppo.train, configs.PPOConfig, {
        **ONLINE, "lora_r": 0, "critic_update": "all", "entropy_coef": 0.1, "kl_control": "adaptive",
        "ema_decay": 0.9, "unsup_coef": 0.1, "unsup_length": 8, "importance_cap": 2.0, "reward_norm": "batch",
    }),
    "ppo-one-base": (ppo.train, configs.PPOConfig, {
        **ONLINE, "critic_trunk": "policy", "reward_trunk": "policy", "critic_lora_r": 2, "compare_hf": 0,
    }),
    "grpo": (grpo.train, configs.GRPOConfig, {**ONLINE, "kl_place": "loss", "flat_groups": "drop"}),
    "ppo-turns": (ppo.train, configs.PPOConfig, {**ONLINE, **TURNS}),
    "rloo": (rloo.train, configs.RLOOConfig, {**ONLINE, "reward_norm": "running"}),
}  # fmt: skip


class Turns:
    """Answers once; the reward is the turn's number."""

    def reset(self, **columns: Any) -> str:
        self.turn = 0
        return "Once upon a time"

    def step(self, action: str) -> tuple[str, float, bool]:
        self.turn += 1
        return " Then Tom said:", float(self.turn), self.turn == 2


class Stopped(BaseException):
    """Ends a run after a step, as a signal would."""


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """A run ends when the checkpoint of this step is written."""
    save, changed = Run.save, Run  # type: Any, Any

    def saving(self: Run, at: int, *args: Any, **keywords: Any) -> None:
        save(self, at, *args, **keywords)
        if at == step:
            raise Stopped

    changed.save = saving
    try:
        with contextlib.suppress(Stopped):
            yield
    finally:
        changed.save = save


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without what the clock says, and without how many of differences near 0 are above it."""
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith("time/") and not k.endswith(("accuracy", "accuracies"))
        }
        for line in read_lines(folder / "metrics.jsonl")
    ]


def compare(stage: str, folder: Path, device: str, away: Any = contextlib.nullcontext) -> int:
    """All here; all on `device`, in the context that `away` makes; the first step here and the second there; and the
    other way round. Raises AssertionError where numbers differ; returns how many steps were compared."""
    train, config, keys = STAGES[stage]
    keys = common(folder) | keys
    if keys.get("reward") == JUDGE:
        keys["reward"] = [judge(folder)]
    if keys.get("unsup_coef"):
        keys["unsup_data"] = keys["data"]

    def part(name: str, there: bool, until: int = 0) -> None:
        where = {"output_dir": str(folder / name), "device": device if there else "cpu"}
        with away() if there else contextlib.nullcontext():
            with stopped_after(until) if until else contextlib.nullcontext():
                train(config(**{**keys, **where}))

    part("here", False)
    part("there", True)
    for name, first in (("moved", False), ("back", True)):
        part(name, first, 1)
        part(name, not first)
    expected = numbers(folder / "here")
    for name in ("there", "moved", "back"):
        for a, b in zip(expected, numbers(folder / name), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(
                    b[key], a[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
                )
    return len(expected)


def common(folder: Path) -> dict[str, Any]:
    """Keys of every stage, with data in `folder`, which is made."""
    folder.mkdir(parents=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": str(STORIES), "data": [str(rows)], "eval_data": [str(rows)], "dtype": "float32", "lora_r": 4,
        "batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "tensorboard": False, "progress": False,
    }  # fmt: skip


def judge(folder: Path) -> str:
    """A reward model in `folder`, with the head that a seed draws and an adapter of zeros."""
    scorer = models.load_scorer(str(STORIES), torch.float32)
    about = {**trunk.about_base(scorer, configs.RewardConfig()), "reward_mean": 0.0, "reward_std": 1.0}
    scorer = models.add_lora(scorer, 2, 0.0, ["all-linear"], "SEQ_CLS", 0)
    models.save_model(scorer, models.load_tokenizer(str(STORIES)), folder / "judge", merge=True, about=about)
    return str(folder / "judge")


def compare_evaluations(folder: Path, device: str, away: Any = contextlib.nullcontext) -> int:
    """The tasks of `dschat eval`, here and there; returns how many."""
    data = common(folder)["data"]
    labelled = folder / "labelled.jsonl"
    labelled.write_text(
        "".join(json.dumps({"text": r["prompt"], "label": i % 2}) + "\n" for i, r in enumerate(ROWS))
    )
    scorer = judge(folder)
    tasks: list[dict[str, Any]] = [
        {"task": "perplexity"}, {"task": "kl", "against": str(STORIES), "samples": 2},
        {"task": "win_rate", "against": str(STORIES), "judge": scorer, "temperature": 0.0},
        {"task": "reward", "model": scorer}, {"task": "classify", "model": scorer, "data": [str(labelled)]},
    ]  # fmt: skip
    for keys in tasks:
        found = []
        for there in (False, True):
            with away() if there else contextlib.nullcontext():
                settings = {"model": str(STORIES), "data": data, **keys, "device": device if there else "cpu"}
                config = configs.EvalConfig(dtype="float32", max_new_tokens=5, batch_size=2, **settings)
                found.append(evals.run(config))
        for a, b in zip(*map(tree_leaves, found), strict=True):
            same = math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) if isinstance(a, float) else a == b
            assert same, f"{keys['task']}: {a} here, {b} there; {found}"
    return len(tasks)


def compare_replays(folder: Path, device: str, away: Any = contextlib.nullcontext) -> int:
    """Failed steps of runs of here and of there, computed again here and there; returns how many."""
    keys = common(folder)
    online = {**STAGES["ppo"][2], "reward": [judge(folder)], "critic_learning_rate": 1e25}
    too_fast = {"dpo": {"learning_rate": 1e25}, "ppo": online}
    for stage, more in too_fast.items():
        found = set()
        for there in (False, True):
            run = folder / f"{stage}-{there}"
            settings = {**keys, **more, "output_dir": str(run), "device": device if there else "cpu"}
            train, config, _ = STAGES[stage]
            with away() if there else contextlib.nullcontext(), contextlib.suppress(configs.ConfigError):
                train(config(**settings))
            (failed,) = run.glob("failed-step-*")
            for where in ("cpu", device):
                with away() if where == device else contextlib.nullcontext():
                    found.add(replay.replay(str(failed), where).where)
        assert len(found) == 1 and "" not in found, f"{stage}: {found}"
    return len(too_fast)


OFFLOADED: dict[str, tuple[int, dict[str, Any]]] = {
    "dpo-all": (1, {}),
    "ppo-all": (2, {"offload_reward": True}),
    "ppo": (1, {"offload_reward": True, "exact": False, "ratio_tolerance": None}),
    "grpo": (2, {"offload_reward": True, "reference": str(STORIES)}),
}
"""Stage -> (models that lie in the host's memory, keys beside offload_reference)."""


def compare_offloads(folder: Path, device: str, away: Any = contextlib.nullcontext) -> int:
    """Runs there whose frozen models lie in the host's memory: bit for bit those whose models lie there. While such a
    model scores, a part of it is there; before and after, none. Returns how many models."""
    keys = common(folder)
    scorer, made = judge(folder), []

    class Watched(frozen.HostWeights):
        def __init__(self, model: nn.Module, where: torch.device) -> None:
            super().__init__(model, where)
            self.model = model
            self.shares = [self.share()]
            made.append(self)

        def share(self) -> float:
            """How much of the model is there."""
            there = [p.numel() for p in self.model.parameters() if p.device == self.device]
            return sum(there) / sum(p.numel() for p in self.model.parameters())

        @contextlib.contextmanager
        def fetched(self, modules: Any) -> Iterator[None]:
            with super().fetched(modules):
                self.shares.append(self.share())
                yield

    changed, original = frozen, frozen.HostWeights  # type: Any, Any
    changed.HostWeights = Watched
    try:
        for stage, (count, more) in OFFLOADED.items():
            train, config, own = STAGES[stage]
            before = len(made)
            for offload in (False, True):
                settings = {**keys, **own, "device": device, "output_dir": str(folder / f"{stage}-{offload}")}
                if "reward" in own:
                    settings["reward"] = [scorer]
                if own.get("unsup_coef"):
                    settings["unsup_data"] = keys["data"]
                settings |= {k: v for k, v in more.items() if offload or k != "offload_reward"}
                settings |= {"eval_data": [], "compare_hf": 0} if "reward" in own else {"eval_data": []}
                with away():
                    train(config(**settings, offload_reference=offload))
                assert len(made) == before + count * offload, f"{stage}: {len(made) - before} models"
            plain, moved = (numbers(folder / f"{stage}-{offload}") for offload in (False, True))
            assert plain == moved and plain, f"{stage}: {plain} and {moved}"
    finally:
        changed.HostWeights = original
    for watched in made:
        assert watched.shares[0] == watched.share() == 0.0 and 0.0 < max(watched.shares) < 0.3, watched.shares
    return len(made)


# -------------------------------------------------------------------------------------------- the pretended device


def home(model: nn.Module) -> nn.Module:
    """`model.to("cpu")`."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                here = nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), here)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.cpu().clone()
    return model


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """What asks for a device gets the pretended one."""
    chooser, writer = devices, models  # type: Any, Any
    before = chooser.use, chooser.place, writer._save_model
    chooser.use = lambda name: torch.device("pretend", 0)
    chooser.place = lambda model, device: model if device.type == "cpu" else move(model)
    # transformers looks at storages, which a pretended tensor does not have
    writer._save_model = lambda model, *rest: before[2](home(model), *rest)
    try:
        with on_the_device("reference"):
            yield
    finally:
        chooser.use, chooser.place, writer._save_model = before


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("pretend")
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        others = {
            "evaluations": compare_evaluations, "replays": compare_replays, "offloads": compare_offloads,
        }  # fmt: skip
        compared = others.get(name, partial(compare, name))
        print(f"{name}: {compared(Path(sys.argv[1]) / name, 'auto', pretended)} agree")
