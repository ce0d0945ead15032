"""The maths of the loop against references written as loops over single numbers, in float64.

Each test names the row of the correctness checklist that it covers (research notes on RLHF frameworks,
section 2.1 and 2.2; docs/checklist.md lists them), so that a reader can see which known mistakes are guarded against.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dschat.rlhf import losses as L

F64 = torch.float64


def batch(seed: int = 0, rows: int = 5, time: int = 9) -> dict[str, Tensor]:
    """Random rows of different lengths, one full, one empty, one of a single token."""
    g = torch.Generator().manual_seed(seed)
    lengths = [time, 0, 1] + [random.Random(seed + i).randint(2, time) for i in range(rows - 3)]
    mask = torch.arange(time)[None] < torch.tensor(lengths)[:, None]

    def rand() -> Tensor:
        return torch.randn(rows, time, generator=g, dtype=F64)

    old = -rand().abs()
    d = {name: rand() for name in ("adv", "values", "old_values", "returns", "rewards")}
    scores = torch.randn(rows, generator=g, dtype=F64)
    return d | {
        "mask": mask,
        "old": old,
        "logp": old + 0.4 * rand(),
        "ref": old + 0.3 * rand(),
        "scores": scores,
    }


def real(mask: Tensor):
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]


# ---------------------------------------------------------------------------------------- means and whitening


def test_masked_mean_and_aggregation():
    """checklist 2.1 #15: the two ways to average are named, and differ."""
    d = batch()
    x, m = d["logp"], d["mask"]
    tokens = [float(x[b, t]) for b, t in real(m)]
    assert float(L.masked_mean(x, m)) == pytest.approx(sum(tokens) / len(tokens), rel=1e-12)
    assert float(L.aggregate(x, m)) == pytest.approx(sum(tokens) / len(tokens), rel=1e-12)
    rows = [[float(x[b, t]) for t in range(x.shape[1]) if m[b, t]] for b in range(x.shape[0])]
    by_row = [sum(r) / len(r) for r in rows if r]
    assert float(L.aggregate(x, m, "sequence")) == pytest.approx(sum(by_row) / len(by_row), rel=1e-12)
    assert float(L.aggregate(x, m)) != pytest.approx(float(L.aggregate(x, m, "sequence")), rel=1e-3)
    with pytest.raises(ValueError, match="'mean' is unknown; use one of token, sequence"):
        L.aggregate(x, m, "mean")  # type: ignore[arg-type]


def test_whiten_biased_variance():
    """checklist 2.1 #12; 2.2 policy 9: masked mean and biased variance; rewards keep their mean."""
    d = batch()
    x, m = d["adv"], d["mask"]
    values = [float(x[b, t]) for b, t in real(m)]
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / len(values)
    white, kept = L.whiten(x, m), L.whiten(x, m, shift_mean=False)
    for b, t in real(m):
        expected = (float(x[b, t]) - mean) / math.sqrt(var + 1e-8)
        assert float(white[b, t]) == pytest.approx(expected, rel=1e-10)
        assert float(kept[b, t]) == pytest.approx(expected + mean, rel=1e-10)
    assert (white[~m] == 0).all() and (kept[~m] == 0).all()
    one = torch.zeros_like(m)
    one[0, 0] = True
    assert torch.isfinite(L.whiten(x, one)).all(), "a single token has variance 0"


@pytest.mark.parametrize("shape", [(3, 4), (3, 5)])
def test_mask_shape_is_checked(shape):
    with pytest.raises(ValueError, match="give one mask entry a token"):
        L.masked_mean(torch.zeros(3, 6), torch.ones(*shape))


# ----------------------------------------------------------------------------------------------------- the KL


def test_kl_values():
    """checklist 2.1 #8: k1, k2, k3 are what their names say."""
    d = batch()
    for b, t in real(d["mask"]):
        x = float(d["logp"][b, t] - d["ref"][b, t])
        for kind, expected in (("k1", x), ("k2", x * x / 2), ("k3", math.exp(-x) - 1 + x)):
            assert float(L.kl(d["logp"], d["ref"], kind)[b, t]) == pytest.approx(
                expected, rel=1e-10, abs=1e-14
            )
    with pytest.raises(ValueError, match="'k4' is unknown; use one of k1, k2, k3"):
        L.kl(d["logp"], d["ref"], "k4")  # type: ignore[arg-type]


