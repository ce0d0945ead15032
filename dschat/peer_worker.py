"""Generation by another project, in a process and an environment of its own: `PYTHON peer_worker.py NAME SETTINGS`.

SETTINGS is a JSON object: model (a folder or file in the peer's format), dtype, threads, device. The worker loads the
model and answers `{"version": ...}`; then every line `{"ids": [[...]], "new": n}` on stdin is answered by
`{"seconds": ..., "tokens": [[...]]}` on stdout: exactly n greedy tokens after each prompt, whatever EOS says. Anything
that fails is answered by `{"error": ...}`. What libraries print goes to stderr. It ends with its stdin.

This file imports the standard library only, so that it runs where dschat is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]


class HuggingFace:
    """`model.generate` as it comes: sdpa attention, dynamic cache."""

    def __init__(self, model: str, dtype: str, threads: int, device: str):
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(threads)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._use(loaded.to(device).eval())

    @classmethod
    def around(cls, model: Any) -> HuggingFace:
        """The same for a model that is loaded already, in this process."""
        side = cls.__new__(cls)
        side._use(model)
        return side

    def _use(self, model: Any) -> None:
        self.model = model
        self.torch: Any = importlib.import_module("torch")
        self.version = f"transformers {importlib.import_module('transformers').__version__}"

    def generate(self, ids: Prompts, new: int) -> Prompts:
        rows = self.torch.tensor(ids, device=self.model.device)
        with self.torch.no_grad():
            out = self._generate(
                rows, attention_mask=self.torch.ones_like(rows), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return [row[len(prompt) :] for row, prompt in zip(out.tolist(), ids, strict=True)]

    def _generate(self, *args: Any, **options: Any) -> Any:
        return self.model.generate(*args, **options)


class TRL(HuggingFace):
    """What TRL's online trainers call where no vLLM server is given: `generate` of the unwrapped model."""

    def __init__(self, model: str, dtype: str, threads: int, device: str):
        super().__init__(model, dtype, threads, device)
        self.version = f"trl {importlib.import_module('trl').__version__}, {self.version}"
        self.unwrap: Any = importlib.import_module("trl.models.utils").unwrap_model_for_generation
        self.accelerator: Any = importlib.import_module("accelerate").Accelerator(cpu=device == "cpu")

    def _generate(self, *args: Any, **options: Any) -> Any:
        with self.unwrap(self.model, self.accelerator) as unwrapped:
            return unwrapped.generate(*args, disable_compile=True, **options)


class OpenVINO:
    """GenAI's continuous batching, the cache as large as the workload needs; no prefix cache between runs."""

    def __init__(self, model: str, dtype: str, threads: int, device: str):
        if device != "cpu":
            raise ValueError(f"it runs on the CPU only, not on {device}")
        self.ov: Any = importlib.import_module("openvino")
        self.genai: Any = importlib.import_module("openvino_genai")
        self.version = f"openvino_genai {self.genai.__version__.split('-')[0]}"
        self.model = model
        self.properties = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.room = (0, 0)
        self.pipe: Any = None

    def generate(self, ids: Prompts, new: int) -> Prompts:
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.do_sample, config.ignore_eos = False, True
        inputs = [self.ov.Tensor(importlib.import_module("numpy").array([row], dtype="int64")) for row in ids]
        results = self.pipe.generate(inputs, [config] * len(ids))
        return [list(result.m_generation_ids[0]) for result in results]

    def prepare(self, ids: Prompts, new: int) -> None:
        """A pipeline with room for the workload, if the one there is too small. The room is that of longer answers
        too: a warm-up of a few tokens must be of the pipeline that is measured."""
        tokens = len(ids) * (len(ids[0]) + max(new, 512) + 32)
        if self.pipe is not None and self.room >= (tokens, len(ids)):
            return
        scheduler = self.genai.SchedulerConfig()
        scheduler.num_kv_blocks = tokens // 16 + len(ids) * 2
        scheduler.max_num_seqs = max(len(ids), 1)
        scheduler.max_num_batched_tokens = max(2048, len(ids) * len(ids[0]))
        scheduler.enable_prefix_caching = False
        self.pipe = None
        self.pipe = self.genai.ContinuousBatchingPipeline(self.model, scheduler, "CPU", self.properties)
        self.room = (tokens, len(ids))


class VLLM:
    """vLLM's offline engine in one process, on the device that its build is for."""

    def __init__(self, model: str, dtype: str, threads: int, device: str):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if device == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
            os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
        self.vllm: Any = importlib.import_module("vllm")
        self.version = f"vllm {self.vllm.__version__}"
        self.llm = self.vllm.LLM(
            model=model, dtype=dtype, enable_prefix_caching=False, seed=0, disable_log_stats=True,
        )  # fmt: skip

    def generate(self, ids: Prompts, new: int) -> Prompts:
        how = self.vllm.SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": row} for row in ids], how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


PEERS: dict[str, Callable[..., Any]] = {
    "hf": HuggingFace,
    "openvino": OpenVINO,
    "trl": TRL,
    "vllm": VLLM,
}


def run(peer: Any, ids: Prompts, new: int) -> tuple[float, Prompts]:
    """(seconds, tokens) of one measured call."""
    if hasattr(peer, "prepare"):
        peer.prepare(ids, new)
    start = time.perf_counter()
    tokens = peer.generate(ids, new)
    return time.perf_counter() - start, tokens


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        settings = json.loads(sys.argv[2])
        peer = PEERS[sys.argv[1]](**settings)
        answer(version=peer.version)
        for line in sys.stdin:
            seconds, tokens = run(peer, **json.loads(line))
            answer(seconds=seconds, tokens=tokens)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[0]}")
        raise


if __name__ == "__main__":
    main()
