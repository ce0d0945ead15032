"""Specs say what models are: a plain walk of a spec reproduces HF; what is not covered exactly is refused
with a reason."""

from __future__ import annotations

import ast
import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from spec_walk import walk
from tiny_models import CONFIGS, build, randomise, stories
from torch import nn

from dschat_kernels.models import Unsupported, decoder_spec, source


def ids(length: int = 23, vocab: int = 67, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_spec_walk_equals_hf(name: str) -> None:
    model, tokens = build(name), ids()
    implementations = ["eager", *(["sdpa"] if type(model)._supports_sdpa else [])]
    for implementation in implementations:
        model.set_attn_implementation(implementation)
        close(walk(decoder_spec(model), tokens), model(tokens[None]).logits[0])


@torch.no_grad()
def test_spec_walk_equals_hf_on_real_weights() -> None:
    model = stories()
    tokens = ids(64, 512)
    ours, theirs = walk(decoder_spec(model), tokens), model(tokens[None]).logits[0]
    close(ours, theirs)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
@torch.no_grad()
def test_trunk_and_classifier(name: str) -> None:
    tokens = ids()
    trunk = build(name, auto=transformers.AutoModel)
    spec = decoder_spec(trunk)
    assert spec.lm_head is None
    close(walk(spec, tokens), trunk(tokens[None]).last_hidden_state[0])

    classifier = build(name, auto=transformers.AutoModelForSequenceClassification, num_labels=1)
    spec = decoder_spec(classifier)
    assert spec.lm_head is None
    close(classifier.score(walk(spec, tokens)[-1:]), classifier(tokens[None]).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_peft_lora(name: str) -> None:
    model = get_peft_model(build(name), LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.1))
    randomise(model, 5)
    model.eval()
    spec, tokens = decoder_spec(model), ids()
    close(walk(spec, tokens), model(input_ids=tokens[None]).logits[0])
    assert hasattr(spec.layers[0].q.module, "lora_A")
    assert spec.layers[0].name.startswith("base_model.model.")
    assert spec.dropout and all(p == 0.1 and "lora_dropout" in place for place, p in spec.dropout.items())


def test_names_find_the_modules() -> None:
    model = build("opt-350m")
    spec = decoder_spec(model)
    assert all(model.get_submodule(layer.name) is layer.module for layer in spec.layers)
    assert spec.trunk is model.model.decoder


def test_window_and_sizes() -> None:
    assert [layer.window for layer in decoder_spec(build("mistral")).layers] == [7, 7, 7]
    assert [layer.window for layer in decoder_spec(build("qwen2-window")).layers] == [None, 6, 6]
    spec = decoder_spec(build("opt"))
    assert (spec.position_offset, spec.max_positions) == (2, 128)
    spec = decoder_spec(build("phi3"))
    assert (spec.ropes()[0].rotary_dim, spec.head_dim) == (6, 12)


def test_dropout_is_recorded() -> None:
    spec = decoder_spec(build("gpt2", attn_pdrop=0.2, embd_pdrop=0.1))
    assert spec.dropout["transformer.h.1.attn.attn_dropout"] == 0.2
    assert spec.dropout["transformer.drop"] == 0.1
    assert not decoder_spec(build("gpt2")).dropout
    assert "model.decoder.layerdrop" in decoder_spec(build("opt", layerdrop=0.5)).dropout


class TestPinnedCode:
    """The pinned hashes are those of the installed transformers; a changed forward fails here, not at the
    user's."""

    def test_table_is_current(self) -> None:
        changed = [
            name
            for name, hashes in source.reference_table().items()
            if not hashes <= source.KNOWN.get(name, set())
        ]
        assert not changed, (
            f"transformers {transformers.__version__} changed {changed}: read the new code, adapt the "
            "adapter, then pin the output of `python -m dschat_kernels.models.source`"
        )

    def test_no_hash_means_two_things(self) -> None:
        everything = [value for hashes in source.KNOWN.values() for value in hashes]
        assert len(everything) == len(set(everything))

    def test_what_does_not_compute_is_ignored(self) -> None:
        texts = [
            'def f(x: int) -> int:\n    """Doc."""\n    y: int = x + 1\n    logger.info(y)\n    return y',
            "def f(x):\n    y = x + 1\n    return y",
            "def f(x):\n    y = x + 2\n    return y",
        ]
        a, b, c = (source._canonical(ast.parse(text)) for text in texts)
        assert a == b != c

    def test_foreign_wrapper_is_not_looked_through(self) -> None:
        import functools

        from transformers.models.llama.modeling_llama import LlamaMLP

        @functools.wraps(LlamaMLP.forward)
        def wrapper(self, x):  # type: ignore[no-untyped-def]
            return 2 * LlamaMLP.forward(self, x)

        assert source.recognise(LlamaMLP.forward) == "mlp.gated"
        assert source.recognise(wrapper) is None


def refused(model: nn.Module, *words: str) -> None:
    with pytest.raises(Unsupported) as error:
        decoder_spec(model)
    message = str(error.value)
    assert "\n" not in message and not [w for w in words if w not in message], message


class TestRefusals:
    def test_other_families(self) -> None:
        small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        small |= {"num_key_value_heads": 2, "vocab_size": 40, "head_dim": 16}
        for config_class in (
            transformers.MixtralConfig,
            transformers.Qwen2MoeConfig,
            transformers.Olmo3Config,
            transformers.Glm4Config,
        ):
            extra = {"num_local_experts": 2} if config_class is transformers.MixtralConfig else {}
            config = config_class(**small, **extra, pad_token_id=0, bos_token_id=1, eos_token_id=2)
            model = transformers.AutoModelForCausalLM.from_config(config)
            refused(model, "no adapter covers exactly")

    def test_activation(self) -> None:
        refused(build("llama", hidden_act="mish"), "model.layers.0.mlp.act_fn", "Mish")

    def test_cross_attention(self) -> None:
        refused(build("gpt2", add_cross_attention=True), "add_cross_attention=True")

    def test_encoder_decoder(self) -> None:
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
        refused(transformers.T5ForConditionalGeneration(config), "is_encoder_decoder=True")

    def test_not_a_transformers_model(self) -> None:
        refused(nn.Linear(2, 2), "Linear", "no transformers model")

    def test_use_kernels(self) -> None:
        model = build("llama")
        model._use_kernels = True
        refused(model, "use_kernels=True")

    def test_meta_weights(self) -> None:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32)
            )
        refused(model, "meta device")

    def test_instance_forward(self) -> None:
        model = build("llama")
        up = model.model.layers[1].mlp.up_proj
        up.forward = up.forward
        refused(model, "model.layers.1.mlp.up_proj", "instance-level forward")

    def test_subclassed_linear(self) -> None:
        class Quantised(nn.Linear):
            pass

        model = build("llama")
        model.model.layers[2].self_attn.k_proj.__class__ = Quantised
        refused(model, "model.layers.2.self_attn.k_proj", "Quantised")

    def test_changed_forward(self) -> None:
        model = build("llama")
        layer = model.model.layers[1]

        class Odd(type(layer)):  # type: ignore[misc]
            def forward(self, hidden_states, **kwargs):  # type: ignore[no-untyped-def]
                return 2 * super().forward(hidden_states, **kwargs)

        layer.__class__ = Odd
        refused(model, "model.layers.1", "Odd")

    def test_own_attention_function(self) -> None:
        model = build("llama")
        model.config._attn_implementation_internal = "mine"
        refused(model, "_attn_implementation='mine'")

    def test_dora(self) -> None:
        model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        refused(model, "q_proj", "only plain LoRA")

    def test_prompt_tuning(self) -> None:
        peft = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        refused(peft, "PROMPT_TUNING", "LORA")

    def test_refusal_leaves_the_model_alone(self) -> None:
        model = build("llama", hidden_act="mish")
        before = copy.deepcopy(model.state_dict())
        refused(model, "Mish")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
