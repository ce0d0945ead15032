"""Masters and loss scale: steps that 16 bits cannot hold, gradients that float16 cannot, and overflows."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from dschat import HybridEngine, SamplingConfig
from dschat.engine.precision import LossScale, MasterOptimizer, with_masters
from dschat.engine.stepper import Stepper
from dschat.engine.zero import deepspeed
from dschat_kernels.packing import PackedLinear


def weights(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.ParameterList([torch.nn.Parameter(torch.randn(8, 5).to(dtype) / 8) for _ in range(2)])


def grow(parameters, optimizer, steps: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    stepper = Stepper(optimizer)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        stepper.step(1.0)


def test_small_steps_are_not_lost_in_16_bits():
    """40 steps of 1e-5 on weights of 0.1: the masters are a float32 run's, the weights their rounding; without masters
    bfloat16 weights stay where they are."""
    plain, mastered, exact = weights(), weights(), weights()
    start = copy.deepcopy(plain)
    grow(plain, torch.optim.AdamW(plain, lr=1e-5, weight_decay=0.0), 40)
    optimizer = with_masters(torch.optim.AdamW(mastered, lr=1e-5, weight_decay=0.0))
    grow(mastered, optimizer, 40)
    floats = torch.nn.ParameterList([torch.nn.Parameter(p.detach().float()) for p in exact])
    generator = torch.Generator().manual_seed(0)
    torch_optimizer = torch.optim.AdamW(floats, lr=1e-5, weight_decay=0.0)
    for _ in range(40):
        for p in floats:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
        torch.nn.utils.clip_grad_norm_(floats, 1.0)
        torch_optimizer.step()
    for weight, master, expected in zip(mastered, [m for _, m in optimizer.pairs], floats, strict=True):
        assert torch.allclose(master, expected, rtol=0, atol=1e-9)
        assert torch.equal(weight, master.bfloat16())
    large = start[0].abs() > 0.01
    assert torch.equal(plain[0][large], start[0][large])
    moved = (optimizer.pairs[0][1] - start[0].float()).abs()[large]
    assert moved.min().item() > 1e-7


def test_float32_weights_have_no_masters():
    optimizer = torch.optim.AdamW(weights(torch.float32))
    assert with_masters(optimizer) is optimizer


def test_masters_go_through_a_checkpoint():
    """Straight = stopped and resumed, bit for bit; a state without masters takes the weights."""
    straight, first, second = weights(), weights(), weights()
    optimizers = [with_masters(torch.optim.AdamW(w, lr=1e-4)) for w in (straight, first, second)]
    grow(straight, optimizers[0], 3)
    grow(first, optimizers[1], 3)
    state = copy.deepcopy(optimizers[1].state_dict())
    assert all("master" in entry for entry in state["state"].values())
    for a, b in zip(second, first, strict=True):
        a.data.copy_(b.data)
    optimizers[2].load_state_dict(state)
    grow(straight, optimizers[0], 3, seed=1)
    grow(second, optimizers[2], 3, seed=1)
    pairs = zip(optimizers[0].pairs, optimizers[2].pairs, strict=True)
    assert all(torch.equal(a, b) and torch.equal(ma, mb) for (a, ma), (b, mb) in pairs)
    for entry in state["state"].values():
        del entry["master"]
    optimizers[2].load_state_dict(state)
    assert all(torch.equal(m, w.float()) for w, m in optimizers[2].pairs)


def test_an_optimizer_that_has_stepped_keeps_its_moments():
    straight, late = weights(torch.float32), weights(torch.float32)
    optimizers = [torch.optim.AdamW(w, lr=1e-2) for w in (straight, late)]
    for parameters, optimizer in zip((straight, late), optimizers, strict=True):
        grow(parameters, optimizer, 2)
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in late]
    given = torch.optim.AdamW(half, lr=1e-2)
    given.load_state_dict(optimizers[1].state_dict())
    taken = with_masters(given)
    grow(straight, optimizers[0], 1, seed=1)
    grow(half, taken, 1, seed=1)
    assert [float(e["step"]) for e in taken.state_dict()["state"].values()] == [3.0, 3.0]
    for (_, master), expected in zip(taken.pairs, straight, strict=True):
        assert torch.allclose(master, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_the_scale_moves_as_deepspeeds(hysteresis, monkeypatch):
    deepspeed(torch.device("cpu"))
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    theirs = loss_scaler.DynamicLossScaler(2.0**8, 5, 1.0, hysteresis, False, raise_error_at_min_scale=False)
    ours = LossScale(initial_scale_power=8, loss_scale_window=5, hysteresis=hysteresis)
    draw = random.Random(hysteresis)
    seen = set()
    for i in range(400):
        overflow = draw.random() < (0.8 if 200 < i < 260 else 0.1)
        if ours.exhausted and overflow:
            assert ours.value == 1.0
        ours.update(overflow, overflow)
        theirs.update_scale(overflow)
        assert ours.value == theirs.cur_scale, i
        seen.add(ours.value)
    assert len(seen) > 6 and min(seen) == 1.0
    again = LossScale(initial_scale_power=8, loss_scale_window=5, hysteresis=hysteresis)
    again.load_state_dict(ours.state_dict())
    for overflow in (True, True, False, True):
        ours.update(overflow, overflow), again.update(overflow, overflow)
        assert ours.state_dict() == again.state_dict()


def test_settings_that_no_scale_has():
    for values, text in (
        ({"loss_scale": -1.0}, "loss_scale is -1.0, but it must be 0"),
        ({"initial_scale_power": 40}, "initial_scale_power is 40, but it must be from 0 to 32"),
        ({"loss_scale_window": 0}, "loss_scale_window is 0, but it must be 1 or more"),
        ({"hysteresis": 0}, "hysteresis is 0, but it must be 1 or more"),
        ({"min_loss_scale": 0.0}, "min_loss_scale is 0.0, but it must be greater than 0"),
    ):
        with pytest.raises(ValueError, match=text):
            LossScale(**values)


def test_a_gradient_that_float16_cannot_hold():
    """1e-9 is zero in float16, and is itself with a scale; 1e6 overflows, and steps nothing."""

    def step(factor: float, scale: LossScale | None):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
        optimizer = MasterOptimizer(torch.optim.SGD([p], lr=1.0))
        stepper = Stepper(optimizer, scale)
        stepper.backward((p.float() * factor).sum())
        return stepper, stepper.step(), p

    assert step(1e-9, None)[1] == 0.0
    scale = LossScale(hysteresis=1)
    assert step(1e-9, scale)[1] == pytest.approx(2e-9, rel=2e-2) and scale.skipped == 0
    stepper, norm, p = step(1e6, scale)
    assert math.isinf(norm) and stepper.overflow and torch.equal(p, torch.ones_like(p))
    assert scale.value == 2.0**15 and scale.skipped == 1
    assert stepper.numbers("policy/") == {"policy/loss_scale": 2.0**15, "policy/skipped_steps": 1.0}
    fixed = LossScale(loss_scale=1024.0)
    assert not step(1e6, fixed)[0].overflow, "nothing answers it: whoever trains has to stop"
    assert fixed.value == 1024.0


def test_a_loss_scale_makes_masters(new_stories_model):
    """A gradient of 2^-26 is there when it is divided by the scale, where float16's last place would drop it."""
    model = new_stories_model(torch.float16)
    engine = HybridEngine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), dtype=torch.float32,
        loss_scale=LossScale(initial_scale_power=8),
    )  # fmt: skip
    assert isinstance(engine.optimizer, MasterOptimizer)
    norm = model.model.norm.weight
    norm.grad = torch.full_like(norm, 2.0**-18)
    engine.ready()
    master = next(m for w, m in engine.optimizer.pairs if w is norm)
    assert torch.equal(master.grad, torch.full(norm.shape, 2.0**-26))


