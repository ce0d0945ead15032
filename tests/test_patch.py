"""patch, report, undo: one instance, every piece, no trace; training gives the gradients of transformers."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import MECHANISMS, build, randomise
from torch import nn

import dschat_kernels as dk
from dschat_kernels.models import Unsupported, decoder_spec
from dschat_kernels.patch import Patch
from dschat_kernels.plan import Decoder
from dschat_kernels.report import Entry
from tests.helpers import cuda_refusal


def batch(vocab: int = 67) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocab, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :7] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could have left behind: classes, instance attributes, configs, weights."""
    return {
        name: (
            type(module),
            {key: value for key, value in vars(module).items() if not isinstance(value, dict)},
            {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)},
            module.config.to_dict() if hasattr(module, "config") else None,
        )
        for name, module in model.named_modules()
    }


def loss_and_grads(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), **grads}


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(float(value.detach().abs().max()), 1e-3)
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * scale, msg=name)


class TestUndo:
    @pytest.mark.parametrize("name", MECHANISMS)
    @torch.no_grad()
    def test_leaves_no_trace(self, name: str) -> None:
        model, inputs = build(name), batch()
        before, logits = snapshot(model), model(**inputs, use_cache=False).logits
        text, keys = repr(model), list(model.state_dict())
        tokens = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        patch = dk.patch(model)
        assert patch.active and any(type(m) is not before[n][0] for n, m in model.named_modules())
        assert repr(model) == text and list(model.state_dict()) == keys
        model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        patch.undo()
        patch.undo()
        assert not patch.active
        assert snapshot(model) == before
        assert torch.equal(model(**inputs, use_cache=False).logits, logits)
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), tokens)

    def test_context_manager(self) -> None:
        model = build("llama")
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError), dk.patch(model) as patch:
            assert patch.active
            _ = 1 / 0
        assert not patch.active and snapshot(model) == before

    def test_two_patches_in_any_order(self) -> None:
        """A trunk patched by itself, then the model around it."""
        for first_out in (0, 1):
            model = build("llama")
            before = snapshot(model)
            patches = [dk.patch(model.model), dk.patch(model)]
            assert patches[0] is not patches[1]
            assert any("another patch" in e.reason for e in patches[1].report().entries)
            patches[first_out].undo()
            patches[1 - first_out].undo()
            assert snapshot(model) == before

    def test_a_class_that_changed_meanwhile(self) -> None:
        model = build("llama")
        patch = dk.patch(model)
        norm = model.model.norm
        ours = type(norm)
        norm.__class__ = type("Wrapped", (ours,), {})
        with pytest.raises(RuntimeError, match=r"LlamaRMSNorm was changed after the patch.*Wrapped"):
            patch.undo()
        norm.__class__ = ours
        patch.undo()

    def test_other_models_stay(self) -> None:
        """Two models of one config, one patched."""
        one = build("llama")
        two = transformers.LlamaForCausalLM(one.config).eval()
        before = snapshot(two)
        assert one.config is two.config
        config = copy.deepcopy(one.config.to_dict())
        with dk.patch(one):
            one.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
            assert snapshot(two) == before
            assert one.config.to_dict() == config
            assert type(two.model.norm) is not type(one.model.norm)


class TestIdempotence:
    def test_same_patch(self) -> None:
        model = build("llama")
        patch = dk.patch(model)
        assert dk.patch(model) is patch
        assert dk.patch(model, backend="cpu") is patch
        with pytest.raises(ValueError, match=r"already patched with backend 'cpu', not 'reference'; undo"):
            dk.patch(model, backend="reference")

    def test_nested_blocks(self) -> None:
        model = build("llama")
        with dk.patch(model) as outer:
            with dk.patch(model) as inner:
                assert inner is outer
            assert outer.active
        assert not outer.active

    def test_again_after_undo(self) -> None:
        model = build("gpt2")
        first = dk.patch(model)
        first.undo()
        second = dk.patch(model)
        assert second is not first and second.active
        second.undo()

    def test_through_peft(self) -> None:
        model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        assert dk.patch(model) is dk.patch(model.get_base_model())


