"""TRL's GRPO on given prompt ids, in TRL's environment: `PYTHON trl_worker.py SETTINGS`, started by trl_step.py.

SETTINGS is a JSON object (see trl_step.py). The worker answers `{"version": ...}`, and then every line on stdin by one
iteration: `{"seconds": ...}` from the start of its rollout to the end of its last optimizer step. It imports nothing of
dschat.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import datasets
import torch
import transformers
import trl


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of letters in an answer: any function does, it only has to differ within a group."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


class Turns(transformers.TrainerCallback):
    """Waits for a line before every iteration, and answers with its time after its last step."""

    def __init__(self, steps: int, answers: Any):
        self.steps, self.answers, self.start = steps, answers, 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            self.answers.write(json.dumps({"seconds": time.perf_counter() - self.start}) + "\n")
            self.answers.flush()


class Trainer(trl.GRPOTrainer):
    """Prompts are the token ids written in the data set; no token ends an answer."""

    turns: Turns

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [json.loads(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
        completions, logprobs = super()._generate_single_turn(*args, **options)
        lengths = sorted({len(tokens) for tokens in completions})
        if lengths != [self.args.max_completion_length]:
            raise SystemExit(
                f"TRL generated answers of {lengths} tokens: the times would not be of the same work"
            )
        return completions, logprobs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.turns.wait()
        return super()._generate_and_score_completions(inputs)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    s = json.loads(sys.argv[1])
    torch.set_num_threads(s["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(s["model"], dtype=getattr(torch, s["dtype"]))
    rows, minibatch, new = s["prompts"] * s["n"], s["minibatch"], s["new"]
    steps = rows // minibatch
    config = trl.GRPOConfig(
        output_dir=s["folder"], per_device_train_batch_size=minibatch, steps_per_generation=steps, num_iterations=1,
        num_generations=s["n"], max_completion_length=new, temperature=1.0, beta=s["kl_coef"], learning_rate=1e-6,
        lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=steps * s["iterations"], logging_steps=1000000,
        gradient_checkpointing=False, bf16=False, fp16=False, use_cpu=True, report_to=[], save_strategy="no",
        shuffle_dataset=False, disable_tqdm=True, disable_dropout=True, seed=0,
        generation_kwargs={"min_new_tokens": new, "eos_token_id": None},
    )  # fmt: skip
    lora = None
    if s["lora_r"]:
        import peft

        lora = peft.LoraConfig(
            r=s["lora_r"], lora_alpha=s["lora_alpha"], target_modules=s["lora_targets"], task_type="CAUSAL_LM"
        )
    trainer = Trainer(
        model, reward, config, datasets.Dataset.from_dict({"prompt": [json.dumps(ids) for ids in s["ids"]]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(s["model"], padding_side="left"), peft_config=lora,
    )  # fmt: skip
    trainer.eos_token_ids = [-1]  # an answer goes on after an EOS, and nothing of it is masked
    trainer.turns = Turns(steps, answers)
    trainer.add_callback(trainer.turns)
    dtypes = sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad})
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    version = f"trl {trl.__version__}, transformers {transformers.__version__}"
    answers.write(json.dumps({"version": version, "trainable": trainable, "dtypes": dtypes}) + "\n")
    answers.flush()
    trainer.train()


if __name__ == "__main__":
    main()
