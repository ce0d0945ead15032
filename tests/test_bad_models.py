"""Bad input to patched and fused models: what exactly happens, in one sentence, before anything has changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from dschat.cli import vocabulary_gap
from dschat_kernels.models import Unsupported, decoder_spec, versions
from tests.tiny_models import STORIES, build

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


def encoder_decoder() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    return transformers.T5ForConditionalGeneration(config)


def multimodal() -> Any:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def on_meta() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32))


class TestModels:
    def test_encoder_decoder(self) -> None:
        said = "config.is_encoder_decoder=True: T5ForConditionalGeneration is not a decoder-only model"
        assert said in reason(encoder_decoder())

    def test_multimodal(self) -> None:
        said = reason(multimodal())
        assert "config.vision_config is set: Gemma3ForConditionalGeneration takes more than text" in said

    def test_meta_weights(self) -> None:
        with pytest.raises(Unsupported, match="some weights are on the meta device; load them before fusing"):
            decoder_spec(on_meta())

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


# ------------------------------------------------------------------------------------------------- docs/bad_input.md

PAGE = Path(__file__).parent.parent / "docs" / "bad_input.md"
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


def raised(call: Callable[[], Any]) -> str:
    """Kind and sentence of what a call raises."""
    with pytest.raises(Exception) as error:
        call()
    assert "\n" not in str(error.value)
    return f"{error.type.__name__}: {error.value}"


def refused(model: Any) -> str:
    """What patch, its strict form and the engine say of a model."""
    said = reason(model)
    assert raised(lambda: HybridEngine(model)) == f"Unsupported: {said}"
    return said


def patched(run: Callable[[Any], torch.Tensor], name: str = "llama", **options: Any) -> str:
    """The notes of a run that gives what it gives without a patch."""
    theirs = run(build(name, **options))
    with dk.patch(build(name, **options), strict=True) as patch:
        torch.testing.assert_close(run(patch.model).float(), theirs.float(), rtol=2e-4, atol=2e-3)
        return "; ".join(patch.report().notes)


def generated(*prompt: torch.Tensor, **inputs: Any) -> Callable[[Any], torch.Tensor]:
    return lambda model: model.generate(*prompt, **inputs, **NEVER)


@torch.no_grad()
def logits(
    model: Any, *tokens: torch.Tensor, seen: torch.Tensor | None = None, **inputs: Any
) -> torch.Tensor:
    out = model(*tokens, **inputs).logits
    return out if seen is None else out[seen.bool()]


def one_dtype_less() -> Any:
    model = build("gemma3")
    model.model.layers[1].self_attn.q_norm.to(torch.bfloat16)
    return model


def offloaded() -> Any:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("gemma3")
    hooks.add_hook_to_module(model.model.layers[1].mlp.down_proj, hooks.ModelHook())
    return model


def rewritten() -> Any:
    model = build("llama")
    model._use_kernels = True
    return model


def dora() -> str:
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    said = reason(model)
    assert "self_attn.q_proj: " in said and dk.patch(model).report().count("patched") >= 7
    return said


def versions_() -> str:
    with pytest.warns(UserWarning, match="a decoder whose code changed stays with transformers"):
        versions.check("5.99.0")
    return raised(lambda: versions.check("5.1.0"))


def larger_tokenizer() -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    assert "the tokenizer has ids up to 511 and the model embeds 67" in vocabulary_gap(
        build("llama"), tokenizer
    )
    return raised(lambda: HybridEngine(build("llama")).generate(torch.tensor([[300]])))


def past_rotary() -> str:
    assert patched(generated(ids(1, 126)), "qwen3") == ""
    return raised(lambda: HybridEngine(build("qwen3")).generate(ids(1, 126), None, SamplingConfig(5)))


def past_dynamic() -> str:
    for name, columns in (("llama-dynamic", 125), ("phi3-longrope", 62)):
        assert "depend on the longest row of the batch" in patched(generated(ids(1, columns)), name)
    return raised(lambda: HybridEngine(build("llama-dynamic")).generate(ids(1, 126), None, SamplingConfig(5)))


def padding() -> str:
    for mask in (MASK, MASK.flip(1)):
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        assert patched(lambda m, i=inputs: logits(m, ids(2), seen=i["attention_mask"], **i)) == ""  # type: ignore[misc]
        with dk.patch(build("llama")) as patch:
            assert not logits(patch.model, ids(2), seen=1 - mask, **inputs).any()
    return ""


def hole(name: str) -> str:
    mask = torch.ones_like(ids())
    mask[0, 2:4] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return patched(lambda m: logits(m, ids(), seen=mask, **inputs), name)


def holes() -> str:
    assert hole("gpt2") == ""
    return hole("mistral")


def ids_of_other_dtypes() -> str:
    assert patched(lambda m: logits(m, ids().int())) == ""
    theirs, model = raised(lambda: build("llama")(ids().float())), build("llama")
    with dk.patch(model, strict=True):
        assert raised(lambda: model(ids().float())) == theirs
    return ""


def nothing_but_padding() -> str:
    mask = torch.ones_like(ids(2))
    mask[1] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    assert "a row has no token at all" in patched(lambda m: logits(m, ids(2), **inputs)[:1])
    return raised(lambda: HybridEngine(build("llama")).generate(ids(2), mask))


def asked_for() -> str:
    mask = torch.full((1, 1, 9, 9), float("-inf")).triu(1)
    said = [
        patched(lambda m: logits(m, ids(), attention_mask=mask)),
        patched(lambda m: logits(m, inputs_embeds=m.get_input_embeddings()(ids()))),
        patched(lambda m: logits(m, ids(), output_hidden_states=True)),
        patched(lambda m: logits(m, ids(), output_attentions=True)),
    ]
    words = ("attention_mask is not 2-D", "inputs_embeds", "output_hidden_states", "output_attentions")
    assert all(word in note for word, note in zip(words, said, strict=True)), said
    return ""


def other_ways_to_run() -> str:
    """Kernels of the patched modules run with gradients, transformers' originals under autocast."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[str] = []

    def norms() -> int:
        return sum("dschat.rms_norm" in name for name in calls)

    def under_autocast(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids()).logits.detach()

    def hooked(model: Any) -> torch.Tensor:
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: 2 * output)
        with torch.no_grad():
            out = model(ids()).logits
        handle.remove()
        return out

    with Count():
        assert patched(lambda m: m(ids()).logits.detach()) == "" and norms() == 7
        assert patched(under_autocast) == "" and norms() == 7
        assert "model.layers.1 has a forward hook" in patched(hooked) and norms() == 14
    return ""


