"""Runs DeepSpeed-Chat's recipes for a step on random weights: their models' shapes cut to two layers.

    python tests/dry_run.py FOLDER WIDTH [RECIPE ...]

WIDTH 1 is the published width; 16 a sixteenth of it. Prints one JSON line a recipe.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    OPTConfig,
)

from dschat import config as configs
from dschat import config_text
from dschat.planning import PUBLISHED
from dschat.rlhf import ppo, reward, sft
from dschat.rlhf.metrics import read_lines

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "deepspeed_chat"
STORIES = ROOT / "tests" / "data" / "stories260k"


HEADS = {"facebook/opt-350m": 16, "facebook/opt-1.3b": 32, "facebook/opt-6.7b": 32, "facebook/opt-13b": 40,
         "meta-llama/Llama-2-7b-hf": 32}  # fmt: skip
INTERMEDIATE = {"meta-llama/Llama-2-7b-hf": 11008}
"""Where it is not four times the width."""


def shape(name: str, width: int) -> Any:
    """The configuration of a published model with two layers, its widths divided by `width`."""
    hidden, vocab = PUBLISHED[name].hidden, PUBLISHED[name].head // PUBLISHED[name].hidden
    intermediate = INTERMEDIATE.get(name, 4 * hidden) // width
    common = {"num_hidden_layers": 2, "hidden_size": hidden // width,
              "num_attention_heads": max(2, HEADS[name] // width), "vocab_size": vocab if width == 1 else 512,
              "max_position_embeddings": 2048, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}  # fmt: skip
    if "opt" not in name:
        return LlamaConfig(**common, intermediate_size=intermediate, tie_word_embeddings=False)
    small = name.endswith("350m")
    return OPTConfig(
        **common, ffn_dim=intermediate, do_layer_norm_before=not small,
        word_embed_proj_dim=(hidden // 2 if small else hidden) // width,
    )  # fmt: skip


def write(folder: Path, name: str, width: int, scorer: bool) -> str:
    """A random model in a folder, as a policy or with a head for scores."""
    torch.manual_seed(0)
    kind: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    config = shape(name, width)
    if scorer:
        config.num_labels = 1
    model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return str(folder)


def run(recipe: Path, folder: Path, width: int) -> dict[str, Any]:
    """One step of a recipe: its numbers."""
    rows = [{"prompt": p} for p in ("Once upon a time", "One day, a girl", "Tom and his dog", "The sun was")]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    own = config_text.load(configs.PPOConfig, str(recipe))
    start = time.perf_counter()
    keys = own.to_dict() | {
        "model": write(folder / recipe.stem / "actor", own.model, width, scorer=False),
        "reward": [write(folder / recipe.stem / "scorer", own.reward[0], width, scorer=True)],
        "data": [str(data)], "output_dir": str(folder / recipe.stem / "run"), "max_steps": 1, "max_prompt_length": 16,
        "max_new_tokens": 8, "inference_tp_size": 1, "device": "cpu", "tensorboard": False, "progress": False,
        "warmup_steps": 0, "save_every": 0,
    }  # fmt: skip
    config = configs.PPOConfig(**keys)
    result = ppo.train(config)
    (line,) = read_lines(Path(config.output_dir) / "metrics.jsonl")
    return {"recipe": recipe.stem, "steps": result["steps"], "seconds": time.perf_counter() - start,
            "written": sorted(Path(p).relative_to(folder).as_posix() for p in result["written"]), **line}  # fmt: skip


def run_rows(recipe: Path, folder: Path, width: int) -> dict[str, Any]:
    """One step of a recipe of SFT or of a reward model, `batch_size` rows at a time: its numbers."""
    command = recipe.parent.name
    rows = [{"prompt": f"{p} {i}", "chosen": " there was a dog.", "rejected": " fell and cried."}
            for i in range(16) for p in ("Once", "One day", "Tom", "The sun")]  # fmt: skip
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = config_text.load(configs.COMMANDS[command], str(recipe))
    name = f"{command}/{recipe.stem}"
    start = time.perf_counter()
    keys = own.to_dict() | {
        "model": write(folder / name / "start", own.to_dict()["model"], width, scorer=False), "data": [str(data)],
        "output_dir": str(folder / name / "run"), "max_steps": 1, "max_length": 32, "data_split": "", "device": "cpu",
        "tensorboard": False, "progress": False, "save_every": 0,
    }  # fmt: skip
    result = {"sft": sft, "reward": reward}[command].train(configs.COMMANDS[command](**keys))  # type: ignore[attr-defined]
    (line,) = read_lines(folder / name / "run" / "metrics.jsonl")
    return {"recipe": name, "steps": result["steps"], "seconds": time.perf_counter() - start,
            "written": sorted(Path(p).relative_to(folder).as_posix() for p in result["written"]), **line}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    folder, width = Path(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:] or sorted(p.stem for p in RECIPES.glob("*.yaml")):
        one = run_rows if "/" in name else run
        print("DRY", json.dumps(one(RECIPES / f"{name}.yaml", folder, width)), flush=True)


if __name__ == "__main__":
    main()