class TestPieces:
    """Each patched module gives what its original gave, to rounding."""

    @pytest.mark.parametrize("name", [*MECHANISMS, "phi3", "llama-mha-gelu", "gpt2-options"])
    @torch.no_grad()
    def test_forward(self, name: str) -> None:
        model, inputs = build(name), batch()
        theirs = model(**inputs, use_cache=False).logits
        with dk.patch(model):
            ours = model(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))

    def test_kernels_are_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, inputs = build("llama"), batch()
        calls: list[str] = []
        with dk.patch(model), torch.no_grad():
            import torch.utils._python_dispatch as dispatch

            class Log(dispatch.TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                    calls.append(str(func))
                    return func(*args, **(kwargs or {}))

            with Log():
                model(**inputs, use_cache=False)
        assert sum("dschat.rms_norm" in c for c in calls) == 7
        assert sum("dschat.gated_act" in c for c in calls) == 3

    def test_gemma_norms_in_an_unsupported_model(self) -> None:
        config = transformers.GemmaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.GemmaForCausalLM(config).eval()
        randomise(model, 0)

        class Odd(nn.Linear):
            pass

        model.model.layers[1].self_attn.k_proj.__class__ = Odd
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            theirs = model(ids).logits
            greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
            patch = dk.patch(model)
            ours = model(ids).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
            assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), greedy)
        report = patch.report()
        assert "model.layers.1.self_attn.k_proj" in report.decoder and "Odd" in report.decoder
        assert {e.op for e in report.entries if e.status == "patched"} == {"rms_norm", "gated_act"}
        with pytest.raises(Unsupported, match=r"k_proj is a .*Odd, and only nn\.Linear"):
            patch.undo()
            dk.patch(model, strict=True)
        assert not hasattr(type(model.model.norm), "_dschat_original")

    @torch.no_grad()
    def test_autocast_runs_the_original(self) -> None:
        model, inputs = build("llama"), batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = model(**inputs, use_cache=False).logits
            with dk.patch(model):
                assert torch.equal(model(**inputs, use_cache=False).logits, theirs)
                assert torch.equal(model(**inputs).logits, theirs)

    @torch.no_grad()
    @pytest.mark.filterwarnings("ignore:patch. the cpu backend has float32")
    def test_other_dtypes_are_left(self) -> None:
        model, inputs = build("llama").double(), batch()
        theirs = model(**inputs).logits
        with dk.patch(model) as patch:
            assert torch.equal(model(**inputs).logits, theirs)
            report = patch.report()
        assert report.count("patched") == 0 and "torch.float64" in report.decoder
        assert "torch.float64" in next(e.reason for e in report.entries if e.module == "model.norm")
        with pytest.raises(
            ValueError, match=r"the cpu backend has float32 and bfloat16, not float64; use backend"
        ):
            dk.patch(model, backend="cpu")

    @torch.no_grad()
    def test_bfloat16(self) -> None:
        """Twice as far from float32 as transformers itself, at most."""
        model, inputs = build("llama"), batch()
        real = inputs["attention_mask"].bool()
        exact = model(**inputs, use_cache=False).logits[real]
        model = model.bfloat16()
        theirs = model(**inputs, use_cache=False).logits[real]
        with dk.patch(model):
            ours, fused = (model(**inputs, use_cache=cached).logits[real] for cached in (False, True))
        assert ours.dtype == fused.dtype == torch.bfloat16
        bound = 2 * float((theirs - exact).abs().max())
        assert float((ours - exact).abs().max()) <= bound and float((fused - exact).abs().max()) <= bound

    def test_a_replaced_activation_is_respected(self) -> None:
        model, x = build("llama"), torch.randn(2, 48)
        mlp = model.model.layers[0].mlp
        with dk.patch(model):
            mlp.act_fn = nn.Tanh()
            expected = mlp.down_proj(torch.tanh(mlp.gate_proj(x)) * mlp.up_proj(x))
            assert torch.equal(mlp(x), expected)


