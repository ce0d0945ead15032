"""What the families need beyond the tests that every decoder runs: limits of positions, models known in part, and what
transformers' own code finds in a cache that the fused decoder filled."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dschat_kernels as dk
from dschat_kernels.models import Unsupported, decoder_spec
from dschat_kernels.plan import Decoder
from tests import models_page
from tests.spec_walk import walk
from tests.tiny_models import CONFIGS, build, randomise

NEVER = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def ids(length: int, vocab: int = 67) -> torch.Tensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


class TestLimits:
    @pytest.mark.parametrize(("name", "limit"), [("llama-dynamic", 127), ("phi3-longrope", 64)])
    @torch.no_grad()
    def test_frequencies_that_change_with_the_length(self, name: str, limit: int) -> None:
        """Fused up to the length where they change, transformers' from there on, in the middle of a generation."""
        model, prompt = build(name), ids(limit - 5)
        theirs = model.generate(prompt, max_new_tokens=12, **NEVER)
        with dk.patch(build(name), strict=True) as patch:
            ours = patch.model.generate(prompt, max_new_tokens=12, **NEVER)
            note = patch.report().notes[0]
        assert torch.equal(ours, theirs)
        assert "beyond the" in note and "depend on the longest row of the batch" in note

        spec = decoder_spec(model)
        assert spec.position_limit() is not None and spec.position_limit()[0] == limit  # type: ignore[index]
        decoder = Decoder(spec)
        decoder.refresh()
        cache = decoder.new_cache(1, 256)
        decoder.step(prompt[0], cache, [0], [limit - 5])
        with pytest.raises(
            ValueError, match=rf"would reach {limit + 1} tokens and the model has {limit} positions"
        ):
            decoder.step(torch.arange(6), cache, [0], [6])
        assert cache.length(0) == limit - 5

    def test_a_longer_forward_leaves_no_mark_on_the_spec(self) -> None:
        """transformers rewrites `inv_freq` in a long forward; what is fused are the original frequencies."""
        for name in ("llama-dynamic", "phi3-longrope"):
            model = build(name, max_position_embeddings=64)
            before = decoder_spec(model).ropes()[0].inv_freq.clone()
            with torch.no_grad():
                model(ids(100))
            assert torch.equal(decoder_spec(model).ropes()[0].inv_freq, before)
            assert not torch.equal(model.model.rotary_emb.inv_freq, before)

    @pytest.mark.parametrize("name", ["gptj", "gpt-neo"])
    def test_positions_that_end(self, name: str) -> None:
        spec = decoder_spec(build(name))
        assert spec.position_limit() == (128, "")
        decoder = Decoder(spec)
        decoder.refresh()
        with pytest.raises(
            ValueError, match="would reach 129 tokens and the model has 128 positions: shorten it"
        ):
            decoder.step(torch.zeros(129).long(), decoder.new_cache(1, 129), [0], [129])

    @pytest.mark.parametrize("name", ["bloom", "llama", "neox"])
    def test_positions_that_do_not_end(self, name: str) -> None:
        assert decoder_spec(build(name)).position_limit() is None


class TestSpecs:
    def test_windows(self) -> None:
        assert [layer.window for layer in decoder_spec(build("gpt-neo")).layers] == [None, 5, 5]
        assert [layer.window for layer in decoder_spec(build("gemma2")).layers] == [6, None, 6]
        assert [layer.window for layer in decoder_spec(build("gemma3")).layers] == [5, 5, None, 5]
        assert [layer.window for layer in decoder_spec(build("starcoder2")).layers] == [7, 7, 7]

    def test_ropes_are_shared_where_they_are_equal(self) -> None:
        assert [len(decoder_spec(build(n)).ropes()) for n in ("gemma3", "gptj", "llama", "bloom")] == [
            2,
            1,
            1,
            0,
        ]
        assert [layer.rope is None for layer in decoder_spec(build("smollm3")).layers] == [False, True] * 2
        assert [layer.rope is None for layer in decoder_spec(build("cohere2")).layers] == [False, True, False]

    @torch.no_grad()
    def test_gemma3_says_softcap_and_does_not_do_it(self) -> None:
        """The config field is there, the forward never passes it on."""
        model = build("gemma3", attn_logit_softcapping=0.5)
        spec = decoder_spec(model)
        assert spec.attn_softcap is None
        close(walk(spec, ids(20)[0]), model(ids(20)).logits[0])

    def test_dropout_is_recorded_everywhere(self) -> None:
        for name, fields in {
            "neox": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
            "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
            "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
            "gptj": {"resid_pdrop": 0.1, "attn_pdrop": 0.2},
            "gpt-neo": {"resid_dropout": 0.1, "attention_dropout": 0.2, "embed_dropout": 0.3},
            "phi": {"resid_pdrop": 0.1, "attention_dropout": 0.2, "embd_pdrop": 0.3},
            "stablelm": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
            "starcoder2": {"residual_dropout": 0.1, "attention_dropout": 0.2, "embedding_dropout": 0.3},
            "cohere": {"attention_dropout": 0.2},
            "gemma2": {"attention_dropout": 0.2},
            "granite": {"attention_dropout": 0.2},
        }.items():
            recorded = decoder_spec(build(name, **fields)).dropout
            assert set(recorded.values()) == set(fields.values()), name

    @pytest.mark.parametrize("name", ["bloom", "neox", "falcon", "gemma3", "cohere", "gptj"])
    @torch.no_grad()
    def test_trunk_and_classifier(self, name: str) -> None:
        tokens = ids(17)
        trunk = build(name, auto=transformers.AutoModel)
        spec = decoder_spec(trunk)
        assert spec.lm_head is None and spec.logit_scale == 1.0 and spec.logit_softcap is None
        close(walk(spec, tokens[0]), trunk(tokens).last_hidden_state[0])