def test_rollouts_of_a_float16_model_run_in_float32(new_stories_model):
    """On the CPU: packs hold the weights themselves, and log-probs are near; the gradient is that of
    the float64 model."""
    model = new_stories_model(torch.float16)
    engine = HybridEngine(
        model, torch.optim.AdamW(model.parameters()), dtype=torch.float32, masters=True,
        loss_scale=LossScale(initial_scale_power=8),
    )  # fmt: skip
    ids = torch.randint(3, 500, (4, 9), generator=torch.Generator().manual_seed(0))
    rollout = engine.generate(ids, None, SamplingConfig(max_new_tokens=8, seed=0))
    pack = engine.decoder.packed("layers.0.o")
    assert pack.dtype == torch.float32
    assert torch.equal(pack.to_dense(), engine.spec.layers[0].o.module.weight.detach().float())
    logp = engine.logprobs(rollout)
    gap = (logp.detach() - rollout.logprobs).abs().max()
    assert 0 < float(gap) < 0.03
    engine.backward(logp.mean())
    exact = copy.deepcopy(model).double()
    out = exact(rollout.input_ids).logits[:, 8:-1].log_softmax(-1)
    chosen = out.gather(-1, rollout.completion_ids[..., None])[..., 0] * rollout.completion_mask
    chosen.mean().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        error = (p.grad.double() / 256 - q.grad).norm() / q.grad.norm()
        assert float(error) < 2e-2, name
    with pytest.raises(ValueError, match=r"the model's dtype is torch\.float16"):
        HybridEngine(model)


def test_float16_weights_are_packed_as_they_are():
    weight = torch.randn(40, 24).half()
    assert torch.equal(PackedLinear.from_weight(weight, None, torch.float32).to_dense(), weight.float())
    rounded = PackedLinear.from_weight(weight, None, torch.bfloat16).to_dense()
    assert torch.equal(rounded, weight.bfloat16())