class TestTraining:
    @pytest.mark.parametrize("name", [*MECHANISMS, "phi3"])
    def test_gradients(self, name: str) -> None:
        model, inputs = build(name).train(), batch()
        theirs = loss_and_grads(model, **inputs)
        with dk.patch(model):
            ours = loss_and_grads(model, **inputs)
        assert_same(ours, theirs)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_stays_on(self, name: str, reentrant: bool) -> None:
        model, inputs = build(name).train(), batch()
        theirs = loss_and_grads(model, **inputs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        layers = [
            m
            for m in model.modules()
            if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)
        ]
        count = [0]
        for layer in layers:
            next(m for m in layer.modules() if "Attention" in type(m).__name__).register_forward_pre_hook(
                lambda *_: count.__setitem__(0, count[0] + 1)
            )
        with dk.patch(model):
            ours = loss_and_grads(model, **inputs)
        assert count[0] == 2 * len(layers)
        assert_same(ours, theirs)

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
    def test_lora(self, name: str, before: bool) -> None:
        config = LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
        inputs = batch()
        plain = get_peft_model(build(name), config)
        randomise(plain, 7)
        theirs = loss_and_grads(plain.train(), **inputs)
        assert theirs and all("lora" in n for n in theirs if n != "loss")
        base = build(name)
        if before:
            patch = dk.patch(base)
            model = get_peft_model(base, config)
        else:
            model = get_peft_model(base, config)
            patch = dk.patch(model)
        randomise(model, 7)
        assert_same(loss_and_grads(model.train(), **inputs), theirs)
        patch.undo()
        assert not any(hasattr(type(m), "_dschat_original") for m in model.modules())
        assert_same(loss_and_grads(model.train(), **inputs), theirs, 1e-7)

    def test_modules_to_save(self) -> None:
        inputs = batch()
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
        plain = get_peft_model(build("llama"), config)
        theirs = loss_and_grads(plain, **inputs)
        model = get_peft_model(build("llama"), config)
        model.load_state_dict(plain.state_dict())
        patch = dk.patch(model)
        assert_same(loss_and_grads(model, **inputs), theirs)
        assert "norm" in patch.report().decoder

    def test_a_training_step_moves_the_same(self) -> None:
        inputs, models = batch(), [build("llama").train(), build("llama").train()]
        dk.patch(models[1])
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(3):
                loss_and_grads(model, **inputs)
                optimizer.step()
        assert_same(dict(models[1].named_parameters()), dict(models[0].named_parameters()))


