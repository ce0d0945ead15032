"""How several processes generate one rollout: in teams, each with one decoder and some of the prompts.

A team is `size` neighbouring processes that hold the decoder in parts (dschat_kernels/sharding.py) and decode the same
rows in step; with size 1 every process is a team. The prompts are divided among the teams. A team that has started
all of its own takes waiting ones of the team with the most left. Which team computes a row does not change the row, so
the result does not depend on who was fast.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import parallel


class Sharing:
    """The teams of all processes, as many as there are when it is asked. All processes have to make one.

    Raises ValueError where the processes cannot be divided into teams of `size`.
    """

    def __init__(self, size: int = 1):
        check_teams(size, parallel.world())
        self.size = size
        if size > 1:
            # Made by all processes together; a team without a prompt would not come to it later.
            parallel.group(size)

    @property
    def teams(self) -> int:
        """How many there are."""
        return parallel.world() // self.size

    @property
    def team(self) -> int:
        """Number of this process's team."""
        return parallel.rank() // self.size

    @property
    def part(self) -> int:
        """Number of this process in its team."""
        return parallel.rank() % self.size

    def counts(self, prompts: int) -> list[int]:
        """How many of the prompts each team begins with."""
        return parallel.counts(prompts, self.teams)

    def columns(self, own: Tensor, widths: Sequence[int]) -> Tensor:
        """[T, sum of widths]: the columns of the team's parts side by side. own: [T, widths[part]]."""
        most = max(widths)
        mine = own.contiguous()
        if own.shape[1] < most:
            mine = torch.nn.functional.pad(mine, (0, most - own.shape[1]))
        parts = [torch.empty_like(mine) for _ in widths]
        dist.all_gather(parts, mine, group=parallel.group(self.size))
        return torch.cat([part[:, :n] for part, n in zip(parts, widths, strict=True)], dim=1)

    def smallest(self, value: int) -> int:
        """The smallest value in the team."""
        if self.size == 1:
            return value
        box = torch.tensor([value], device=parallel.device())
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=parallel.group(self.size))
        return int(box)

    def queue(self, prompts: int, reserved: int) -> Queue | None:
        """Of the prompts that wait where each team begins with `reserved` at most; None where none waits."""
        counts = self.counts(prompts)
        if self.teams == 1 or max(counts) <= reserved:
            return None
        ends = torch.tensor(counts, device="cpu").cumsum(0).tolist()
        waiting = [range(min(end - n + reserved, end), end) for n, end in zip(counts, ends, strict=True)]
        return Queue(self, waiting)

    def together(
        self, found: Sequence[Tensor], taken: Sequence[int], prompts: int, samples: int
    ) -> tuple[Tensor, ...]:
        """Rows of all teams in the order of the prompts. found: tensors [rows of the prompts `taken`, ...], of one
        shape but for the rows; `samples` rows are a prompt's."""
        device = found[0].device
        own = taken if self.part == 0 else []  # a team's processes have the same
        each = parallel.gather(torch.tensor([len(own)], device=device), [1] * parallel.world()).tolist()
        numbers = parallel.gather(torch.tensor(own, dtype=torch.int64, device=device), each)
        order = numbers.argsort()
        assert torch.equal(numbers[order].cpu(), torch.arange(prompts, device="cpu")), (
            "every prompt is generated once"
        )
        rows = (order[:, None] * samples + torch.arange(samples, device=device)).flatten()
        each = [n * samples for n in each]
        return tuple(parallel.gather(t[: len(own) * samples], each)[rows] for t in found)


class Queue:
    """Prompts that wait, a range for each team, every one given out once.

    The heads of the ranges are counters in the store of the process group: an atomic addition takes some, and nobody
    waits for anybody. A process that dies takes its prompts with it; the others notice when results come together.
    """

    numbers = itertools.count()  # the same in all processes, which make their queues in one order

    def __init__(self, sharing: Sharing, waiting: Sequence[range]):
        self.sharing, self.waiting = sharing, waiting
        self.name = f"dschat/waiting/{next(self.numbers)}"
        self.store: Any = parallel.store()
        self.open = set(range(len(waiting)))  # teams whose range may hold some

    def take(self, most: int) -> range:
        """Up to `most` prompts: own ones, and when there are none the first half of what the fullest other team has;
        an empty range when none waits anywhere. All processes of a team have to call, and get the same."""
        if not self.open:
            return range(0)
        found = self._take(most) if self.sharing.part == 0 else range(0)
        if self.sharing.size > 1:
            box = torch.tensor([found.start, found.stop], device=parallel.device())
            first = self.sharing.team * self.sharing.size
            dist.broadcast(box, src=first, group=parallel.group(self.sharing.size))
            found = range(*box.tolist())
        if not found:
            self.open.clear()
        return found

    def _take(self, most: int) -> range:
        while self.open:
            team, n = self.sharing.team, most
            if team not in self.open:
                left = {t: len(self.waiting[t]) - self._add(t, 0) for t in self.open}
                team = max(left, key=lambda t: (left[t], -t))
                n = min(most, max(1, -(-left[team] // 2)))
            begin = self._add(team, n) - n
            if begin < len(self.waiting[team]):
                return self.waiting[team][begin : begin + n]
            self.open.discard(team)
        return range(0)

    def _add(self, team: int, n: int) -> int:
        return int(self.store.add(f"{self.name}/{team}", n))

    def close(self) -> None:
        """Forgets the counters; once no process takes any more."""
        if parallel.lead():
            for team in range(len(self.waiting)):
                self.store.delete_key(f"{self.name}/{team}")


def check_teams(size: int, world: int) -> None:
    """Raises ValueError where `world` processes cannot be divided into teams of `size`."""
    if size >= 1 and world % size == 0:
        return
    if size < 1:
        raise ValueError(f"inference_tp_size is {size}: give at least 1.")
    near = max(n for n in range(1, min(size, world) + 1) if world % n == 0)
    many = f"{world} processes, which it does not divide" if world > 1 else "1 process"
    raise ValueError(
        f"inference_tp_size is {size} and there {'are' if world > 1 else 'is'} {many}: set it to {near}, or start "
        f"{-(-world // size) * size} processes (dschat launch --num_processes)."
    )