class TestCaches:
    @pytest.mark.parametrize(
        "name", ["falcon-new", "falcon", "bloom", "gemma3", "neox", "gpt-neo", "cohere2"]
    )
    @torch.no_grad()
    def test_transformers_continues_from_a_fused_prefill(self, name: str) -> None:
        """Attentions are asked for in the middle: its own code must find the keys and values it would have made."""
        model, first, rest = build(name), ids(9), ids(4)
        plain = model(first, use_cache=True)
        past = plain.past_key_values
        theirs = model(rest, past_key_values=past, output_attentions=True).logits
        with dk.patch(build(name), strict=True) as patch:
            fused = patch.model(first, use_cache=True)
            assert type(fused) is type(plain)
            past = fused.past_key_values
            assert not patch.report().notes
            ours = patch.model(rest, past_key_values=past, output_attentions=True).logits
            assert "output_attentions was given" in patch.report().notes[0]
        close(ours, theirs)


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
UNKNOWN: dict[str, tuple[type, dict[str, Any], str, set[str]]] = {
    # config, fields, what the reason names, ops that are patched all the same
    "mixture of experts": (transformers.MixtralConfig, {"num_local_experts": 2}, "MixtralModel", {"rms_norm"}),
    "shared experts": (
        transformers.Qwen2MoeConfig,
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
        "Qwen2MoeModel",
        {"rms_norm", "gated_act"},
    ),
    "latent attention": (
        transformers.DeepseekV3Config,
        {**MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        "DeepseekV3Model",
        {"rms_norm", "gated_act"},
    ),
    "state space": (
        transformers.MambaConfig,
        {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 67, "state_size": 4},
        "MambaModel",
        set(),
    ),
}  # fmt: skip


class TestPartlyKnown:
    @pytest.mark.parametrize("what", UNKNOWN)
    @torch.no_grad()
    def test_known_parts_are_patched_and_the_rest_is_named(self, what: str) -> None:
        config_class, fields, named, ops = UNKNOWN[what]
        config = config_class(**(fields if what == "state space" else {**SMALL, **fields}))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        tokens = ids(11)
        theirs, greedy = model(tokens).logits, model.generate(tokens, max_new_tokens=4, **NEVER)
        with pytest.raises(Unsupported, match=named):
            dk.patch(model, strict=True)
        with dk.patch(model) as patch:
            torch.testing.assert_close(model(tokens).logits, theirs, rtol=1e-4, atol=1e-4)
            assert torch.equal(model.generate(tokens, max_new_tokens=4, **NEVER), greedy)
            report = patch.report()
        assert report.decoder.startswith("transformers' own: ") and named in report.decoder
        assert {e.op for e in report.entries if e.status == "patched"} >= ops
        left = [e for e in report.entries if e.status == "left"]
        assert left and all(e.reason for e in left)

    @pytest.mark.parametrize(
        ("name", "fields", "words"),
        [
            ("olmo", {"clip_qkv": 3.0}, "config.clip_qkv=3.0"),
            ("gemma3", {"use_bidirectional_attention": True}, "is not causal"),
        ],
    )
    def test_options_that_are_not_fused(self, name: str, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(Unsupported) as error:
            decoder_spec(build(name, **fields))
        assert words in str(error.value) and "\n" not in str(error.value)

    def test_a_helper_of_ones_own(self) -> None:
        """The forward is transformers', what it calls is not."""
        model = build("gpt-neo")
        attention = model.transformer.h[1].attn.attention
        attention._attn = lambda q, k, v, mask: (v, None)
        with pytest.raises(
            Unsupported, match=r"attn.attention._attn \(GPTNeoSelfAttention\) is not the code"
        ):
            decoder_spec(model)


@pytest.mark.parametrize("name", ["neox", "falcon-new", "bloom", "gemma3", "cohere", "phi", "gpt-neo"])
@torch.no_grad()
def test_lora(name: str) -> None:
    """Adapters on every projection, the interleaved fused ones included."""
    model = get_peft_model(build(name), LoraConfig(r=3, target_modules="all-linear"))
    randomise(model, 5)
    model.eval()
    tokens = ids(14)
    theirs = model.generate(input_ids=tokens, max_new_tokens=6, **NEVER)
    with dk.patch(model, strict=True) as patch:
        assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=6, **NEVER), theirs)
        assert not patch.report().notes


