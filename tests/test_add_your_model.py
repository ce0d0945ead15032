"""docs/add_your_model.md does what it says: a family with a mechanism of its own, from refusal to certificate."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dschat
import dschat_kernels as dk
from dschat_kernels.models import Unsupported, attention, decoder_spec, layers, mlp, source, trunk
from tests.test_random_models import check
from tests.tiny_models import randomise

PAGE = (Path(__file__).parent.parent / "docs" / "add_your_model.md").read_text()
TABLES = (
    source.KNOWN,
    attention.READERS,
    mlp.PLAIN,
    layers.BODIES,
    layers.NORMS,
    layers.FIELDS,
    trunk.TRUNKS,
)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports the page's files by name; takes everything back afterwards."""
    files = dict(re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = [{k: set(v) if isinstance(v, set) else v for k, v in table.items()} for table in TABLES]
    yield importlib.import_module
    for table, old in zip(TABLES, before, strict=True):
        table.clear()
        table.update(old)  # type: ignore[arg-type]
    source._by_hash.cache_clear()
    for name in files:
        sys.modules.pop(name, None)


def test_the_page(page: Any) -> None:
    mine = page("my_model")
    torch.manual_seed(0)
    config = mine.TideConfig(attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = mine.TideForCausalLM(config).eval()
    randomise(model, 0)
    with dk.patch(model) as patch:
        reason = patch.report().decoder
        assert "TideModel (model_type='tide') is built in a way that no adapter covers exactly" in reason
        assert reason.split(": ", 1)[1] in " ".join(PAGE.split())
    page("my_adapter")
    spec = decoder_spec(model)
    assert spec.alibi == (0.5, 0.25, 0.125, 0.0625) and spec.layers[1].order == "parallel"
    check(model)
    certificate = dschat.verify(model, max_new_tokens=4)
    assert certificate.passed, str(certificate)

    class Changed(mine.TideAttention):  # type: ignore[name-defined,misc]
        def forward(self, hidden_states: Any, mask: Any, cache: Any) -> Any:
            return 2 * super().forward(hidden_states, mask, cache)

    model.model.layers[1].attention.__class__ = Changed
    with pytest.raises(
        Unsupported, match=r"model.layers.1.attention \(Changed\) computes attention in a way"
    ):
        dk.patch(model, strict=True)


def test_what_cannot_be_pinned() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    with pytest.raises(
        ValueError, match=r"LlamaMLP.forward is pinned as 'mlp.gated' already, so it cannot be 'mine'"
    ):
        source.pin("mine", LlamaMLP.forward)
    with pytest.raises(ValueError, match=r"its source is not at hand"):
        source.pin("mine", len)
    assert "mine" not in source.KNOWN