def test_kl_estimators_are_estimates_of_the_kl():
    """checklist 2.1 #9: over the policy's own distribution k1 and k3 average to the KL exactly, which is
    never negative.
    """
    g = torch.Generator().manual_seed(1)
    p, q = (torch.randn(50, generator=g, dtype=F64).log_softmax(-1) for _ in range(2))
    exact = float((p.exp() * (p - q)).sum())
    assert exact > 0
    for kind in ("k1", "k3"):
        assert float((p.exp() * L.kl(p, q, kind)).sum()) == pytest.approx(exact, rel=1e-10)
    assert (L.kl(p, q, "k3") >= 0).all() and (L.kl(p, q, "k2") >= 0).all() and (L.kl(p, q, "k1") < 0).any()


def test_kl_gradients():
    """checklist 2.1 #8: as a loss k2's expected gradient is the KL's; k1's is zero, which is why k1 belongs
    into the reward.
    """
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(20, generator=g, dtype=F64, requires_grad=True)
    q = torch.randn(20, generator=g, dtype=F64).log_softmax(-1)

    def expected_gradient(
        kind: str,
    ) -> Tensor:  # E over samples of d kl(sample) / d logits, the samples being fixed
        logp = logits.log_softmax(-1)
        return torch.autograd.grad((logp.detach().exp() * L.kl(logp, q, kind)).sum(), logits)[0]  # type: ignore[arg-type]

    logp = logits.log_softmax(-1)
    true = torch.autograd.grad((logp.exp() * (logp - q)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient("k2"), true, rtol=1e-9, atol=1e-12)
    assert expected_gradient("k1").abs().max() < 1e-12
    assert (expected_gradient("k3") - true).abs().max() > 1e-3
    d = torch.tensor(0.3, dtype=F64, requires_grad=True)
    for kind, slope in (("k1", 1.0), ("k2", 0.3), ("k3", 1 - math.exp(-0.3))):
        (grad,) = torch.autograd.grad(L.kl(d, torch.zeros((), dtype=F64), kind), d)  # type: ignore[arg-type]
        assert float(grad) == pytest.approx(slope, rel=1e-10)


# -------------------------------------------------------------------------------------------- rewards and GAE


def test_score_at_the_last_real_token():
    """checklist 2.1 #13: the score sits at the last real token, never in the last column; an empty row gets
    none.
    """
    d = batch()
    rewards = L.kl_penalised_rewards(d["scores"], d["logp"], d["ref"], d["mask"], beta=0.1, kind="k3")
    for b in range(d["mask"].shape[0]):
        steps = [t for t in range(d["mask"].shape[1]) if d["mask"][b, t]]
        for t in range(d["mask"].shape[1]):
            x = float(d["logp"][b, t] - d["ref"][b, t])
            expected = -0.1 * (math.exp(-x) - 1 + x) if t in steps else 0.0
            expected += float(d["scores"][b]) if steps and t == steps[-1] else 0.0
            assert float(rewards[b, t]) == pytest.approx(expected, rel=1e-10, abs=1e-13)
    with pytest.raises(ValueError, match="one score a sequence"):
        L.kl_penalised_rewards(d["scores"][:-1], d["logp"], d["ref"], d["mask"], beta=0.1)


def test_last_token_of_a_mask_with_a_hole():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert L.last_token(mask).long().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def loop_gae(rewards, values, gamma, lam):
    """One row of real tokens: the sum over future deltas, written out."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_sum_over_deltas(gamma, lam):
    """checklist 2.1 #11: the backward scan equals the written-out sum; bootstrap 0 at the end; returns = A +
    V.
    """
    d = batch()
    advantages, returns = L.gae(d["rewards"], d["values"], d["mask"], gamma, lam)
    for b in range(d["mask"].shape[0]):
        steps = [t for t in range(d["mask"].shape[1]) if d["mask"][b, t]]
        expected = loop_gae(
            [float(d["rewards"][b, t]) for t in steps], [float(d["values"][b, t]) for t in steps], gamma, lam
        )
        for t, a in zip(steps, expected, strict=True):
            assert float(advantages[b, t]) == pytest.approx(a, rel=1e-10, abs=1e-12)
            assert float(returns[b, t]) == pytest.approx(a + float(d["values"][b, t]), rel=1e-10, abs=1e-12)
    assert (advantages[~d["mask"]] == 0).all() and (returns[~d["mask"]] == 0).all()


def test_gae_steps_over_holes():
    """checklist 2.1 #11: tokens that the policy did not write (another turn) change nothing: multi-turn =
    single turn.
    """
    g = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(1, 5, generator=g, dtype=F64), torch.randn(1, 5, generator=g, dtype=F64)
    dense = L.gae(rewards, values, torch.ones(1, 5), 0.9, 0.8)
    where = [0, 1, 4, 5, 7]
    mask = torch.zeros(1, 9)
    wide_r, wide_v = torch.full((1, 9), 7.0, dtype=F64), torch.full((1, 9), -3.0, dtype=F64)
    mask[:, where], wide_r[:, where], wide_v[:, where] = 1, rewards, values
    wide = L.gae(wide_r, wide_v, mask, 0.9, 0.8)
    for a, b in zip(dense, wide, strict=True):
        torch.testing.assert_close(a, b[:, where], rtol=1e-12, atol=1e-12)


def test_gae_without_time():
    advantages, returns = L.gae(torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3, 0))
    assert advantages.shape == returns.shape == (3, 0)


# ------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("high", [None, 0.3])
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_policy_loss(mode, high, dual):
    """checklist 2.1 #10, #17: clipped surrogate, asymmetric and dual clip optional."""
    d = batch()
    loss, metrics = L.policy_loss(
        d["logp"], d["old"], d["adv"], d["mask"], 0.2, cliprange_high=high, dual_clip=dual, aggregation=mode
    )
    rows: list[list[float]] = [[] for _ in range(d["mask"].shape[0])]
    ratios, clips = [], 0
    for b, t in real(d["mask"]):
        ratio, a = math.exp(float(d["logp"][b, t] - d["old"][b, t])), float(d["adv"][b, t])
        clipped = min(max(ratio, 0.8), 1 + (0.2 if high is None else high))
        value = max(-a * ratio, -a * clipped)
        clips += -a * clipped > -a * ratio
        if dual is not None and a < 0:
            value = min(value, -dual * a)
        rows[b].append(value)
        ratios.append(ratio)
    tokens = [x for row in rows for x in row]
    by_row = [sum(r) / len(r) for r in rows if r]
    expected = sum(tokens) / len(tokens) if mode == "token" else sum(by_row) / len(by_row)
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert float(metrics["ratio"]) == pytest.approx(sum(ratios) / len(ratios), rel=1e-10)
    assert float(metrics["ratio_max_deviation"]) == pytest.approx(max(abs(r - 1) for r in ratios), rel=1e-10)
    assert float(metrics["clip_fraction"]) == pytest.approx(clips / len(tokens), rel=1e-10)
    assert float(metrics["approx_kl"]) >= 0
    with pytest.raises(ValueError, match=r"dual_clip is 0\.5"):
        L.policy_loss(d["logp"], d["old"], d["adv"], d["mask"], 0.2, dual_clip=0.5)


def test_policy_gradient_on_policy_is_minus_advantage():
    """checklist 2.1 #10: at ratio 1 nothing is clipped, and the gradient is that of the plain policy
    gradient.
    """
    d = batch()
    logp = d["old"].clone().requires_grad_()
    loss, metrics = L.policy_loss(logp, d["old"], d["adv"], d["mask"], 0.2)
    (grad,) = torch.autograd.grad(loss, logp)
    expected = torch.where(d["mask"], -d["adv"] / d["mask"].sum(), torch.zeros((), dtype=F64))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    assert float(metrics["ratio_max_deviation"]) == 0.0


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip):
    """checklist 2.1 #17; 2.2 policy 10: value clipping takes the larger of the two errors."""
    d = batch()
    loss, metrics = L.value_loss(d["values"], d["old_values"], d["returns"], d["mask"], clip)
    terms = []
    for b, t in real(d["mask"]):
        v, o, r = (float(d[k][b, t]) for k in ("values", "old_values", "returns"))
        near = v if clip is None else o + min(max(v - o, -clip), clip)
        terms.append(max((v - r) ** 2, (near - r) ** 2))
    assert float(loss) == pytest.approx(0.5 * sum(terms) / len(terms), rel=1e-10)
    assert set(metrics) == {"value", "value_clip_fraction", "explained_variance"}


