"""Rollouts: what is sampled, how rows are scheduled, and what comes back.

Prompts are taken out of their padding and run as ragged rows over a paged cache. A prompt is prefilled once;
its n samples share the prompt's pages. A finished row gives its slot to the next waiting sample, so no step
works on a row that is done. Every row draws from its own random stream, keyed by (prompt, number of the
sample) and the seed, and every kernel gives a row the same bits whatever shares its batch: a row's tokens
depend only on the weights, the prompt, the sampling and the seed.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dschat_kernels.cache import PagedKVCache, page_bytes, pages_for
from dschat_kernels.executors import Draw
from dschat_kernels.graphs import DecodeGraphs
from dschat_kernels.kept_cache import KeptCache
from dschat_kernels.limits import available_memory
from dschat_kernels.plan import Decoder

from ..device import synchronize

STEPS_AT_ONCE = 16
"""Steps in one call of the decoder. What Python does around them is spread over them; an interrupt waits for them."""


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    max_new_tokens: tokens of a completion at most. temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
    min_p: 0 is off. n: samples a prompt. seed: 0 .. 2^63 - 1. eos_token_id: an id, several, or None: never
    stop. pad_token_id: fills completions after their end; None: the model's.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: generate at least 1 token.")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: give a number from 0 (greedy).")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give a number of tokens, or 0 for no limit.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: give a probability above 0, or 1 for no limit.")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}: give a share from 0 (off) to 1.")
        if self.n < 1:
            raise ValueError(f"n is {self.n}: draw at least 1 sample a prompt.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: give a whole number from 0 to 2^63 - 1.")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def draw_settings(self) -> dict[str, Any]:
        """What decides a draw beside a row's random numbers, as `ops.sample` names it."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the reported log-probs: that of the sampling, 1 for greedy."""
        return self.temperature or 1.0


@dataclass
class RolloutStats:
    """Where the time of a rollout went (seconds), how much was done, and what weights ("model", "int8") and what
    cache ("auto", "int8") did it.

    graph_steps: those of `steps` that replayed CUDA graphs, whose sampling counts as decode.
    """

    flip: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    sample: float = 0.0
    total: float = 0.0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    graph_steps: int = 0
    slots: int = 0
    cache_bytes: int = 0
    packed_bytes: int = 0
    weights: str = "model"
    kv_cache: str = "auto"

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second, everything included."""
        return self.completion_tokens / self.total if self.total else 0.0


@dataclass
class Rows:
    """Prompts padded on the left and completions padded on the right, so that column P is every row's first
    completion token.

    prompt_ids, prompt_mask: int64, bool [rows, P]. completion_ids, completion_mask: int64, bool [rows, C].
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def input_ids(self) -> Tensor:
        """Prompt and completion side by side, [rows, P + C]."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """bool [rows, P + C]."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    def select(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """The same of some rows."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.prompt_ids.device)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[index] for name, v in values.items() if isinstance(v, Tensor)})


@dataclass
class Rollout(Rows):
    """Prompts and their completions, one row a sample; the n samples of a prompt are neighbours.

    prompt_ids, prompt_mask: as given. completion_ids: filled with the pad token after the end. completion_mask: true up
    to and including the first EOS. logprobs: float32 [rows, C], log-prob of each sampled token in the full softmax at
    the sampling temperature, 0 where masked. finished: bool [rows], whether the row ended with EOS.
    """

    logprobs: Tensor
    finished: Tensor
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stats: RolloutStats = field(default_factory=RolloutStats)


def stream_of(prompt: Tensor, sample_number: int) -> int:
    """Random stream of a prompt's sample: 63 bits of a digest, so that the place in the batch does not matter."""
    data = prompt.to(torch.int64).contiguous().numpy().tobytes() + sample_number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


@dataclass
class _Prompt:
    """A prompt and its samples that have not started."""

    tokens: Tensor
    waiting: deque[int]
    slot: int = -1
    logits: Tensor | None = None


