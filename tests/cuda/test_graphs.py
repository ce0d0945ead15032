"""Decode steps as graphs, on the CUDA sources compiled for the CPU and a recorder in place of CUDA's graphs: the
tokens of the steps op by op, whatever the batch, the lengths and the weights become, and what a graph must not do.

What only a GPU can show is marked `gpu`: that CUDA records and replays the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from recording import RecordingGraphs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dschat import HybridEngine, SamplingConfig
from dschat.engine.rollout import Rollout
from dschat_kernels.graphs import DecodeGraphs, _Bucket, bucket_of
from dschat_kernels.ops._common import capturing
from dschat_kernels.ops.sample import sample
from tests.tiny_models import build

PROMPTS = torch.tensor([[0, 0, 1, 3, 7], [1, 4, 6, 8, 9], [0, 0, 0, 0, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
SAMPLING = SamplingConfig(max_new_tokens=6, n=2, top_k=12, seed=3, eos_token_id=[2, 11, 30, 44])


def engine_of(model: Any, graphs: bool = True, **options: Any) -> HybridEngine:
    engine = HybridEngine(model, backend=options.pop("backend", "cuda"), **options)
    assert engine.graphs is None  # this is no GPU
    if graphs:
        engine.graphs = DecodeGraphs(engine.decoder, RecordingGraphs())
    return engine


def generate(engine: HybridEngine, sampling: SamplingConfig = SAMPLING) -> Rollout:
    return engine.generate(PROMPTS, MASK, sampling)


def same(a: Rollout, b: Rollout) -> bool:
    return torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.logprobs, b.logprobs)


@pytest.fixture
def model(cuda: Any) -> Iterator[Any]:
    yield build("llama", num_hidden_layers=1)


def test_steps_are_those_op_by_op(model: Any) -> None:
    """Rows end and others begin, so the batch shrinks from bucket to bucket; a graph is recorded once for each."""
    engine = engine_of(model, max_slots=5)
    ours, plain = generate(engine), generate(engine_of(model, graphs=False, max_slots=5))
    assert same(ours, plain)
    assert len(set(ours.completion_mask.sum(1).tolist())) > 1, "every row has one length: nothing shrinks"
    assert ours.stats.graph_steps == ours.stats.steps == plain.stats.steps and plain.stats.graph_steps == 0
    graphs = engine.graphs
    assert graphs is not None and graphs.reason is None and graphs.replayed == ours.stats.steps
    assert graphs.recorded == 2 * len(graphs._buckets) and len(graphs._buckets) > 1

    assert same(generate(engine), plain)  # nothing is recorded for a second rollout
    assert graphs.recorded == 2 * len(graphs._buckets)
    other = SamplingConfig(max_new_tokens=6, n=2, temperature=0.7, seed=4)
    assert same(generate(engine, other), generate(engine_of(model, graphs=False, max_slots=5), other))
    forwards = len({id(bucket.forward) for bucket in graphs._buckets.values()})
    assert graphs.recorded - 2 * forwards <= len(graphs._buckets)  # of the old buckets the draw only


def test_lengths_grow_across_pages(model: Any) -> None:
    prompt = torch.randint(3, 60, (1, 62))
    greedy = SamplingConfig(max_new_tokens=5, temperature=0.0)
    engine = engine_of(model)
    ours = engine.generate(prompt, None, greedy)
    assert same(ours, engine_of(model, graphs=False).generate(prompt, None, greedy))
    assert engine.graphs is not None and engine.graphs.recorded == 2


@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_updated_in_place(model: Any, dtype: torch.dtype, weights: str) -> None:
    """Every weight changes, and the recordings go on, with the new ones; also where the rollout has copies in another
    dtype than the model's, or integers."""
    engine = engine_of(model, dtype=dtype, rollout_weights=weights)
    before = generate(engine)
    graphs = engine.graphs
    assert graphs is not None
    recorded, sizes, addresses = graphs.recorded, set(graphs._buckets), engine.decoder.addresses()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01)
    after = generate(engine)
    assert not same(before, after)
    assert same(after, generate(engine_of(model, graphs=False, dtype=dtype, rollout_weights=weights)))
    assert engine.decoder.addresses() == addresses
    assert graphs.recorded - recorded == 2 * len(set(graphs._buckets) - sizes)  # of sizes that are new


def move(model: Any) -> None:
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data * 1.1


def test_what_moved_is_recorded_anew(model: Any) -> None:
    engine = engine_of(model)
    generate(engine)
    graphs = engine.graphs
    assert graphs is not None
    recorded = graphs.recorded
    move(model)
    assert same(generate(engine), generate(engine_of(model, graphs=False)))
    assert graphs.recorded > recorded


def test_a_pointer_that_moves_unseen_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder is as strict as it says: without the look at the addresses the graph reads freed memory."""
    engine = engine_of(model)
    monkeypatch.setattr(engine.decoder, "addresses", lambda: ())
    generate(engine)
    move(model)
    with pytest.raises(RuntimeError, match="the graph reads memory that was freed"):
        generate(engine)


def test_a_bias_that_appears_moves_a_pack(model: Any) -> None:
    engine = engine_of(model)
    generate(engine)
    projection = model.model.layers[0].self_attn.o_proj
    projection.bias = nn.Parameter(torch.randn(projection.out_features))
    assert same(generate(engine), generate(engine_of(model, graphs=False)))


def test_a_host_read_ends_in_steps_op_by_op(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference reads its tables on the CPU: no graph, one warning with the reason, the same tokens."""
    monkeypatch.setattr("dschat_kernels.ops._common._said", set())
    engine = engine_of(model, backend="reference")
    with pytest.warns(
        UserWarning, match="no CUDA graph of a decode step could be recorded: operation not permitted"
    ):
        ours = generate(engine)
    assert same(ours, generate(engine_of(model, graphs=False, backend="reference")))
    assert ours.stats.graph_steps == 0
    assert engine.graphs is not None and "waits for the GPU" in str(engine.graphs.reason)
    assert same(generate(engine), ours)  # and it is not tried again
    assert engine.graphs.recorded == 0