def test_the_explained_variance_of_pieces_is_that_of_the_batch():
    """Whatever the pieces, so that it depends neither on batch_size nor on the number of processes."""
    d = batch()
    names = ("values", "old_values", "returns", "mask")
    whole = L.value_loss(*(d[k] for k in names))[1]["explained_variance"]
    spread, found = L.masked_variance(d["returns"], d["mask"]), 0.0
    for rows in (slice(0, 1), slice(1, None)):
        piece = L.value_loss(*(d[k][rows] for k in names), spread=spread)[1]["explained_variance"]
        found += float(piece) * int(d["mask"][rows].sum()) / int(d["mask"].sum())
    assert found == pytest.approx(float(whole), rel=1e-10)


def test_bradley_terry_and_dpo():
    """Pairwise losses against the formula; ties count half in the accuracy."""
    g = torch.Generator().manual_seed(4)
    c, r, rc, rr = (torch.randn(6, generator=g, dtype=F64) for _ in range(4))
    margin = torch.rand(6, generator=g, dtype=F64)

    def logsig(x: float) -> float:
        return -math.log1p(math.exp(-x))

    loss, metrics = L.bradley_terry_loss(c, r)
    assert float(loss) == pytest.approx(-sum(logsig(float(c[i] - r[i])) for i in range(6)) / 6, rel=1e-12)
    assert float(metrics["accuracy"]) == sum(bool(c[i] > r[i]) for i in range(6)) / 6
    both = [*c.tolist(), *r.tolist()]
    assert (metrics["min_reward"], metrics["max_reward"]) == (min(both), max(both))
    assert float(metrics["mean_reward"]) == pytest.approx(sum(both) / 12, rel=1e-12)
    with_margin, _ = L.bradley_terry_loss(c, r, margin)
    assert float(with_margin) == pytest.approx(
        -sum(logsig(float(c[i] - r[i] - margin[i])) for i in range(6)) / 6, rel=1e-12
    )
    assert float(L.bradley_terry_loss(torch.ones(4), torch.ones(4))[1]["accuracy"]) == 0.5
    for smoothing in (0.0, 0.1):
        h = [0.3 * float((c[i] - rc[i]) - (r[i] - rr[i])) for i in range(6)]
        expected = -sum((1 - smoothing) * logsig(x) + smoothing * logsig(-x) for x in h) / 6
        assert float(L.dpo_loss(c, r, rc, rr, 0.3, label_smoothing=smoothing)[0]) == pytest.approx(
            expected, rel=1e-12
        )
    ipo = sum((float((c[i] - rc[i]) - (r[i] - rr[i])) - 1 / 0.6) ** 2 for i in range(6)) / 6
    assert float(L.dpo_loss(c, r, rc, rr, 0.3, kind="ipo")[0]) == pytest.approx(ipo, rel=1e-12)
    with pytest.raises(ValueError, match="they go in pairs"):
        L.bradley_terry_loss(c, r[:3])


