"""From examples to batches with explicit masks, and which rows make up a step.

Masks are made from lengths, never from token ids, so a pad token that is also EOS does no harm. Everything random is
a function of (seed, epoch), so that a data position is a step number.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..engine.rollout import Rows
from .data import Example

E = TypeVar("E")


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, longest]; mask is bool and made from the lengths."""
    width = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long, device="cpu")
    mask = torch.zeros((len(rows), width), dtype=torch.bool, device="cpu")
    for i, row in enumerate(rows):
        if row:
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, where] = torch.as_tensor(row, dtype=torch.long, device="cpu")
            mask[i, where] = True
    return ids, mask


class Sequences(Rows):
    """Prompts with answers that nobody sampled."""

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int,
        device: torch.device | None = None,
    ) -> Sequences:  # fmt: skip
        """device: where the model is that reads them; None: the CPU."""
        made = (*pad(prompts, pad_id, "left"), *pad(completions, pad_id, "right"))
        return cls(*(tensor.to(device) for tensor in made))


def answer_batch(
    examples: Sequence[Example], answers: Sequence[int], pad_id: int, device: torch.device | None = None
) -> tuple[Sequences, Tensor]:
    """The answers of these numbers, those of one number in a row, and which of their tokens are learnt: bool [B, C]."""
    batch = Sequences.of(
        [e.prompt_ids for _ in answers for e in examples], [e.answers[k] for k in answers for e in examples],
        pad_id, device,
    )  # fmt: skip
    learnt, _ = pad([e.learnt_of(k) for k in answers for e in examples], 0, "right")
    return batch, learnt.to(batch.completion_mask)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in an epoch, a function of its arguments alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, epoch]))
    return [int(i) for i in generator.permutation(n)]


def fill(lengths: Sequence[int], budget: int, seed: int) -> list[list[int]]:
    """Rows in batches of at most `budget` tokens: the longest first, each into the fullest batch that has room for it.

    The seed decides which of the rows of one length go where. No row may be longer than the budget.
    """
    batches: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    having: dict[int, list[list[int]]] = {}  # room -> batches
    for row in sorted(epoch_order(len(lengths), seed, 0), key=lambda row: -lengths[row]):
        place = bisect.bisect_left(rooms, lengths[row])
        if place < len(rooms):
            room = rooms[place]
            batch = having[room].pop()
            if not having[room]:
                del having[room], rooms[place]
        else:
            room, batch = budget, []
            batches.append(batch)
        batch.append(row)
        room -= lengths[row]
        if room and room not in having:
            bisect.insort(rooms, room)
        if room:
            having.setdefault(room, []).append(batch)
    return batches


@dataclass(frozen=True)
class Schedule:
    """Which rows make up step `s`: the data position of a run is its step number, nothing else needs saving.

    Every epoch is a new order; its last batch may be smaller. max_steps cuts short or, being larger, adds
    epochs.
    """

    rows: int
    batch_size: int
    epochs: int = 1
    max_steps: int = 0
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """Rows of step 0, 1, ..."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch_order(self.rows, self.seed, epoch)[k * self.batch_size : (k + 1) * self.batch_size]


def chunks(items: Sequence[E], size: int) -> Iterator[Sequence[E]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