ROWS: dict[str, Callable[[], Any]] = {
    "encoder-decoder": lambda: refused(encoder_decoder()),
    "takes images or sound too": lambda: refused(multimodal()),
    "weights on the meta device": lambda: refused(on_meta()),
    "weights offloaded by accelerate": lambda: refused(offloaded()),
    "weights of two dtypes": lambda: refused(one_dtype_less()),
    "float16 or float64 on the CPU": lambda: (refused(build("phi").double()), refused(build("phi").half()))[
        1
    ],
    "loaded with `use_kernels=True`": lambda: raised(lambda: dk.patch(rewritten())),
    "DoRA, other variants of LoRA, quantised linears": dora,
    "no transformers model": lambda: refused(torch.nn.Linear(2, 2)),
    "transformers older than the supported range": versions_,
    "a token id outside the vocabulary": lambda: raised(
        lambda: logits(dk.patch(build("llama")).model, torch.tensor([[3, 67]]))
    ),
    "a tokenizer with more ids than the model embeds": larger_tokenizer,
    "learned positions past their end": lambda: raised(
        lambda: logits(dk.patch(build("gpt2")).model, ids(1, 129))
    ),
    "rotary positions past the trained context": past_rotary,
    "dynamic or longrope positions past where they change": past_dynamic,
    "left padding, right padding in a forward": padding,
    "right padding in `generate`": lambda: patched(generated(ids(2), attention_mask=MASK.flip(1))),
    "a mask with holes": holes,
    "`position_ids` that do not count the mask's tokens": lambda: patched(
        lambda m: logits(m, ids(), position_ids=torch.arange(3, 12)[None])
    ),
    "a padded batch without `position_ids`": lambda: patched(
        lambda m: logits(m, ids(2), seen=MASK, attention_mask=MASK), "gpt2"
    ),
    "a pad token equal to eos": lambda: TestInputs().test_pad_equal_to_eos(),
    "`input_ids` int32": ids_of_other_dtypes,
    "a row of nothing but padding": nothing_but_padding,
    "a 4-D mask, `inputs_embeds`, hidden states or attentions asked for": asked_for,
    "autocast, gradients, `torch.compile`, hooks on inner modules": other_ways_to_run,
}


def rows() -> dict[str, str]:
    """What the page says: given, and what happens."""
    page = PAGE.read_text().partition("## Runs")[0]  # tests/rlhf/test_bad_runs.py has those
    found = re.findall(r"^\| (.+?) \| (.+) \|$", page, re.MULTILINE)
    return {given: happens for given, happens in found if given not in ("given", "---")}


def test_the_page_has_the_rows_that_are_tested() -> None:
    assert list(rows()) == list(ROWS)


@pytest.mark.parametrize("given", ROWS)
def test_the_page(given: str) -> None:
    """Its sentences are those of the code; "..." stands for what depends on the model."""
    said = ROWS[given]() or ""
    for quoted in re.findall("`([^`]+)`", rows()[given]):
        if (" " in quoted and not quoted.startswith("dschat ")) or quoted.endswith("Error"):
            pattern = re.escape(quoted).replace(re.escape("..."), ".*")
            assert re.search(pattern, said), f"the page says {quoted!r} and the code {said!r}"
    if "with a note" in rows()[given] and said:
        assert said.startswith(("a forward ran", "generate ran")) or "Error" in said, said