# ---------------------------------------------------------------------------- properties every loss must have


def all_losses(
    d: dict[str, Tensor], logp: Tensor, values: Tensor, normalizer: float | None = None, mode="token"
) -> Tensor:
    kw = {"aggregation": mode, "normalizer": normalizer}
    return (
        L.policy_loss(logp, d["old"], d["adv"], d["mask"], 0.2, **kw)[0]
        + L.value_loss(values, d["old_values"], d["returns"], d["mask"], 0.2, **kw)[0]
        + 0.1 * L.nll_loss(logp, d["mask"], **kw)[0]
        - 0.01 * L.entropy_bonus(values, d["mask"], **kw)
        + 0.3 * L.aggregate(L.kl(logp, d["ref"], "k2", d["mask"]), d["mask"], **kw)
    )


def gradients(d, normalizer=None, mode="token"):
    logp, values = d["logp"].clone().requires_grad_(), d["values"].clone().requires_grad_()
    loss = all_losses(d, logp, values, normalizer, mode)
    return loss.detach(), *torch.autograd.grad(loss, (logp, values))


def test_padding_is_never_read():
    """checklist 2.1 #1: whatever stands in masked positions, NaN and infinity too, no result and no gradient
    changes.
    """
    d = batch()
    clean = gradients(d)
    chain = L.kl_penalised_rewards(d["scores"], d["logp"], d["ref"], d["mask"], 0.1)
    clean_gae = L.gae(chain, d["values"], d["mask"])
    for garbage in (1e30, float("nan"), float("inf"), -123.0):
        bad = {
            k: torch.where(d["mask"], v, torch.full_like(v, garbage)) if v.dim() == 2 and k != "mask" else v
            for k, v in d.items()
        }
        for a, b in zip(clean, gradients(bad), strict=True):
            assert torch.equal(a, b)
        rewards = L.kl_penalised_rewards(bad["scores"], bad["logp"], bad["ref"], bad["mask"], 0.1)
        assert torch.equal(rewards, chain)
        for a, b in zip(clean_gae, L.gae(rewards, bad["values"], bad["mask"]), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(L.whiten(bad["adv"], bad["mask"]), L.whiten(d["adv"], d["mask"]))
        assert torch.equal(
            L.masked_max(bad["adv"].abs(), bad["mask"]), L.masked_max(d["adv"].abs(), d["mask"])
        )


def test_nothing_left_gives_zero():
    """checklist 2.1 #1: a batch whose rows are all masked has loss 0 and gradient 0, not NaN."""
    d = batch()
    d["mask"] = torch.zeros_like(d["mask"])
    for mode in ("token", "sequence"):
        loss, *grads = gradients(d, mode=mode)
        assert float(loss) == 0.0 and all((g == 0).all() for g in grads)
    assert float(L.masked_max(d["adv"], d["mask"])) == 0.0
    assert (L.whiten(d["adv"], d["mask"]) == 0).all()


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_accumulation_changes_nothing(mode):
    """checklist 2.1 #16: micro-batches of very different lengths, normalised by the whole batch's count, sum
    to its loss.
    """
    d = batch(rows=7)
    whole = gradients(d, mode=mode)
    count = float(d["mask"].sum() if mode == "token" else d["mask"].any(-1).sum())
    parts = [gradients({k: v[i:j] for k, v in d.items()}, count, mode) for i, j in ((0, 1), (1, 4), (4, 7))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-12, atol=1e-13)
    for k in (1, 2):
        torch.testing.assert_close(torch.cat([p[k] for p in parts]), whole[k], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_gradcheck(mode):
    """Derivatives of every loss against finite differences (away from the kinks)."""
    d = batch(seed=5)
    logp, values = d["logp"].clone().requires_grad_(), d["values"].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: all_losses(d, a, b, mode=mode), (logp, values), eps=1e-6, atol=1e-6
    )


# ------------------------------------------------------------------------------------------------ controllers


def test_adaptive_kl_controller():
    """checklist 2.1 #18; 2.2 policy 11: error clipped to +-0.2, proportional, and saved."""
    c = L.AdaptiveKLController(0.15, target=6.0, horizon=10_000)
    value = 0.15
    for current in (0.0, 5.9, 6.0, 7.0, 100.0):
        c.update(current, 64)
        value *= 1 + min(max(current / 6.0 - 1, -0.2), 0.2) * 64 / 10_000
        assert c.value == pytest.approx(value, rel=1e-12)
    other = L.AdaptiveKLController()
    other.load_state_dict(c.state_dict())
    assert other.value == c.value
    fixed = L.FixedKLController(0.05)
    fixed.update(100.0, 64)
    assert fixed.value == 0.05
    with pytest.raises(ValueError, match="greater than 0"):
        L.AdaptiveKLController(target=0.0)


def test_running_moments():
    """checklist 2.1 #20: moments over batches equal moments over everything; one constant score does not
    divide by 0.
    """
    g = torch.Generator().manual_seed(6)
    x = torch.randn(40, generator=g, dtype=F64) * 3 + 5
    m = L.RunningMoments()
    for part in x.split([1, 0, 7, 32]):
        m.update(part)
    assert m.mean == pytest.approx(float(x.mean()), rel=1e-12)
    assert m.std == pytest.approx(float(x.std(correction=0)), rel=1e-12)
    copy = L.RunningMoments()
    copy.load_state_dict(m.state_dict())
    assert copy.state_dict() == m.state_dict()
    flat = L.RunningMoments()
    flat.update(torch.ones(5))
    assert flat.std == 1.0