class RolloutRun:
    """One generate call: `prompts` (ragged, int64) times `sampling.n` rows, at most `max_slots` at a time. `limits`:
    most tokens of a completion, prompt by prompt, where they are to be less than `sampling.max_new_tokens`.
    `own`: numbers of the prompts to run; default: all. `more(n)`: called when those have started and there is room,
    gives up to n further prompts, none when none are left. `taken` is what was run. `agree(rows)`: rows at a time,
    where other processes have to have as many. `kept`: the cache of runs before.

    A row is waiting (its prompt is in `queue` or `open`), active (it has a slot and its last token is drawn
    but not fed), or done. A prompt keeps a slot of its own from its prefill until its last sample starts.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Tensor],
        sampling: SamplingConfig,
        max_slots: int,
        pad_token_id: int,
        on_token: Callable[[int, int], None] | None = None,
        limits: Sequence[int] | None = None,
        graphs: DecodeGraphs | None = None,
        kept: KeptCache | None = None,
        own: Sequence[int] | None = None,
        more: Callable[[int], Sequence[int]] | None = None,
        agree: Callable[[int], int] = int,
    ):
        self.decoder, self.sampling, self.on_token = decoder, sampling, on_token
        self.epoch = decoder.epoch
        self.graphs = graphs if graphs is not None and graphs.reason is None else None
        rows = len(prompts) * sampling.n
        self.streams = row_streams(prompts, sampling.n)
        self.ids = np.full((rows, sampling.max_new_tokens), pad_token_id, dtype=np.int64)
        self.logprobs = np.zeros((rows, sampling.max_new_tokens), dtype=np.float32)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.finished = np.zeros(rows, dtype=bool)
        most = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
        self.limits = np.repeat(np.asarray(most, dtype=np.int64), sampling.n)
        self.eos = np.asarray(sampling.eos_ids, dtype=np.int64)
        self.prompts, self.more, self.agree = prompts, more, agree
        self.taken: list[int] = []
        self.queue: deque[_Prompt] = deque()
        self._take_on(range(len(prompts)) if own is None else own)
        self.open: deque[_Prompt] = deque()  # prefilled, with samples that wait for a slot
        lengths = sorted(len(prompts[i]) for i in (range(len(prompts)) if more else self.taken))
        self.max_active, self.cache = self._make_cache(
            min(len(lengths) * sampling.n, max_slots),
            lengths[-1] + sampling.max_new_tokens,
            max(sum(lengths[-max_slots:]), max_slots),  # tokens of one prefill
            self.graphs or kept or KeptCache(decoder),
        )
        slots = slots_needed(self.max_active, sampling.n)
        self.free = list(range(slots - 1, -1, -1))  # slots
        self.active_rows: list[int] = []
        self.active_slots: list[int] = []
        self.stats = RolloutStats(
            slots=self.max_active,
            cache_bytes=self.cache.num_pages * self.cache.bytes_per_page,
            packed_bytes=decoder.packed_bytes,
            weights=decoder.weights,
            kv_cache=decoder.kv_cache,
        )

    def _make_cache(
        self, rows: int, tokens: int, prefilled: int, kept: KeptCache
    ) -> tuple[int, PagedKVCache]:
        """(rows at a time, a cache for them of `tokens` each), that of the last run where it is large enough.

        prefilled: tokens of the largest prefill, whose buffers need memory too.
        """
        n = self.sampling.n
        if not kept.holds(slots_needed(rows, n), tokens):
            kept.release()  # its memory counts as free
            rows = fit_rows(
                rows, n, slot_bytes(self.decoder, tokens), step_bytes(self.decoder, prefilled, 0),
                step_bytes(self.decoder, 0, 1), self.decoder.device,
            )  # fmt: skip
        rows = self.agree(rows)
        return rows, kept.new_cache(slots_needed(rows, n), tokens)

    def run(self) -> None:
        """Runs until every row is done."""
        with _no_garbage_collection():
            while self._admit():
                self._check_packs()
                self._decode()
        self.stats.prompt_tokens = sum(len(self.prompts[i]) for i in self.taken)
        self.stats.completion_tokens = int(self.counts.sum())

    def _check_packs(self) -> None:
        """Raises RuntimeError where a callback or another thread packed other weights in the middle of the rollout."""
        if self.decoder.epoch != self.epoch:
            raise RuntimeError(
                "the packs changed in the middle of a rollout: change weights and adapters before or after generate, "
                "not from on_token or another thread."
            )

    # ------------------------------------------------------------------------------------------------ admission

    def _take_on(self, numbers: Sequence[int]) -> None:
        """Puts prompts into the queue."""
        n = self.sampling.n
        self.taken += numbers
        self.queue.extend(_Prompt(self.prompts[i], deque(range(i * n, (i + 1) * n))) for i in numbers)

    def _admit(self) -> bool:
        """Fills free places, with samples of prefilled prompts before any further prompt is prefilled. Whether a row is
        active then.

        Prompts are prefilled only when no prefilled one waits, so the slots they keep cannot run out.
        """
        while (room := self.max_active - len(self.active_rows)) > 0:
            if not self.open:
                fresh: list[_Prompt] = []
                while room > 0 and self._refill(room):
                    fresh.append(self.queue.popleft())
                    room -= len(fresh[-1].waiting)
                if not fresh:
                    break
                self._prefill(fresh)
            self._start_samples()
        return bool(self.active_rows)

    def _refill(self, room: int) -> bool:
        """Whether a prompt waits, or could be had from others for the `room` rows."""
        if not self.queue and self.more is not None:
            self._take_on(self.more(-(-room // self.sampling.n)))
        return bool(self.queue)

    def _prefill(self, prompts: list[_Prompt]) -> None:
        start = time.perf_counter()
        for prompt in prompts:
            prompt.slot = self.free.pop()
        lens = [len(p.tokens) for p in prompts]
        logits = self.decoder.step(
            torch.cat([p.tokens for p in prompts]), self.cache, [p.slot for p in prompts], lens
        )
        for prompt, row in zip(prompts, logits, strict=True):
            prompt.logits = row
        self.open.extend(prompts)
        synchronize(self.decoder.device)
        self.stats.prefill += time.perf_counter() - start
        self.stats.prefilled_tokens += sum(lens)

    def _start_samples(self) -> None:
        """Gives waiting samples of prefilled prompts their slot and first token, as many as there is room for."""
        rows: list[int] = []
        slots: list[int] = []
        logits: list[Tensor] = []
        while self.open and len(self.active_rows) + len(rows) < self.max_active:
            prompt = self.open[0]
            assert prompt.logits is not None
            if len(prompt.waiting) == 1:  # the last sample inherits the prompt's slot
                slot = prompt.slot
                self.open.popleft()
            else:
                slot = self.free.pop()
                self.cache.fork(prompt.slot, slot)
            rows.append(prompt.waiting.popleft())
            slots.append(slot)
            logits.append(prompt.logits)
        self._accept(rows, slots, torch.stack(logits))

    # --------------------------------------------------------------------------------------------------- decode

    def _decode(self) -> None:
        """Draws for every active row, step after step, until one of them is done or there is something else to do."""
        start = time.perf_counter()
        rows, slots = self.active_rows, self.active_slots
        last = self.ids[rows, self.counts[rows] - 1]
        sampling = 0.0
        drawn = None if self.graphs is None else self._replay(self.graphs, last)
        if drawn is None:
            steps = int((self.limits[rows] - self.counts[rows]).min())
            steps = min(steps, 1 if self.on_token is not None else STEPS_AT_ONCE)
            found = self.decoder.decode(
                torch.from_numpy(last), self.cache, slots, self._draw(rows), steps, self.sampling.eos_ids
            )
            drawn, sampling = (found.tokens.numpy(), found.log_probs.numpy()), found.sampling
        self.stats.decode += time.perf_counter() - start - sampling
        self.stats.sample += sampling
        self.stats.steps += len(drawn[0])
        self.active_rows, self.active_slots = [], []
        self._take(rows, slots, *drawn)

    def _replay(self, graphs: DecodeGraphs, last: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The next token of each active row and its log-prob, [1, rows], by CUDA graphs; None where these cannot be
        had."""
        rows = self.active_rows
        settings = self.sampling.draw_settings
        drawn = graphs.step(last, self.active_slots, self.streams[rows], self.counts[rows], settings)
        if drawn is None:
            self.graphs = None
            return None
        self.stats.graph_steps += 1
        return drawn[0][None], drawn[1][None]

    def _draw(self, rows: list[int]) -> Draw:
        """How rows draw the next of their tokens."""
        streams, positions = (torch.from_numpy(numbers[rows]) for numbers in (self.streams, self.counts))
        return Draw(**self.sampling.draw_settings, streams=streams, positions=positions)

    def _accept(self, rows: list[int], slots: list[int], logits: Tensor) -> None:
        """Draws one token for each row; rows that are done leave, the others stay or become active."""
        start = time.perf_counter()
        tokens, logprobs = self._draw(rows).sample(logits, self.decoder.backend)
        self._take(rows, slots, tokens.numpy()[None], logprobs.numpy()[None])
        self.stats.sample += time.perf_counter() - start

    def _take(self, rows: list[int], slots: list[int], drawn: np.ndarray, logprobs: np.ndarray) -> None:
        """Books tokens [steps, rows] of rows that have none of their own to end with before the last step."""
        steps = len(drawn)
        index = np.asarray(rows)[:, None], self.counts[rows][:, None] + np.arange(steps)
        self.ids[index] = drawn.T
        self.logprobs[index] = logprobs.T
        self.counts[rows] += steps
        ended = np.isin(drawn[-1], self.eos)
        self.finished[rows] = ended
        if self.on_token is not None:
            for step in drawn.tolist():
                for row, token in zip(rows, step, strict=True):
                    self.on_token(row, token)
        done = ended | (self.counts[rows] >= self.limits[rows])
        for row, slot, leaves in zip(rows, slots, done.tolist(), strict=True):
            if leaves:
                self.cache.free(slot)
                self.free.append(slot)
            else:
                self.active_rows.append(row)
                self.active_slots.append(slot)

    def completions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(completion_ids, completion_mask, logprobs, finished) of the prompts `taken`, on the decoder's device, cut to
        the longest completion."""
        n, device = self.sampling.n, self.decoder.device
        rows = (np.asarray(self.taken, dtype=np.int64)[:, None] * n + np.arange(n)).reshape(-1)
        counts = self.counts[rows]
        width = int(counts.max())
        mask = np.arange(width)[None] < counts[:, None]
        return (
            torch.from_numpy(self.ids[rows, :width]).to(device),
            torch.from_numpy(mask).to(device),
            torch.from_numpy(self.logprobs[rows, :width]).to(device),
            torch.from_numpy(self.finished[rows]).to(device),
        )


def empty_completions(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`RolloutRun.completions` of no rows."""
    none = torch.zeros(0, 0, device=device)
    return none.long(), none.bool(), none, torch.zeros(0, dtype=torch.bool, device=device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Steps make no reference cycles, and a search for some among a model's many objects takes as long as a step."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def row_streams(prompts: Iterable[Tensor], n: int) -> np.ndarray:
    """One stream a row. A prompt that stands in the batch twice draws further samples, not the same ones again."""
    seen: dict[bytes, int] = {}
    streams = []
    for prompt in prompts:
        key = prompt.numpy().tobytes()
        first = seen.get(key, 0)
        seen[key] = first + n
        streams += [stream_of(prompt, first + j) for j in range(n)]
    return np.asarray(streams, dtype=np.int64)


def device_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU, what PyTorch keeps for itself included; None where nobody says."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def slots_needed(rows: int, n: int) -> int:
    """Cache slots for `rows` rows at a time: with several samples, one prompt is half started."""
    return rows + (n > 1)


def slot_bytes(decoder: Decoder, tokens: int) -> int:
    """Cache bytes of one sequence of up to `tokens` tokens."""
    spec = decoder.spec
    page = page_bytes(len(spec.layers), spec.num_kv_heads, spec.head_dim, decoder.cache_dtype)
    return pages_for(tokens) * page


def step_bytes(decoder: Decoder, tokens: int, rows: int) -> int:
    """Bytes of the buffers of steps of up to `tokens` tokens in `rows` rows; logits exist three times (buffer, result,
    what the sampler reads)."""
    per_row = decoder.spec.vocab_size * torch.float32.itemsize * 3
    widths = sum(width for name, width in decoder.plan.widths.items() if name != "logits")
    return min(tokens, decoder.max_tokens) * widths * decoder.dtype.itemsize + rows * per_row


def fit_rows(
    rows: int, n: int, bytes_per_slot: int, buffers: int = 0, bytes_per_row: int = 0,
    device: torch.device | None = None,
) -> int:  # fmt: skip
    """Rows at a time, at most `rows`, whose cache and buffers fit into three quarters of the device's free memory.

    bytes_per_slot: cache of one sequence. buffers: what steps need whatever the number of rows; bytes_per_row: what a
    row needs besides its cache. Fewer rows at a time give the same results, later.
    """
    free = available_memory() if device is None or device.type == "cpu" else device_memory(device)
    if free is None:
        return rows
    budget = int(0.75 * free)
    idle = slots_needed(0, n) * bytes_per_slot
    fit = (budget - buffers - idle) // (bytes_per_slot + bytes_per_row)
    if fit < 1:
        raise MemoryError(
            f"one row needs {(bytes_per_slot + idle) / 2**20:.1f} MiB of cache and "
            f"{(buffers + bytes_per_row) / 2**20:.1f} MiB of buffers, and {budget / 2**20:.1f} MiB may be used (three "
            "quarters of what is free): shorten the prompts or max_new_tokens."
        )
    return min(rows, fit)


def stats_dict(stats: RolloutStats) -> dict[str, Any]:
    """The stats as plain numbers, for logs."""
    return {**asdict(stats), "tokens_per_second": stats.tokens_per_second}
