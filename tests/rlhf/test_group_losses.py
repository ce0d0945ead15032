"""Group baselines, ratio levels, importance weights and the KL as a loss, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import F64, batch, real

from dschat.rlhf import losses as L


def rows_of(d, x):
    """Each row's real entries."""
    return [[float(x[b, t]) for t in range(x.shape[1]) if d["mask"][b, t]] for b in range(d["mask"].shape[0])]


# ------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "others"])
def test_group_advantages(baseline, scale):
    """Checklist 2.3: vectorised = loop, with answers that have no score, a flat group and a group of one."""
    g = torch.Generator().manual_seed(7)
    scores = torch.randn(5, 4, generator=g, dtype=F64)
    valid = torch.ones(5, 4, dtype=torch.bool)
    scores[1] = 0.3  # flat
    valid[2, 1] = valid[3, 1:] = False
    valid[4] = False
    scores = torch.where(valid, scores, torch.tensor(float("nan"), dtype=F64))
    found, flat = L.group_advantages(scores.view(-1), valid.view(-1), 4, baseline=baseline, scale=scale)
    everything = [float(s) for s, v in zip(scores.view(-1), valid.view(-1), strict=True) if v]
    m = sum(everything) / len(everything)
    batch_std = math.sqrt(sum((s - m) ** 2 for s in everything) / (len(everything) - 1))
    for i in range(5):
        group = [float(s) for s, v in zip(scores[i], valid[i], strict=True) if v]
        teaches = len(group) > 1 and max(group) > min(group)
        for j in range(4):
            expected = 0.0
            if teaches and valid[i, j]:
                own = float(scores[i, j])
                mean = sum(group) / len(group)
                others = (sum(group) - own) / (len(group) - 1)
                std = math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
                expected = own - (mean if baseline == "mean" else others)
                expected /= {"group": std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
            assert float(found[4 * i + j]) == pytest.approx(expected, rel=1e-10, abs=1e-12)
            assert bool(flat[4 * i + j]) is not teaches
    assert flat.view(5, 4)[:, 0].tolist() == [False, True, False, True, True]


def test_flat_groups_are_exactly_zero_in_float32():
    """A mean of equal numbers need not be that number; divided by a deviation near 0 it would be noise."""
    scores = torch.full((7,), 0.1)
    assert float((scores.sum() / 7 - scores[0]).abs()) >= 0
    found, flat = L.group_advantages(scores, torch.ones(7, dtype=torch.bool), 7)
    assert bool(flat.all()) and bool((found == 0).all())


def test_leave_one_out_is_unbiased():
    """A policy-gradient baseline may not depend on the answer it is for: others does not, mean does."""
    scores = torch.tensor([1.0, 2.0, 4.0], dtype=F64, requires_grad=True)
    for baseline, moved in (("others", 1.0), ("mean", 2 / 3)):
        adv, _ = L.group_advantages(
            scores, torch.ones(3, dtype=torch.bool), 3, baseline=baseline, scale="none"
        )
        (grad,) = torch.autograd.grad(adv[0], scores)
        assert float(grad[0]) == pytest.approx(moved)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4), torch.ones(4, dtype=torch.bool), 1), "group size is 1"),
        ((torch.zeros(5), torch.ones(5, dtype=torch.bool), 2), "groups \\* 2"),
    ],
)
def test_bad_groups(args, message):
    with pytest.raises(ValueError, match=message):
        L.group_advantages(*args)


