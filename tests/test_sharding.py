"""Decoders in parts, every part in a thread of its own: the bits of the decoder in one piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dschat_kernels.models import decoder_spec
from dschat_kernels.models.spec import Unsupported
from dschat_kernels.plan import Decoder
from dschat_kernels.sharding import part_of, pieces, sharded_decoder
from tests.test_packing import lora
from tests.tiny_models import MECHANISMS, build, stories

REFUSED = {
    "mistral": "1 key and value heads, which 2 processes cannot share alike: set inference_tp_size to 1",
    "falcon": "1 key and value heads, which 2 processes cannot share alike: set inference_tp_size to 1",
    "olmo2": r"the norm of q in model.layers.0 spans the heads, .* leave inference_tp_size at 1",
    "cohere": r"the norm of q in model.layers.0 has a weight for every head, .* leave inference_tp_size at 1",
    "stablelm": r"the norm of q in model.layers.0 has a weight for every head, .* leave inference_tp_size at 1",
}


class Parts:
    """Decoders of all parts of a model; each works in a thread."""

    def __init__(self, model: Any, parts: int, **options: Any):
        self.parts, self.barrier = parts, threading.Barrier(parts, timeout=60)
        self.box: list[Any] = [None] * parts
        spec = decoder_spec(model)
        self.decoders = [sharded_decoder(spec, i, parts, self.gatherer(i), **options) for i in range(parts)]
        for decoder in self.decoders:
            decoder.refresh()

    def gatherer(self, part: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
        def gather(own: Tensor, widths: Sequence[int]) -> Tensor:
            assert own.shape[1] == widths[part] and len(widths) == self.parts
            self.box[part] = own.clone()
            self.barrier.wait()
            found = torch.cat(self.box, dim=1)
            self.barrier.wait()
            return found

        return gather

    def each(self, work: Callable[[Decoder], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.parts) as pool:
            return list(pool.map(work, self.decoders))


def generate(decoder: Decoder) -> list[Tensor]:
    """Logits of a ragged prefill and of steps of single tokens after it."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(decoder.spec.vocab_size, (n,), generator=generator) for n in (5, 1, 19)]
    cache = decoder.new_cache(3, 24)
    found = [decoder.step(torch.cat(rows), cache, range(3), [len(r) for r in rows], "all")]
    for _ in range(3):
        tokens = torch.randint(decoder.spec.vocab_size, (3,), generator=generator)
        found.append(decoder.step(tokens, cache, [2, 0, 1]))
    return found


def check(model: Any, parts: int, **options: Any) -> Parts:
    whole = Decoder(decoder_spec(model), **options)
    whole.refresh()
    expected = generate(whole)
    made = Parts(model, parts, **options)
    for found in made.each(generate):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in REFUSED])
def test_every_mechanism_has_the_bits_of_one_piece(name: str, dtype: torch.dtype) -> None:
    check(build(name).to(dtype), 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=REFUSED[name]):
        part_of(decoder_spec(build(name)), 0, 2)


@pytest.mark.parametrize("how", [{"weights": "int8"}, {"weights": "int8_dynamic"}, {"kv_cache": "int8"}])
def test_quantised(how: dict[str, str]) -> None:
    check(stories(), 4, **how)


def test_lora_is_fused_in_parts_and_follows_training() -> None:
    model = lora(stories())
    made = check(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    whole = Decoder(decoder_spec(model))
    whole.refresh()
    expected = generate(whole)
    stale = made.each(generate)[0]
    for decoder in made.decoders:
        decoder.refresh()
    for found in made.each(generate):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(stale[0], expected[0])


def test_a_part_holds_its_share_of_the_layers() -> None:
    """Layers and head are divided, evenly or nearly; nothing else is packed."""
    whole = Decoder(decoder_spec(stories()))
    whole.refresh()
    parts = Parts(stories(), 2).decoders
    assert all(
        0.5 <= d.packed_bytes / whole.packed_bytes < 0.6 for d in parts
    )  # panels are padded to 32 columns
    cache = [d.new_cache(2, 10) for d in (whole, parts[0])]
    assert cache[0].bytes_per_page == 2 * cache[1].bytes_per_page


def test_pieces() -> None:
    assert pieces(7, 3) == [3, 2, 2] and pieces(2, 3) == [1, 1, 0]


def test_heads_that_cannot_be_shared() -> None:
    spec = decoder_spec(build("llama"))
    with pytest.raises(
        Unsupported,
        match="has 4 attention heads, which 3 processes cannot share alike: set inference_tp_size to 2",
    ):
        part_of(spec, 0, 3)