def test_a_look_at_the_tokens_is_a_host_read(cuda: Any) -> None:
    """`sample` looks for bad rows, but not while a graph is recorded."""
    logits = torch.randn(2, 9)

    def draw() -> Any:
        return sample(logits, temperature=0.0, backend="cuda")

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        RecordingGraphs().record(draw)
    with capturing():
        graph, (tokens, _) = RecordingGraphs().record(draw)
    logits.neg_()
    graph.replay()
    assert torch.equal(tokens, logits.argmax(-1))


class _NothingNew(TorchDispatchMode):
    """Refuses calls that make a tensor, but for those by which the CPU reads the tokens."""

    READING = ("aten::_to_copy", "aten::lt", "aten::any", "aten::is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
            for tree in (args, out)
        )
        assert made <= given or func._schema.name in self.READING, f"{func} allocates"
        return out


def test_a_replayed_step_allocates_nothing(model: Any) -> None:
    decoder = engine_of(model).decoder
    decoder.refresh()
    graphs = DecodeGraphs(decoder, RecordingGraphs())
    cache = graphs.new_cache(2, 8)
    decoder.step(torch.tensor([1, 2, 3]), cache, [0, 1], [2, 1])
    numbers = np.zeros(2, dtype=np.int64)
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    first = graphs.step(numbers, [1, 0], numbers, numbers, settings)
    assert first is not None and cache.lengths.tolist() == [3, 2]
    with _NothingNew():
        second = graphs.step(first[0], [1, 0], numbers, numbers, settings)
    assert second is not None and cache.lengths.tolist() == [4, 3]
    with _NothingNew(), pytest.raises(AssertionError, match="allocates"):
        decoder.step(torch.from_numpy(first[0]), cache, [1, 0])


def test_more_rows_than_a_bucket_are_refused() -> None:
    numbers = np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match="3 rows do not fit the 2 of this graph: use a larger bucket"):
        _Bucket(2, torch.device("cpu")).fill(numbers, numbers, numbers, numbers, numbers, 9)


def test_buckets() -> None:
    sizes = sorted({bucket_of(n) for n in range(1, 129)})
    assert sizes == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]
    assert all(bucket_of(n) >= n for n in range(1, 129))


def test_the_padding_slot_is_nobodys(model: Any) -> None:
    """Filling rows write to a page of their own; the others have the bits that they have alone."""
    decoder = engine_of(model).decoder
    decoder.refresh()
    cache = decoder.new_cache(2, 70, padding=True)
    assert cache.padding_slot == 2 and cache.num_slots == 2 and cache.free_pages == cache.num_pages == 4
    with pytest.raises(ValueError, match="slot 2 does not exist: the cache has slots 0 to 1"):
        cache.alloc(2, 1)
    cache.prepare_append([0, 1], 70)
    assert cache.free_pages == 0 and 4 not in cache.block_table[:2]
    assert cache.block_table[2].tolist() == [4, 4]


def test_rows_without_a_token_get_the_sentence(model: Any) -> None:
    engine = engine_of(model)
    generate(engine)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    numbers = np.zeros(1, dtype=np.int64)
    graphs = engine.graphs
    assert graphs is not None
    engine.flip()
    cache = graphs.new_cache(1, 8)
    engine.decoder.step(torch.tensor([1]), cache, [0], [1])
    with pytest.raises(ValueError, match="sample: row 0 of logits has a NaN"):
        graphs.step(numbers, [0], numbers, numbers,
                    {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0})  # fmt: skip


def test_the_cache_is_kept_where_it_is_large_enough(model: Any) -> None:
    graphs = DecodeGraphs(engine_of(model).decoder, RecordingGraphs())
    cache = graphs.new_cache(4, 100)
    cache.prepare_append([1], 70)
    cache.advance([1], 70)
    assert graphs.new_cache(3, 128) is cache
    assert cache.lengths.tolist() == [0] * 4 and cache.free_pages == cache.num_pages
    assert graphs.new_cache(5, 100) is not cache
    graphs.release()
    assert graphs.cache is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cuda_records_and_replays(backend: str) -> None:
    """On a GPU: graphs against steps op by op, before and after an update of the weights, and no memory leaks."""
    model = build("llama", num_hidden_layers=2).to("cuda")
    engine = HybridEngine(model, backend=backend)
    plain = HybridEngine(model, backend=backend, cuda_graphs=False)
    for _ in range(2):
        ours = generate(engine)
        assert engine.graphs is not None and engine.graphs.reason is None
        assert ours.stats.graph_steps == ours.stats.steps
        assert same(ours, generate(plain))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5).add_(0.01)
    held = torch.cuda.memory_allocated()
    for seed in range(3, 6):
        generate(engine, SamplingConfig(max_new_tokens=6, n=2, top_k=12, seed=seed))
    assert torch.cuda.memory_allocated() <= held + 2**20