# ----------------------------------------------------------------------------------------------- ratio levels


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence", "answer"])
def test_policy_loss_at_every_level(level, mode):
    """checklist 2.1 #15: ratio levels and aggregation modes by their names, written as loops."""
    d = batch()
    w = torch.rand(d["mask"].shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    loss, metrics = L.policy_loss(
        d["logp"], d["old"], d["adv"], d["mask"], 0.2, cliprange_high=0.3, level=level, weights=w,
        aggregation=mode,
    )  # fmt: skip
    gaps, adv, ws = rows_of(d, d["logp"] - d["old"]), rows_of(d, d["adv"]), rows_of(d, w)
    rows, ratios = [], []
    for gap, a, weight in zip(gaps, adv, ws, strict=True):
        row = []
        for t in range(len(gap)):
            r = math.exp({"token": gap[t], "sequence": sum(gap) / len(gap), "answer": sum(gap)}[level])
            ratios.append(r)
            row.append(weight[t] * max(-a[t] * r, -a[t] * min(max(r, 0.8), 1.3)))
        rows.append(row)
    tokens = [x for row in rows for x in row]
    expected = {
        "token": sum(tokens) / len(tokens),
        "sequence": sum(sum(r) / len(r) for r in rows if r) / sum(bool(r) for r in rows),
        "constant": sum(tokens) / d["mask"].numel(),
    }[mode]
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert float(metrics["ratio"]) == pytest.approx(sum(ratios) / len(ratios), rel=1e-10)
    single = max(abs(math.exp(x) - 1) for gap in gaps for x in gap)
    assert float(metrics["ratio_max_deviation"]) == pytest.approx(single, rel=1e-10)


def test_answer_level_on_policy_is_reinforce():
    """At ratio 1 the gradient is that of -mean over answers of A * log p(answer)."""
    d = batch()
    adv = d["scores"][:, None].expand_as(d["old"])
    logp = d["old"].clone().requires_grad_()
    loss, _ = L.policy_loss(logp, d["old"], adv, d["mask"], 0.2, level="answer", aggregation="sequence")
    (grad,) = torch.autograd.grad(loss, logp)
    rows = int(d["mask"].any(-1).sum())
    expected = torch.where(d["mask"], -adv / rows, torch.zeros((), dtype=F64))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


def test_sequence_level_gradient_is_shared_by_the_tokens():
    """GSPO: each token of an answer gets the same gradient, A * ratio / (length * rows)."""
    d = batch()
    adv = d["scores"][:, None].expand_as(d["old"])
    logp = d["logp"].clone().requires_grad_()
    loss, _ = L.policy_loss(logp, d["old"], adv, d["mask"], 0.999, level="sequence", aggregation="sequence")
    (grad,) = torch.autograd.grad(loss, logp)
    count = int(d["mask"].any(-1).sum())
    for b in range(len(adv)):
        n = int(d["mask"][b].sum())
        if n:
            r = math.exp(float((d["logp"] - d["old"])[b][d["mask"][b]].sum()) / n)
            if r < 1.999:
                torch.testing.assert_close(
                    grad[b][d["mask"][b]], (-adv[b, :n] * r / (n * count)), rtol=1e-9, atol=1e-13
                )
    with pytest.raises(ValueError, match="'word' is unknown; use one of token, sequence, answer"):
        L.log_ratios(logp, d["old"], d["mask"], "word")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("level", ["token", "sequence", "answer"])
def test_truncated_importance(level):
    """checklist 2.1 #5: min(p / q, cap), 1 where masked, without gradient."""
    d = batch()
    logp = d["logp"].clone().requires_grad_()
    weights, found = L.truncated_importance(logp, d["old"], d["mask"], 1.1, level)
    gaps = rows_of(d, d["logp"] - d["old"])
    expected = [
        math.exp({"token": x, "sequence": sum(g) / len(g), "answer": sum(g)}[level]) for g in gaps for x in g
    ]
    got = [float(weights[b, t]) for b, t in real(d["mask"])]
    assert got == pytest.approx([min(x, 1.1) for x in expected], rel=1e-10)
    assert (weights[~d["mask"]] == 1).all() and not weights.requires_grad
    assert float(found["truncated"]) == pytest.approx(sum(x > 1.1 for x in expected) / len(expected))
    with pytest.raises(ValueError, match="cap is 0"):
        L.truncated_importance(logp, d["old"], d["mask"], 0)


def test_importance_weights_correct_the_gradient():
    """Tokens drawn from q, trained on as if from p: with the weights the expected gradient is p's own."""
    g = torch.Generator().manual_seed(5)
    p = torch.randn(8, generator=g, dtype=F64, requires_grad=True)
    q = torch.randn(8, generator=g, dtype=F64).log_softmax(-1)
    reward = torch.randn(8, generator=g, dtype=F64)
    logp = p.log_softmax(-1)
    (true,) = torch.autograd.grad(-(logp.exp() * reward).sum(), p, retain_graph=True)
    ones = torch.ones(8, 1, dtype=torch.bool)

    def gradient(weights):  # expectation over q, one single-token answer for each of its 8 outcomes
        x = logp[:, None]
        terms = [
            L.policy_loss(
                x[i : i + 1], x[i : i + 1].detach(), reward[i : i + 1, None], ones[:1], 0.2,
                weights=None if weights is None else weights[i : i + 1],
            )[0] for i in range(8)
        ]  # fmt: skip
        return torch.autograd.grad((torch.stack(terms) * q.exp()).sum(), p, retain_graph=True)[0]

    weights, _ = L.truncated_importance(logp[:, None], q[:, None], ones, 1e9)
    torch.testing.assert_close(gradient(weights), true, rtol=1e-9, atol=1e-12)
    assert (gradient(None) - true).abs().max() > 1e-2


# --------------------------------------------------------------------------------------------- KL as a loss


def test_kl_loss_values_and_gradients():
    """checklist 2.1 #8: corrected by the ratio the gradient is that of the KL, on-policy and off it."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(20, generator=g, dtype=F64, requires_grad=True)
    ref, old = (torch.randn(20, generator=g, dtype=F64).log_softmax(-1) for _ in range(2))
    logp = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    exact = float((logp.exp() * (logp - ref)).sum().detach())
    one = torch.ones(1, 1, dtype=torch.bool)
    for kind in ("k1", "k3"):
        for written_by in (old, logp.detach()):
            terms = [
                L.kl_loss(logp[i].view(1, 1), ref[i].view(1, 1), one, kind, old_logp=written_by[i].view(1, 1))
                for i in range(20)
            ]
            value = (torch.stack(terms) * written_by.exp()).sum()
            assert float(value.detach()) == pytest.approx(exact, rel=1e-9)
            (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
            torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-11)
    with pytest.raises(ValueError, match="k1 as a loss has expected gradient 0"):
        L.kl_loss(logp.view(1, -1), ref.view(1, -1), torch.ones(1, 20), "k1")


@pytest.mark.parametrize("mode", ["token", "sequence", "constant"])
def test_padding_and_accumulation(mode):
    """checklist 2.1 #1, #16: of the new terms too; 'constant' needs the same constant whatever the split."""
    d = batch(rows=7)
    count = {"token": d["mask"].sum(), "sequence": d["mask"].any(-1).sum(), "constant": d["mask"].numel()}
    w = torch.rand(d["mask"].shape, dtype=F64)

    def grads(rows: slice, normalizer=None, garbage=None):
        part = {
            k: (v if garbage is None or k in ("mask", "scores") else torch.where(d["mask"], v, garbage))[rows]
            for k, v in d.items()
        }
        logp = part["logp"].clone().requires_grad_()
        kw = {"aggregation": mode, "normalizer": normalizer}
        loss = L.policy_loss(
            logp, part["old"], part["adv"], part["mask"], 0.2, level="sequence", weights=w[rows], **kw
        )[0] + L.kl_loss(logp, part["ref"], part["mask"], old_logp=part["old"], **kw)
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    whole = grads(slice(None))
    parts = [grads(slice(i, j), float(count[mode])) for i, j in ((0, 1), (1, 4), (4, 7))]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1], rtol=1e-12, atol=1e-13)
    for bad in (float("nan"), float("inf")):
        for a, b in zip(whole, grads(slice(None), garbage=torch.tensor(bad, dtype=F64)), strict=True):
            assert torch.equal(a, b)
