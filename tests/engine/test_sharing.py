"""Prompts that wait are handed out once, whatever the order in which teams ask (no process group is needed for that);
and a team that has nothing to do holds up nobody."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from dschat import parallel
from dschat.engine import HybridEngine, SamplingConfig
from dschat.engine.rollout import RolloutRun
from dschat.engine.sharing import Queue, Sharing
from tests.distributed.processes import free_port
from tests.tiny_models import build


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Any:
    """queues(sizes): each team's view of the same ranges, of so many prompts that wait."""
    store = dist.HashStore()
    monkeypatch.setattr(parallel, "store", lambda: store)

    def make(*sizes: int) -> list[Queue]:
        ranges, begin = [], 0
        for size in sizes:
            ranges.append(range(begin, begin + size))
            begin += size
        made = [Queue(SimpleNamespace(size=1, part=0, team=t), ranges) for t in range(len(sizes))]  # type: ignore[arg-type]
        for queue in made:
            queue.name = made[0].name  # in one process each, they count alike
        return made

    return make


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_given_out_once(queues: Any, seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.randrange(9) for _ in range(chance.randrange(2, 5))]
    teams = queues(*sizes)
    given: list[int] = []
    asking = set(range(len(teams)))
    while asking:
        team = chance.choice(sorted(asking))
        found = teams[team].take(chance.randrange(1, 5))
        given += found
        if not found:
            asking.remove(team)
    assert sorted(given) == list(range(sum(sizes)))
    assert all(len(team.take(3)) == 0 for team in teams)


def test_own_prompts_first_and_then_half_of_the_fullest(queues: Any) -> None:
    first, second, third = queues(2, 9, 4)
    assert list(first.take(5)) == [0, 1], "its own, though there is room for more"
    assert list(first.take(8)) == [2, 3, 4, 5, 6], "half of nine"
    assert list(first.take(1)) == [7], "of four each the first, and no more than it has room for"
    assert list(third.take(9)) == [11, 12, 13, 14]
    assert list(second.take(9)) == [8, 9, 10]
    assert [len(q.take(1)) for q in (first, second, third)] == [0, 0, 0]


def test_nothing_waits_where_all_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "store", dist.HashStore)
    sharing = Sharing()
    assert sharing.queue(8, 4) is None
    waiting = sharing.queue(11, 4)
    assert waiting is not None and waiting.waiting == [range(4, 6), range(10, 11)]


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_a_run_goes_on_with_what_it_is_given(n: int) -> None:
    """Prompts that come in pieces, in any order, have the tokens of one run with all of them."""
    engine = HybridEngine(build("llama"), max_slots=2)
    prompts = [torch.arange(3, 3 + k) for k in (4, 2, 5, 1, 3)]
    sampling = SamplingConfig(max_new_tokens=6, n=n, seed=1, eos_token_id=7)
    engine.flip()
    whole = RolloutRun(engine.decoder, prompts, sampling, 2, 0)
    whole.run()
    pieces = [[4], [0]]
    asked: list[int] = []

    def more(room: int) -> list[int]:
        asked.append(room)
        return pieces.pop(0) if pieces else []

    run = RolloutRun(engine.decoder, prompts, sampling, 2, 0, own=[3, 1], more=more)
    run.run()
    assert run.taken == [3, 1, 4, 0] and all(1 <= room <= 2 for room in asked)
    for ours, theirs in zip(run.completions(), whole.completions(), strict=True):
        rows = [i * n + j for i in run.taken for j in range(n)]
        if theirs.dim() == 2:
            assert (
                torch.equal(ours, theirs[rows, : ours.shape[1]]) and not theirs[rows, ours.shape[1] :].any()
            )
        else:
            assert torch.equal(ours, theirs[rows])
    assert run.stats.prompt_tokens == 1 + 2 + 3 + 4


def _one_prompt_for_two_teams(rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        parallel.TIMEOUT: "40",
    }  # fmt: skip
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    sharing = Sharing(2)
    rows, taken = torch.zeros(0, 2), []
    if sharing.counts(1)[sharing.team]:
        assert sharing.smallest(3 + rank) == 3
        rows, taken = sharing.columns(torch.full((1, 1), 5.0 + rank), [1, 1]), [0]
    (found,) = sharing.together([rows], taken, 1, 1)
    assert found.tolist() == [[5.0, 6.0]]
    parallel.stop()


@pytest.mark.slow
def test_a_team_without_a_prompt_holds_up_nobody() -> None:
    """Its processes go straight to where results come together."""
    torch.multiprocessing.spawn(_one_prompt_for_two_teams, (free_port(),), nprocs=4)


def test_a_team_waits_no_longer_than_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], float]] = []

    def new_group(ranks: list[int], timeout: Any = None) -> str:
        asked.append((ranks, timeout and timeout.total_seconds()))
        return f"group of {ranks}"

    monkeypatch.setenv(parallel.TIMEOUT, "60")
    monkeypatch.setattr(parallel, "world", lambda: 4)
    monkeypatch.setattr(parallel, "rank", lambda: 2)
    monkeypatch.setattr(parallel, "_groups", {})
    monkeypatch.setattr(dist, "new_group", new_group)
    assert Sharing(2).team == 1 and asked == [([0, 1], 60.0), ([2, 3], 60.0)]
    assert parallel.group(2) == "group of [2, 3]" and len(asked) == 2