class TestCopies:
    @torch.no_grad()
    def test_deepcopy_is_plain(self) -> None:
        model, inputs = build("llama"), batch()
        theirs = model(**inputs, use_cache=False).logits
        with dk.patch(model):
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), self._saved(model)):
                assert not any(hasattr(type(m), "_dschat_original") for m in other.modules())
                assert torch.equal(other(**inputs, use_cache=False).logits, theirs)
                with dk.patch(other) as second:
                    assert second.model is other
                assert other.lm_head.weight is other.model.embed_tokens.weight
            assert hasattr(type(model.model.norm), "_dschat_original")

    @staticmethod
    def _saved(model: nn.Module) -> Any:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    def test_deepcopy_of_a_peft_model(self) -> None:
        model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        with dk.patch(model):
            other = copy.deepcopy(model)
        assert not any(hasattr(type(m), "_dschat_original") for m in other.modules())

    def test_pickle_loads_without_dschat(self, tmp_path: Path) -> None:
        model = build("llama")
        with dk.patch(model):
            torch.save(model, tmp_path / "model.pt")
        code = (
            "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
            "assert 'dschat_kernels' not in sys.modules; print(type(m).__name__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model.pt")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "LlamaForCausalLM"

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_state_dict_and_save_pretrained(self, name: str, tmp_path: Path) -> None:
        model = build(name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.save_pretrained(tmp_path / "plain")
        with dk.patch(model):
            after = model.state_dict()
            model.save_pretrained(tmp_path / "patched")
            model.load_state_dict(before)
        assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
        for file in sorted((tmp_path / "plain").iterdir()):
            assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes(), file.name


def patch_bytes(model: Any) -> int:
    """What a decoder of the model packs."""
    decoder = Decoder(decoder_spec(model))
    decoder.refresh()
    return decoder.packed_bytes


class TestReport:
    def test_names_every_module(self) -> None:
        model = build("llama")
        report = dk.patch(model).report()
        by_name = {e.module: e for e in report.entries}
        for name, module in model.named_modules():
            if name and not list(module.children()):
                assert name in by_name, name
        norm = Entry("model.norm", "LlamaRMSNorm", "patched", "rms_norm", "cpu", mechanism="norm.rms_llama")
        assert by_name["model.norm"] == replace(norm, read_bytes=48 * 4)
        assert by_name["model.layers.2.mlp"].op == "gated_act"
        assert by_name["model.layers.0.self_attn.q_proj"].status == "decoder"
        assert (report.decoder, report.model) == ("fused decoder (cpu)", "LlamaForCausalLM")

    def test_text(self) -> None:
        text = str(dk.patch(build("gpt2")).report())
        lines = text.splitlines()
        assert lines[0] == "GPT2LMHeadModel: patched, backend cpu"
        (row,) = (line.split() for line in lines if line.startswith("transformer.h.*.ln_1 "))
        size = ["1.15", "kB"]  # 3 layers, weight and bias of 48 floats
        assert row == ["transformer.h.*.ln_1", "3", "LayerNorm", "-", "patched", *size, "layer_norm", "(cpu)"]
        assert len(lines) < 20

    def test_mechanisms_and_costs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dschat_kernels.report.known_bandwidth", lambda: None)
        model = build("gemma3", tie_word_embeddings=False)
        with dk.patch(model, strict=True) as patch:
            before = patch.report()
            assert before.pack_bytes == 0 and before.decode_ms is None
            assert "packs: made at the first generation" in str(before)
            model.generate(torch.tensor([[1, 5]]), max_new_tokens=2, do_sample=False)
            monkeypatch.setattr("dschat_kernels.report.read_bandwidth", lambda: 2e6)
            report = patch.report(measure=True)
        by_name = {e.module: e for e in report.entries}
        attention = by_name["model.layers.1.self_attn"]
        assert (attention.mechanism, attention.status) == ("attention.norm_heads", "decoder")
        assert by_name["model.layers.0.input_layernorm"].mechanism == "norm.rms_gemma"
        decoder_bytes = patch_bytes(model)
        assert report.pack_bytes == pytest.approx(decoder_bytes, rel=0.01)
        weights = sum(p.numel() * 4 for n, p in model.named_parameters() if "embed" not in n)
        assert weights <= report.read_bytes <= 3 * weights  # panels of 32 columns round small weights up
        assert report.decode_ms == pytest.approx(report.read_bytes / 2e3)
        assert f"{report.decode_ms:.3g} ms a token at 0.0 GB/s" in str(report)
        data = json.loads(json.dumps(report.to_dict()))
        assert data["decode_ms"] == report.decode_ms and data["pack_bytes"] == report.pack_bytes

    def test_every_module_of_a_fused_decoder_has_its_share(self) -> None:
        """Fused projections count once; what is read adds up to the packs, the norms and a row of the embedding."""
        for name in ("neox", "bloom", "phi3", "gpt2"):
            model = build(name, tie_word_embeddings=False)
            with dk.patch(model, strict=True) as patch:
                report = patch.report()
                weights = sum(p.numel() * 4 for n, p in model.named_parameters() if p.dim() == 2)
                tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
                weights -= sum((m.num_embeddings - 1) * m.embedding_dim * 4 for m in tables)
                norms = sum(4 * t.numel() for n in patch.fused.decoder.spec.norms() for t in n.sources())
                assert report.read_bytes == weights + norms

    def test_rich_table(self) -> None:
        rich = pytest.importorskip("rich.console")
        model = build("olmo2")
        model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
        console = rich.Console(width=200, record=True, file=io.StringIO())
        console.print(dk.patch(model).report())
        text = console.export_text()
        assert "attention.norm_full" in text and "instance-level forward" in text and "Olmo2RMSNorm" in text

    def test_dict_is_json(self) -> None:
        patch = dk.patch(build("opt"))
        patch._note("a note")
        data = json.loads(json.dumps(patch.report().to_dict()))
        assert data["active"] and data["notes"] == ["a note"]
        fields = {
            "module",
            "kind",
            "status",
            "op",
            "backend",
            "reason",
            "mechanism",
            "pack_bytes",
            "read_bytes",
        }
        assert fields == set(data["entries"][0])
        assert "note: a note" in str(patch.report())

    def test_after_undo(self) -> None:
        patch = dk.patch(build("opt"))
        patch.undo()
        assert "patch undone" in str(patch.report()) and "undone" in repr(patch)

    def test_says_why_left(self) -> None:
        model = build("llama")
        norm = model.model.layers[1].input_layernorm
        norm.forward = norm.forward
        report = dk.patch(model).report()
        (entry,) = (e for e in report.entries if e.module == "model.layers.1.input_layernorm")
        assert entry.status == "left" and "instance-level forward" in entry.reason
        assert "model.layers.1.input_layernorm" in report.decoder

    def test_quantised_linear_is_left_alone(self) -> None:
        class Linear8bit(nn.Linear):
            pass

        model = build("llama")
        q = model.model.layers[0].self_attn.q_proj
        q.__class__ = Linear8bit
        with dk.patch(model) as patch:
            assert type(q) is Linear8bit
            report = patch.report()
        assert "q_proj" in report.decoder and "Linear8bit" in report.decoder
        assert report.count("patched") == 10

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @torch.no_grad()
    def test_weights_that_torch_quantised(self) -> None:
        """They go on as they were, in every layer, and the norms around them are fused."""
        model = torch.ao.quantization.quantize_dynamic(build("llama"), {nn.Linear})
        inputs = batch()
        theirs = model(**inputs).logits
        kinds = [type(module) for module in model.modules()]
        with dk.patch(model) as patch:
            assert "quantised and wrapped linears stay with HF" in patch.report().decoder
            assert patch.report().count("patched") == 10
            torch.testing.assert_close(model(**inputs).logits, theirs, rtol=1e-3, atol=1e-3)
        assert [type(module) for module in model.modules()] == kinds

    def test_headless_models(self) -> None:
        trunk = build("llama", auto=transformers.AutoModel)
        with dk.patch(trunk, strict=True) as patch:
            assert "no language-model head" in patch.report().decoder
            assert patch.report().count("patched") == 10
        classifier = build("gpt2", auto=transformers.AutoModelForSequenceClassification, num_labels=1)
        with dk.patch(classifier, strict=True) as patch:
            assert "no language-model head" in patch.report().decoder

    def test_plain_module(self) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))
        x = torch.randn(4, 8)
        theirs = net(x)
        with dk.patch(net) as patch:
            torch.testing.assert_close(net(x), theirs)
            assert patch.report().count("patched") == 2
            assert "no transformers model" in patch.report().decoder
        assert torch.equal(net(x), theirs) and type(net[2]) is nn.LayerNorm


