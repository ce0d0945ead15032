"""What keeps a policy near what it was, beside the KL: a language-modelling loss on plain text, and an average
of its weights.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from .. import parallel
from ..config import ConfigError, OnlineConfig
from ..engine.hybrid_engine import HybridEngine
from ..engine.zero import float_copies, held, whole
from . import batching, conversations, data, losses, reading
from .run import derive_seed


class PretrainingMix:
    """Adds unsup_coef * mean -log p(token) of text blocks to every minibatch (PPO-ptx, Ouyang et al. 2022).

    The rows' texts (column `text`, else prompt and response one after the other) are joined, EOS between them,
    and cut into blocks of `unsup_length` tokens. Which blocks a minibatch gets is a function of seed, step and
    its number.
    """

    def __init__(self, config: OnlineConfig, encoder: conversations.Encoder) -> None:
        self.config, self.pad_id = config, encoder.pad_id
        records, _ = reading.read(config.unsup_data, 0, config.bad_rows)
        ids: list[int] = []
        for record in records:
            ids += [*encoder.tokenizer(_text(record), add_special_tokens=False)["input_ids"], encoder.eos_id]
        size = config.unsup_length
        self.blocks = [b for b in batching.chunks(ids, size) if len(b) == size]
        if not self.blocks:
            raise ConfigError(
                f"unsup_data has {len(ids)} tokens, less than one block of unsup_length {size}; "
                f"lower unsup_length to {max(2, len(ids))} or less, or give more text"
            )

    def backward(self, engine: HybridEngine, step: int, minibatch: int) -> dict[str, float]:
        """Gradient of the term for one minibatch, `batch_size` blocks; returns numbers for the log."""
        seed = derive_seed(self.config.seed, "unsup", step, minibatch)
        count = min(self.config.batch_size, len(self.blocks))
        rows = np.random.Generator(np.random.Philox(key=[seed, 0])).choice(
            len(self.blocks), count, replace=False
        )
        blocks = [list(self.blocks[int(i)]) for i in rows]
        ((piece, own),) = parallel.shares(blocks, count)
        # The first token of a block is given, the others are predicted.
        batch = batching.Sequences.of(
            [b[:1] for b in piece], [b[1:] for b in piece], self.pad_id, engine.device
        )
        logp = engine.logprobs(batch, temperature=1.0)
        predicted = count * (self.config.unsup_length - 1)
        loss, _ = losses.nll_loss(logp, batch.completion_mask, normalizer=predicted)
        engine.backward(self.config.unsup_coef * loss if own else loss * 0.0)
        return parallel.total({"unsup/loss": float(loss.detach()) * own})


def _text(record: reading.Record) -> str:
    columns = record.columns
    if isinstance(columns.get("text"), str):
        return str(columns["text"])
    name = next((n for n in data.RESPONSE_COLUMNS if n in columns), None)
    if name is None or not isinstance(columns.get("prompt"), str):
        raise reading.DataError(
            f"{record.where} has no column text, and no prompt and response either, but {', '.join(columns)}"
        )
    return columns["prompt"] + conversations.answer_text(columns[name], name)


class WeightAverage(nn.Module):
    """Exponential moving average, in float32, of a module's trainable weights: a = d * a + (1 - d) * w. Under ZeRO-3
    it is sharded as they are, and a process averages its own shards."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average = float_copies([p for p in module.parameters() if p.requires_grad])

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        for a, p in zip(self.average, trained, strict=True):
            held(a).mul_(self.decay).add_(held(p).float(), alpha=1 - self.decay)

    @torch.no_grad()
    def of(self, module: nn.Module) -> nn.Module:
        """A copy of the module with the averages in the place of its weights, whole on every process."""
        with whole([*module.parameters(), *self.parameters()]):
            averaged = copy.deepcopy(module)
            trained = [p for p in averaged.parameters() if p.requires_grad]
            for a, p in zip(self.average, trained, strict=True):
                p.copy_(a)
        return averaged
