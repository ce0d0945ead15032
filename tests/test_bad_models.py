"""Bad input to patched and fused models: what exactly happens, in one sentence, before anything has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.models import Unsupported, decoder_spec
from tests.tiny_models import build

NEVER = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 5}


def ids(rows: int = 1, columns: int = 9) -> torch.Tensor:
    return torch.randint(3, 67, (rows, columns), generator=torch.Generator().manual_seed(1))


def reason(model: Any) -> str:
    """Why the decoder of `model` is not fused: strict refuses with it, the report says it."""
    with pytest.raises(Unsupported) as error:
        dk.patch(model, strict=True)
    with dk.patch(model) as patch:
        assert patch.report().decoder == f"transformers' own: {error.value}"
    assert "\n" not in str(error.value)
    return str(error.value)


class TestModels:
    def test_encoder_decoder(self) -> None:
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
        assert (
            "config.is_encoder_decoder=True: T5ForConditionalGeneration is not a decoder-only model"
            in reason(transformers.T5ForConditionalGeneration(config))
        )

    def test_multimodal(self) -> None:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}  # fmt: skip
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        said = reason(transformers.Gemma3ForConditionalGeneration(config))
        assert "config.vision_config is set: Gemma3ForConditionalGeneration takes more than text" in said

    def test_meta_weights(self) -> None:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32)
            )
        with pytest.raises(Unsupported, match="some weights are on the meta device; load them before fusing"):
            decoder_spec(model)

    def test_offloaded_weights(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = build("neox")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(Unsupported, match=r"meta device|instance-level forward \(accelerate"):
            decoder_spec(model)

    def test_one_module_with_a_device_hook(self) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        model = build("gemma3")
        hooks.add_hook_to_module(model.model.layers[1].mlp.down_proj, hooks.ModelHook())
        assert "model.layers.1.mlp.down_proj (Linear) carries an instance-level forward" in reason(model)

    @pytest.mark.parametrize(
        ("name", "place"),
        [("gemma3", "model.layers.1.self_attn.q_norm"), ("bloom", "transformer.h.1.mlp.dense_h_to_4h")],
    )
    def test_weights_of_two_dtypes(self, name: str, place: str) -> None:
        model = build(name)
        model.get_submodule(place).to(torch.bfloat16)
        assert (
            "has dtype torch.bfloat16 and the embedding torch.float32: cast the model to one dtype"
            in reason(model)
        )

    def test_float16(self) -> None:
        assert "dtype is torch.float16: the fused decoder runs float32 and bfloat16" in reason(
            build("phi").half()
        )


class TestInputs:
    @pytest.mark.parametrize("name", ["gemma3", "bloom", "falcon-new", "gpt-neo"])
    @torch.no_grad()
    def test_a_token_outside_the_vocabulary(self, name: str) -> None:
        model = build(name)
        with dk.patch(model, strict=True) as patch:
            with pytest.raises(
                ValueError, match="token id 67 is outside the vocabulary of 67: check the tokenizer"
            ):
                model(torch.tensor([[3, 67]]))
            assert patch.active and model(ids()).logits.shape == (1, 9, 67)

    def test_positions_past_the_context(self) -> None:
        """Learned positions end; rotary ones go on as transformers' do."""
        with dk.patch(build("gpt-neo"), strict=True) as patch, torch.no_grad():
            with pytest.raises(
                ValueError, match="would reach 129 tokens and the model has 128 positions: shorten"
            ):
                patch.model(ids(1, 129))
        model = build("qwen3")
        theirs = model.generate(ids(1, 126), **NEVER)
        with dk.patch(model, strict=True) as patch:
            assert torch.equal(model.generate(ids(1, 126), **NEVER), theirs)
            assert not patch.report().notes

    def test_an_engine_says_it_before_it_generates(self) -> None:
        for name, context in (("llama-dynamic", 127), ("phi3-longrope", 64), ("gptj", 128)):
            engine = HybridEngine(build(name))
            message = rf"prompt 0 has 60 tokens and max_new_tokens is 80, more than the model's context of {context}"
            with pytest.raises(ValueError, match=message):
                engine.generate(ids(1, 60), None, SamplingConfig(max_new_tokens=80))

    @pytest.mark.parametrize("name", ["gemma3", "bloom", "neox", "cohere", "falcon"])
    @torch.no_grad()
    def test_masks(self, name: str) -> None:
        """Left and right padding are dropped; a hole is as transformers has it, whoever computes it."""
        model, tokens = build(name), ids(2, 9)
        right = torch.ones_like(tokens)
        right[1, 5:] = 0
        hole = torch.ones_like(tokens)
        hole[0, 2:4] = 0
        for mask in (right, right.flip(1), hole):
            arguments: dict[str, Any] = {"attention_mask": mask}
            if name != "bloom":
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
            theirs = model(tokens, **arguments).logits
            with dk.patch(model, strict=True):
                ours = model(tokens, **arguments).logits
            real = mask.bool()
            torch.testing.assert_close(
                ours[real], theirs[real], rtol=2e-4, atol=2e-4 * float(theirs.abs().max())
            )

    @torch.no_grad()
    def test_a_row_of_nothing_but_padding(self) -> None:
        """transformers' own forward computes it; the engine refuses an empty prompt."""
        model, tokens = build("qwen3"), ids(2, 7)
        mask = torch.ones_like(tokens)
        mask[1] = 0
        arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        theirs = model(tokens, **arguments).logits
        with dk.patch(model, strict=True) as patch:
            torch.testing.assert_close(model(tokens, **arguments).logits[0], theirs[0], rtol=2e-4, atol=2e-3)
            assert "a row has no token at all" in patch.report().notes[0]
        with pytest.raises(
            ValueError, match="row 1 of the batch has no token: its attention mask is all zero"
        ):
            HybridEngine(model).generate(tokens, mask)

    def test_a_tokenizer_of_another_model(self) -> None:
        """Before a token is generated."""
        with pytest.raises(
            ValueError, match="prompt 1 holds token 300, outside the vocabulary of 67: check the tok"
        ):
            HybridEngine(build("gemma3")).generate(torch.tensor([[3, 4], [3, 300]]), None, SamplingConfig(4))

    def test_pad_equal_to_eos(self) -> None:
        """A prompt full of eos is no padding unless the mask says so."""
        model, tokens = build("qwen3"), ids(2, 7)
        tokens[0, :3] = 2
        mask = (tokens != 2).long()
        options = {"eos_token_id": 2, "pad_token_id": 2, "do_sample": False, "max_new_tokens": 6}
        for inputs in ({}, {"attention_mask": mask}):
            theirs = model.generate(tokens, **inputs, **options)
            with dk.patch(model, strict=True) as patch:
                assert torch.equal(model.generate(tokens, **inputs, **options), theirs)
                assert not patch.report().notes

    @torch.no_grad()
    def test_ids_of_other_dtypes(self) -> None:
        model = build("olmo2")
        with dk.patch(model, strict=True) as patch:
            expected = model(ids()).logits
            assert torch.equal(model(ids().int()).logits, expected)
            with pytest.raises((RuntimeError, TypeError, IndexError)):
                model(ids().float())  # transformers' own error
            assert "input_ids is torch.float32 on cpu" in patch.report().notes[-1]

    @torch.no_grad()
    def test_nothing_changes(self) -> None:
        model = build("bloom")
        before = copy.deepcopy(model.state_dict())
        with dk.patch(model, strict=True), pytest.raises(ValueError, match="outside the vocabulary"):
            model(torch.tensor([[3, 99]]))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
