"""The contract with transformers: which versions, and what of them the adapters, the fused forward and its cache rely
on. `.ci/transformers` runs this file and the adapters' tests with the newest version that pip gives, or a given one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import dschat_kernels as dk
from dschat_kernels.models import source, versions
from tests.tiny_models import build

ROOT = Path(__file__).parent.parent


class TestRange:
    def test_the_installed_version_is_one_of_them(self) -> None:
        assert transformers.__version__ == versions.installed()
        ours = versions.minor(transformers.__version__)
        assert versions.minor(versions.FIRST) <= ours <= versions.minor(versions.LAST)

    def test_pip_is_asked_for_the_same_range(self) -> None:
        assert f'"{versions.requirement()}"' in (ROOT / "setup.py").read_text()

    @pytest.mark.parametrize("version", ["5.22.2", "4.57.6"])
    def test_older_is_refused(self, version: str) -> None:
        with pytest.raises(ImportError) as error:
            versions.check(version)
        assert str(error.value) == (
            f"transformers {version} is older than 5.23, the first that dschat's adapters know: "
            "run pip install 'transformers>=5.23,<5.25'"
        )

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("version", ["5.23.0", "5.24.7"])
    def test_known_is_silent(self, version: str) -> None:
        versions.check(version)

    def test_newer_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.warns(
            UserWarning, match=r"5.25.0.dev0 is newer than 5.24, .* stays with transformers and"
        ):
            versions.check("5.25.0.dev0")
        monkeypatch.setattr(versions, "broken_contract", lambda: ["the moon is gone"])
        with pytest.raises(ImportError, match=r"6.0.0 is newer than 5.24, .*, and the moon is gone: run pip"):
            versions.check("6.0.0")

    def test_it_is_checked_when_the_adapters_are_imported(self) -> None:
        code = (
            "import importlib.metadata as m; known = m.version; "
            "m.version = lambda name: '5.10.4' if name == 'transformers' else known(name); import dschat_kernels.models"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("ImportError: transformers 5.10.4 is older")


class TestContract:
    def test_holds(self) -> None:
        assert versions.broken_contract() == []

    def test_says_what_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, beams: None)
        assert versions.broken_contract() == [
            "cache_utils:DynamicCache.reorder_cache takes no beam_idx (it takes beams)"
        ]
        monkeypatch.setattr(transformers.pytorch_utils, "Conv1D", None)
        assert "pytorch_utils:Conv1D lacks itself" in versions.broken_contract()

    def test_every_place_of_the_pins_exists(self) -> None:
        missing = [
            v for hashes in source.reference_table().values() for v in hashes if v.startswith("no source")
        ]
        assert not missing

    def test_a_place_that_is_gone_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(source.SOURCES, "odd", ("llama:LlamaModel.backward", "llama:Odd.f since 9.9"))
        assert source.reference_table()["odd"] == {"no source: llama:LlamaModel.backward"}

    @torch.no_grad()
    def test_layers_are_called_as_the_adapters_assume(self) -> None:
        """cos and sin come as a pair, the mask and the cache by name; the layer gives hidden states."""
        model, seen = build("llama"), []
        hook: Any = lambda module, args, kwargs, output: seen.append((args, kwargs, output))  # noqa: E731
        model.model.layers[1].register_forward_hook(hook, with_kwargs=True)
        model(torch.arange(3, 12)[None])
        ((args, kwargs, output),) = seen
        assert len(args) == 1 and args[0].shape == output.shape == (1, 9, 48)
        assert {"attention_mask", "position_ids", "position_embeddings", versions.cache_name()} <= set(kwargs)
        assert [tuple(t.shape) for t in kwargs["position_embeddings"]] == [(1, 9, 12)] * 2
        assert isinstance(kwargs[versions.cache_name()], DynamicCache)

    def test_generate_calls_what_the_patch_replaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One cache for a generation, made before the first forward; no argument that sends a forward back."""
        from dschat_kernels.hf_generate import _KNOWN_ARGUMENTS, FusedForward

        calls: list[dict[str, Any]] = []
        forward = FusedForward.forward
        monkeypatch.setattr(FusedForward, "forward", lambda s, a: calls.append(dict(a)) or forward(s, a))
        with dk.patch(build("llama"), strict=True) as patch:
            patch.model.generate(
                torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False, eos_token_id=None
            )
            assert not patch.report().notes
        assert len(calls) == 3 and all(c[versions.cache_name()] is not None for c in calls)
        assert {name for c in calls for name, value in c.items() if value is not None} <= _KNOWN_ARGUMENTS

    @torch.no_grad()
    def test_the_old_name_of_the_cache_goes_on_working(self) -> None:
        model, tokens = build("llama"), torch.arange(3, 12)[None]
        with dk.patch(model, strict=True) as patch:
            whole = model(tokens).logits
            first = model(tokens[:, :6])
            rest = model(tokens[:, 6:], past_key_values=first.past_key_values)
            assert torch.equal(rest.logits, whole[:, 6:]) and not patch.report().notes


def test_the_script_for_other_versions_names_tests_that_exist() -> None:
    """And CI runs it with the newest version that pip gives."""
    text = (ROOT / ".ci" / "transformers").read_text()
    assert re.search(r"^\.ci/transformers \|\|", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    named = re.findall(r"tests/\w+\.py", text)
    assert "tests/test_transformers_versions.py" in named and all((ROOT / path).is_file() for path in named)