def test_real_names_are_in_the_table() -> None:
    """Each of the families that the house promises has a tiny model here."""
    types = {config.model_type for config, _ in CONFIGS.values()}  # type: ignore[attr-defined]
    promised = (
        "gpt2 gpt_neo gptj opt bloom gpt_neox llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 falcon "
        "stablelm starcoder2 olmo2 smollm3 cohere granite internlm3"
    )
    assert set(promised.split()) <= types


class TestOptions:
    """Every option that changes what a family computes is switched on in one of its tiny models, or refused."""

    NOT_COMPUTED = frozenset(  # caching, classifiers, and what every model of transformers has
        [*inspect.signature(transformers.PreTrainedConfig).parameters, "use_cache", "is_decoder", "add_cross_attention",
         "tie_word_embeddings", "summary_use_proj", "summary_proj_to_labels", "summary_activation"]
    )  # fmt: skip
    LEFT = frozenset(  # to transformers, with a reason (TestPartlyKnown), or of no effect (TestSpecs)
        [("olmo", "clip_qkv"), ("gemma3_text", "attn_logit_softcapping"),
         *((family, "use_bidirectional_attention") for family in ("gemma", "gemma2", "gemma3_text"))]
    )  # fmt: skip

    def test_every_option_is_on_somewhere(self) -> None:
        missing = []
        for config_class in {config_class for config_class, _ in CONFIGS.values()}:
            plain: Any = config_class()
            ours = [config_class(**fields) for other, fields in CONFIGS.values() if other is config_class]
            for name in set(inspect.signature(config_class).parameters) - self.NOT_COMPUTED:
                default = getattr(plain, name, None)
                optional = isinstance(default, (bool, type(None))) and not name.endswith("token_id")
                if not optional or (plain.model_type, name) in self.LEFT:
                    continue
                if all(getattr(config, name, None) == default for config in ours):
                    missing.append(f"{plain.model_type}.{name}={default}")
        assert sorted(missing) == []

    def test_every_kind_of_rotary_scaling(self) -> None:
        kinds = {(fields.get("rope_parameters") or {}).get("rope_type") for _, fields in CONFIGS.values()}
        assert set(ROPE_INIT_FUNCTIONS) <= kinds

    @pytest.mark.parametrize("kind", sorted({config.model_type for config, _ in CONFIGS.values()}))  # type: ignore[attr-defined]
    @torch.no_grad()
    def test_tied_heads_and_large_epsilons(self, kind: str) -> None:
        """The head tied where it was not and untied where it was; norms whose epsilon cannot be overlooked."""
        name = next(n for n, (config, _) in CONFIGS.items() if config.model_type == kind)  # type: ignore[attr-defined]
        plain = build(name)
        tied = plain.config.tie_word_embeddings
        epsilons = [n for n in vars(plain.config) if n.endswith(("_eps", "_epsilon"))]
        model = build(name, tie_word_embeddings=not tied, **dict.fromkeys(epsilons, 0.3))
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is not tied
        close(walk(decoder_spec(model), ids(17)[0]), model(ids(17)).logits[0])
        if epsilons:
            assert not torch.allclose(
                build(name, tie_word_embeddings=not tied)(ids(17)).logits, model(ids(17)).logits
            )


@pytest.mark.parametrize("kind", ["iquestcoder", "gpt-sw3"])
@torch.no_grad()
def test_a_type_that_no_adapter_names(kind: str) -> None:
    """Built of known mechanisms, it runs fused without a line of code."""
    adapters = Path(decoder_spec.__code__.co_filename).parent
    assert not any(kind in path.read_text() for path in adapters.glob("*.py"))
    fields = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, 0)
    tokens = ids(12)
    theirs, greedy = model(tokens).logits, model.generate(tokens, max_new_tokens=4, **NEVER)
    with dk.patch(model, strict=True) as patch:
        close(model(tokens).logits, theirs)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, **NEVER), greedy)
        assert not patch.report().notes


def test_the_page_of_models_is_current() -> None:
    """docs/models.md is what the tiny models say; `python -m tests.models_page` writes it."""
    assert models_page.PAGE.read_text() == models_page.page()
