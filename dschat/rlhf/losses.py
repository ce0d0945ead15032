"""The mathematics of RLHF as plain functions on [batch, time] tensors with explicit masks.

Conventions. `mask` is 1 (or True) where a token was generated and counts, 0 elsewhere; it is never derived
from token ids. Time runs over completion tokens only. Masked positions may hold anything, also NaN: they
never reach a result or a gradient. A loss returns `(loss, metrics)`, metrics being detached Python-side
tensors that a logger may average by token count.

Aggregation is named, because it decides what is optimised:
    "token"     sum over all real tokens of the batch / their number    (default: every token counts alike)
    "sequence"  mean over sequences of each sequence's token mean       (short answers weigh as much as long)
    "constant"  sum over all real tokens / a number that does not depend on the answers' lengths, such as rows
                times the longest length allowed                         (no bias towards any length: Dr. GRPO)
A caller that accumulates gradients passes `normalizer`, the token (or sequence) count of the *whole* batch,
so that the sum of the micro-batch losses is the loss of the batch whatever the split.

Formulas after Huang et al., "The N Implementation Details of RLHF with PPO"; Schulman, "Approximating KL
divergence" (k1-k3).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]
RatioLevel = Literal["token", "sequence", "answer"]
GroupScale = Literal["group", "batch", "none"]
KLKind = Literal["k1", "k2", "k3"]
Metrics = dict[str, Tensor]


def _check(x: Tensor, mask: Tensor, name: str) -> Tensor:
    """`mask` as bool, after checking that it has the shape of `x`."""
    if mask.shape != x.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} but {name} has {tuple(x.shape)}; give one mask entry a token"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask`; what is masked out (NaN too) contributes neither value nor gradient."""
    kept = torch.where(_check(x, mask, "x"), x, torch.zeros((), dtype=x.dtype, device=x.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`; 0 where nothing is left."""
    count = mask.to(x.dtype).sum() if dim is None else mask.to(x.dtype).sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def aggregate(
    x: Tensor, mask: Tensor, aggregation: Aggregation = "token", normalizer: float | Tensor | None = None
) -> Tensor:
    """One number from per-token losses [B, T].

    normalizer: token count ("token"), count of non-empty sequences ("sequence") or whatever constant
    ("constant") to divide by; None: those of this batch, and for "constant" all its places, B * T.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(
            f"aggregation {aggregation!r} is unknown; use one of {', '.join(get_args(Aggregation))}"
        )
    keep = _check(x, mask, "x")
    if aggregation == "token":
        total, count = masked_sum(x, keep), keep.sum()
    elif aggregation == "constant":
        total, count = masked_sum(x, keep), torch.tensor(keep.numel(), device=x.device)
    else:
        total, count = masked_mean(x, keep, dim=-1).sum(), keep.any(dim=-1).sum()
    return total / (count.clamp(min=1) if normalizer is None else normalizer)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the real tokens, with the biased variance; masked positions become 0.

    shift_mean=False puts the mean back (used for rewards: their sign and offset mean something, advantages'
    do not).
    """
    keep = _check(x, mask, "x")
    mean = masked_mean(x, keep)
    var = masked_mean((x - mean).square(), keep)
    white = (x - mean) * torch.rsqrt(var + eps)
    if not shift_mean:
        white = white + mean
    return torch.where(keep, white, torch.zeros_like(white))


def kl(logp: Tensor, ref_logp: Tensor, kind: KLKind = "k1", mask: Tensor | None = None) -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy, d = logp - ref_logp:

    k1 = d               unbiased, high variance, may be negative; as a *loss* its gradient is the wrong one
    (zero on average)
    k2 = d^2 / 2         biased, its gradient as a loss is that of the KL
    k3 = exp(-d) - 1 + d unbiased, never negative

    mask: d is 0 outside it, so that whatever stands there has no gradient either.
    """
    d = logp - ref_logp
    if mask is not None:
        d = torch.where(_check(d, mask, "logp"), d, torch.zeros_like(d))
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"KL estimator {kind!r} is unknown; use one of {', '.join(get_args(KLKind))}")


def last_token(mask: Tensor) -> Tensor:
    """[B, T] bool, True at each row's last real token only; an empty row has none."""
    keep = mask if mask.dtype == torch.bool else mask != 0
    later = keep.flip(-1).cumsum(-1).flip(-1)  # real tokens from here to the end
    return keep & (later == 1)


def kl_penalised_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float, kind: KLKind = "k1"
) -> Tensor:
    """Per-token rewards [B, T]: -beta * kl_t, plus the sequence's score [B] at its last real token (EOS or
    cut).
    """
    keep = _check(logp, mask, "logp")
    if scores.shape != logp.shape[:1]:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; give one score a sequence, {logp.shape[0]} of them"
        )
    rewards = -beta * kl(logp, ref_logp, kind, keep)
    return rewards + torch.where(
        last_token(keep), scores.to(rewards.dtype).unsqueeze(-1), torch.zeros_like(rewards)
    )


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the real tokens of each row; returns (advantages, returns), 0
    where masked.

        delta_t = r_t + gamma * V_next - V_t        A_t = delta_t + gamma * lam * A_next        returns = A +
        V

    "next" is the row's next *real* token, so masked stretches inside a row (a tool's answer, another turn)
    are stepped over; after the last real token V_next = A_next = 0: an episode ends there, whether by EOS or
    by the length limit.
    """
    keep = _check(values, mask, "values")
    _check(rewards, mask, "rewards")
    zero = values.new_zeros(values.shape[:-1])
    next_value, next_advantage = zero, zero
    columns: list[Tensor] = []
    for t in range(values.shape[-1] - 1, -1, -1):
        here = keep[..., t]
        value = torch.where(here, values[..., t], zero)
        delta = torch.where(here, rewards[..., t], zero) + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
        columns.append(torch.where(here, advantage, zero))
    advantages = torch.stack(columns[::-1], dim=-1) if columns else torch.zeros_like(values)
    return advantages, torch.where(keep, advantages + values, torch.zeros_like(values))


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float = 0.2,
    *,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    level: RatioLevel = "token",
    weights: Tensor | None = None,
    aggregation: Aggregation = "token",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate: -min(rho * A, clip(rho, 1 - eps, 1 + eps_high) * A), rho = exp(logp -
    old_logp).

    cliprange_high: upper half-width if it differs from `cliprange`.
    dual_clip: c > 1 bounds the loss of a negative advantage at -c * A (Ye et al. 2020); None leaves it out.
    level: what the ratio is of, see `log_ratios`. weights: constants [B, T] that multiply each token's loss
    (truncated importance weights). ratio_max_deviation is that of single tokens whatever the level.
    """
    keep = _check(logp, mask, "logp")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be greater than 1, or None to leave it out")
    high = cliprange if cliprange_high is None else cliprange_high
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    log_ratio = log_ratios(logp, old_logp, keep, level)
    advantages = torch.where(keep, advantages, zero)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        losses = losses * weights.detach()
    with torch.no_grad():
        single = torch.where(keep, logp - old_logp, zero).exp()
        hit = (-advantages * clipped > -advantages * ratio).to(logp.dtype)
        metrics = {
            "ratio": masked_mean(ratio, keep),
            "ratio_max_deviation": masked_max((single - 1).abs(), keep),
            "clip_fraction": masked_mean(hit, keep),
            "approx_kl": masked_mean(
                torch.expm1(log_ratio) - log_ratio, keep
            ),  # k3 of KL(old || new): never negative
        }
    return aggregate(losses, keep, aggregation, normalizer), metrics


def log_ratios(logp: Tensor, old_logp: Tensor, mask: Tensor, level: RatioLevel = "token") -> Tensor:
    """Log of the importance ratio that stands at each real token [B, T], 0 elsewhere, d = logp - old_logp:

    token     d_t
    sequence  mean of d over the answer's tokens, the same at each of them (GSPO, Zheng et al. 2025)
    answer    sum of d over the answer: the ratio of the whole answer's probabilities (RLOO, REINFORCE)
    """
    keep = _check(logp, mask, "logp")
    d = torch.where(keep, logp - old_logp, torch.zeros((), dtype=logp.dtype, device=logp.device))
    if level == "token":
        return d
    if level == "sequence":
        row = masked_mean(d, keep, dim=-1)
    elif level == "answer":
        row = d.sum(-1)
    else:
        raise ValueError(f"ratio level {level!r} is unknown; use one of {', '.join(get_args(RatioLevel))}")
    return torch.where(keep, row.unsqueeze(-1), torch.zeros_like(d))


def truncated_importance(
    logp: Tensor, rollout_logp: Tensor, mask: Tensor, cap: float, level: RatioLevel = "token"
) -> tuple[Tensor, Metrics]:
    """Weights min(exp(logp - rollout_logp), cap) [B, T] without gradient, 1 where masked.

    They correct for a rollout whose log-probs are not those of the training forward: quantised or otherwise
    approximate kernels wrote the tokens (Yao et al. 2025, truncated importance sampling).
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it must be greater than 0, such as 2")
    keep = _check(logp, mask, "logp")
    with torch.no_grad():
        raw = log_ratios(logp, rollout_logp, keep, level).exp()
        weights = torch.where(keep, raw.clamp(max=cap), torch.ones_like(raw))
        share = masked_mean((raw > cap).to(raw.dtype), keep)
        return weights, {"weight": masked_mean(weights, keep), "truncated": share}


def kl_loss(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    kind: KLKind = "k3",
    *,
    old_logp: Tensor | None = None,
    aggregation: Aggregation = "token",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Aggregated estimate of KL(policy || reference) as a loss; see `kl` for what the kinds' gradients are.

    old_logp: of the policy that wrote the tokens. With it each term is weighted by exp(logp - old_logp), with
    gradient, so that value and gradient are those of the present policy's KL for k1 and k3, also off-policy.
    """
    if old_logp is None and kind == "k1":
        raise ValueError("k1 as a loss has expected gradient 0; use k2 or k3, or give old_logp")
    terms = kl(logp, ref_logp, kind, mask)
    if old_logp is not None:
        terms = terms * log_ratios(logp, old_logp, mask).exp()
    return aggregate(terms, mask, aggregation, normalizer)


def group_advantages(
    scores: Tensor, valid: Tensor, size: int, *, baseline: Literal["mean", "others"] = "mean",
    scale: GroupScale = "group", eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages [B], flat [B] bool) of scores [B] whose neighbours, `size` at a time, answer one prompt.

    mean    A = score - mean of the group                                  (GRPO, Shao et al. 2024)
    others  A = score - mean of the group's other answers                  (RLOO, Ahmadian et al. 2024)
    scale: A / (s + eps), s being the sample deviation of the group's or of all valid scores, or no division
    (Dr. GRPO, Liu et al. 2025). Only valid scores count; a group with fewer than two of them, or whose scores
    are all equal, teaches nothing: its advantages are exactly 0 and `flat` marks its rows.
    """
    if size < 2:
        raise ValueError(f"the group size is {size}; a group baseline needs 2 answers of a prompt or more")
    if scores.dim() != 1 or scores.shape != valid.shape or len(scores) % size:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and valid {tuple(valid.shape)}; give both [groups * {size}]"
        )
    if scale not in get_args(GroupScale):
        raise ValueError(f"scale {scale!r} is unknown; use one of {', '.join(get_args(GroupScale))}")
    keep = valid.view(-1, size)
    rows = torch.where(keep, scores.view(-1, size), torch.zeros((), dtype=scores.dtype, device=scores.device))
    count = keep.sum(1, keepdim=True)
    centred = torch.where(keep, rows - masked_mean(rows, keep, dim=-1).unsqueeze(1), torch.zeros_like(rows))
    high = torch.where(keep, rows, -torch.inf).amax(1, keepdim=True)
    low = torch.where(keep, rows, torch.inf).amin(1, keepdim=True)
    flat = (count < 2) | (high <= low)
    advantages = centred
    if baseline == "others":
        advantages = centred * count / (count - 1).clamp(min=1)
    elif baseline != "mean":
        raise ValueError(f"baseline {baseline!r} is unknown; use mean or others")
    if scale == "group":
        advantages = advantages / (
            (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps
        )
    elif scale == "batch":
        chosen = rows[keep]
        advantages = advantages / ((chosen.std() if len(chosen) > 1 else chosen.new_zeros(())) + eps)
    flat = flat.expand_as(keep).reshape(-1)
    return torch.where(flat | ~valid, torch.zeros_like(scores), advantages.reshape(-1)), flat


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest `x` where `mask`; 0 when nothing is left. For non-negative x."""
    keep = _check(x, mask, "x")
    kept = torch.where(keep, x, torch.zeros_like(x))
    return kept.amax() if kept.numel() else kept.new_zeros(())


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Variance (by the count) of `x` where `mask`; 0 when nothing is left."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float | None = 0.2,
    *,
    aggregation: Aggregation = "token",
    normalizer: float | Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """0.5 * max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2); cliprange None: no clipping.
    spread: variance of the returns, of which `explained_variance` is a share; None: of those given. One for all pieces
    of a batch makes its mean over tokens that of the batch."""
    keep = _check(values, mask, "values")
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    values, old_values, returns = (torch.where(keep, x, zero) for x in (values, old_values, returns))
    plain = (values - returns).square()
    losses = plain
    if cliprange is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        losses = torch.maximum(plain, (clipped - returns).square())
    with torch.no_grad():
        variance = masked_variance(returns, keep) if spread is None else spread
        metrics = {
            "value": masked_mean(values, keep),
            "value_clip_fraction": masked_mean((losses > plain).to(values.dtype), keep),
            "explained_variance": 1 - masked_mean(plain, keep) / variance.clamp(min=1e-8),
        }
    return 0.5 * aggregate(losses, keep, aggregation, normalizer), metrics


def entropy_bonus(
    entropy: Tensor,
    mask: Tensor,
    *,
    aggregation: Aggregation = "token",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Aggregated entropy of the policy's distributions [B, T]; subtract coefficient * bonus from the loss."""
    return aggregate(entropy, mask, aggregation, normalizer)


def right_tokens(gap: Tensor, mask: Tensor) -> Tensor:
    """How many tokens where `mask` are the likeliest of the vocabulary, ties included, by how far below it they are."""
    return ((gap == 0) & _check(gap, mask, "gap")).sum()


def nll_loss(
    logp: Tensor,
    mask: Tensor,
    *,
    aggregation: Aggregation = "token",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the completion tokens: the loss of supervised fine-tuning."""
    loss = aggregate(-logp, mask, aggregation, normalizer)
    return loss, {"nll": masked_mean(-logp.detach(), mask)}


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(chosen - rejected - margin), mean over pairs [B] (or the sum divided by `normalizer`)."""
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}; they go in pairs"
        )
    gap = chosen - rejected
    losses = -F.logsigmoid(gap if margin is None else gap - margin)
    loss = losses.sum() / (max(losses.numel(), 1) if normalizer is None else normalizer)
    return loss, _of_pairs(chosen.detach(), rejected.detach())


def _of_pairs(chosen: Tensor, rejected: Tensor) -> Metrics:
    """What is told of the scores [B] of pairs."""
    gap, both = chosen - rejected, torch.cat([chosen, rejected])
    # A tie counts half, so a model that gives every answer one score has accuracy 0.5 and not 0.
    accuracy = (gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype)
    lowest, highest = both.aminmax() if both.numel() else (_mean(both), _mean(both))
    return {
        "accuracy": _mean(accuracy), "margin": _mean(gap),
        "min_reward": lowest, "mean_reward": _mean(both), "max_reward": highest,
    }  # fmt: skip


def per_token_pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    start: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """DeepSpeed-Chat's reward loss: mean of -log sigmoid(chosen_t - rejected_t) over t = start .. end of the
    longer answer, then the mean over pairs (or the sum divided by `normalizer`).

    chosen, rejected: scores at every token [B, T], masks true for each answer's tokens, which begin in column
    0; start [B]: the first column where the two answers differ. An answer that has ended keeps its last score.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}; they go in pairs"
        )
    sides = []
    for scores, mask in ((chosen, chosen_mask), (rejected, rejected_mask)):
        keep = _check(scores, mask, "scores")
        last = (keep.sum(-1, keepdim=True) - 1).clamp(min=0)
        columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        sides.append(
            torch.where(keep, scores, torch.zeros_like(scores)).gather(1, torch.minimum(columns, last))
        )
    columns = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    counted = ((chosen_mask != 0) | (rejected_mask != 0)) & (columns >= start.unsqueeze(-1))
    losses = masked_mean(-F.logsigmoid(sides[0] - sides[1]), counted, dim=-1)
    loss = losses.sum() / (max(losses.numel(), 1) if normalizer is None else normalizer)
    return loss, _of_pairs(sides[0][:, -1].detach(), sides[1][:, -1].detach())


def _mean(x: Tensor) -> Tensor:
    return x.mean() if x.numel() else x.new_zeros(())


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation on summed sequence log-probs [B], h = beta * ((c - ref_c) - (r -
    ref_r)):

    sigmoid  -(1 - s) log sigmoid(h) - s log sigmoid(-h)       s = label_smoothing (cDPO)
    ipo      (h / beta - 1 / (2 beta))^2                        beta is IPO's tau; give *mean* log-probs

    Metrics have TRL's names: rewards/... are the implicit rewards beta * (logp - reference's), logps/... the policy's
    log-probs as given.
    """
    chosen_gain, rejected_gain = chosen_logp - ref_chosen_logp, rejected_logp - ref_rejected_logp
    gap = chosen_gain - rejected_gain
    if kind == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * gap) - label_smoothing * F.logsigmoid(
            -beta * gap
        )
    elif kind == "ipo":
        losses = (gap - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"DPO loss {kind!r} is unknown; use sigmoid or ipo")
    loss = losses.sum() / (max(losses.numel(), 1) if normalizer is None else normalizer)
    with torch.no_grad():
        metrics = {
            "accuracy": _mean((gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype)),
            "rewards/chosen": _mean(beta * chosen_gain),
            "rewards/rejected": _mean(beta * rejected_gain),
            "logps/chosen": _mean(chosen_logp),
            "logps/rejected": _mean(rejected_logp),
        }
    return loss, metrics


def floats(values: Metrics) -> dict[str, float]:
    """Numbers from one-element tensors of one device, fetched together: a GPU is waited for once."""
    if not values:
        return {}
    together = torch.stack([value.detach().double() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


class FixedKLController:
    """Coefficient of the KL penalty that stays what it is."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, current: float, steps: int) -> None:
        """Does nothing; there so that both controllers are used alike."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


class AdaptiveKLController(FixedKLController):
    """Proportional controller of Ziegler et al. 2019: value *= 1 + clip(current / target - 1, -0.2, 0.2) *
    steps / horizon.

    current: the KL of a whole sequence (summed over its tokens, mean over the batch); steps: sequences seen
    since the last update.
    """

    def __init__(self, value: float = 0.15, target: float = 6.0, horizon: int = 10_000) -> None:
        super().__init__(value)
        if target <= 0 or horizon <= 0:
            raise ValueError(
                f"adaptive KL has target {target} and horizon {horizon}; both must be greater than 0"
            )
        self.target, self.horizon = target, horizon

    def update(self, current: float, steps: int) -> None:
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * steps / self.horizon


class RunningMoments:
    """Mean and standard deviation of all scores seen so far (Chan's parallel update), for reward scaling."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 while fewer than two scores were seen or all were equal."""
        std = (self.m2 / self.count) ** 0.5 if self.count > 1 else 0.0
        return std if std > 1e-8 else 1.0

    def update(self, x: Tensor) -> None:
        n = x.numel()
        if n == 0:
            return
        x = x.double()
        mean, m2 = float(x.mean()), float((x - x.mean()).square().sum())
        total, delta = self.count + n, mean - self.mean
        self.m2 += m2 + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