class TestBadInput:
    def test_not_a_module(self) -> None:
        with pytest.raises(TypeError, match=r"patch got a str; give it a torch.nn.Module"):
            dk.patch("gpt2")  # type: ignore[arg-type]

    def test_use_kernels(self) -> None:
        model = build("llama")
        model._use_kernels = True
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"use_kernels=True.*use_kernels=False"):
            dk.patch(model)
        assert snapshot(model) == before

    @pytest.mark.parametrize(
        "backend, error", [("triton", ValueError), ("cuda", None), ("fastest", ValueError)]
    )
    def test_backends(self, backend: str, error: type[Exception] | None) -> None:
        model = build("llama")
        before = snapshot(model)
        with pytest.raises(error or cuda_refusal()[0], match=backend):
            dk.patch(model, backend=backend)
        assert snapshot(model) == before

    def test_strict(self) -> None:
        model = build("llama", hidden_act="mish")
        before = snapshot(model)
        with pytest.raises(Unsupported, match=r"model.layers.0.mlp.act_fn is MishActivation"):
            dk.patch(model, strict=True)
        assert snapshot(model) == before
        with dk.patch(model) as patch:
            entries = {e.module: e for e in patch.report().entries}
            assert "MishActivation" in entries["model.layers.0.mlp"].reason
            assert entries["model.norm"].status == "patched"

    def test_failure_half_way_is_rolled_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("llama")
        before = snapshot(model)
        monkeypatch.setattr(Patch, "_left", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dk.patch(model)
        assert snapshot(model) == before
