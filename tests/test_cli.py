"""The command line: every command runs, and bad input is one sentence on stderr with exit code 2."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dschat import config as configs
from dschat import config_base, config_text
from dschat.cli import BODIES, main, parse_workload
from tests.interrupts import as_in_a_terminal

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "tests" / "data" / "stories260k")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_command_has_a_body_and_help(capsys):
    assert set(BODIES) == set(configs.COMMANDS)
    code, out, _ = run(capsys)
    assert code == 0 and all(f"dschat {name}" in out for name in configs.COMMANDS)
    for name in configs.COMMANDS:
        code, out, _ = run(capsys, *name.split(), "--help")
        assert code == 0 and f"usage: dschat {name}" in out
    assert run(capsys, "--version")[1].startswith("dschat ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("tarin", "unknown command 'tarin'; did you mean train?"),
        ("zzz", "unknown command 'zzz'; known are doctor"),
        ("bench", "bench needs what to measure: dschat bench generate"),
        ("sft --lerning_rate 1", "unknown key 'lerning_rate' in the flags; did you mean 'learning_rate'?"),
        ("sft --config nowhere.yaml", "config file nowhere.yaml does not exist"),
        ("sft --config", "--config needs the name of a YAML file"),
        ("sft", "data is empty; name at least one file"),
        ("sft --data nowhere.jsonl --output_dir {tmp}/run", "data file nowhere.jsonl does not exist; . has"),
        ("sft --data {tmp}/bad.jsonl --output_dir {tmp}/run --model {model}", "bad.jsonl line 2 is not valid JSON"),
        ("reward --data {tmp}/sft.jsonl --output_dir {tmp}/run --model {model}", "has no column 'chosen'"),
        ("sft --data {tmp}/sft.jsonl --output_dir {tmp}/run --model {tmp}/nowhere", "nowhere does not exist; give a"),
        ("ppo --data x.jsonl", "reward is empty; name a reward model folder or a function"),
        ("ppo --top_p 0.9", "top_p is 0.9, but PPO"),
        ("--local_rank=0 ppo --zero_stage 8", "zero_stage is 8, but it must be 0, 1, 2 or 3, or none"),
        ("ppo --zero_stage 7", "zero_stage is 7, but it must be 0, 1, 2 or 3, or none"),
        ("ppo --inference_tp_size 2 --data x.jsonl --reward y", "inference_tp_size is 2 and there is 1 process"),
        ("generate --model {tmp} --prompt a", "has no config.json"),
        ("generate --model {model} --prompt a --max_new_tokens 600", "more than the model's context of 512"),
        ("bench generate --model {model} --workload 3", "workload is '3', but it must be BATCHxPROMPT+NEW"),
        ("verify --model {model} --backend triton", "triton"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(capsys, tmp_path, argv, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, _, err = run(capsys, *argv.format(tmp=tmp_path, model=MODEL).split())
    assert code == 2 and err.startswith("dschat: error: ") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing behind"


def test_debug_shows_the_trace():
    with pytest.raises(configs.ConfigError, match="unknown command"):
        main(["tarin", "--debug"])


def test_a_bug_is_said_to_be_one(capsys, monkeypatch):
    def broken(config):
        raise KeyError("oops")

    monkeypatch.setitem(BODIES, "doctor", broken)
    code, _, err = run(capsys, "doctor")
    assert code == 2 and err == "dschat: error: KeyError: 'oops' (--debug shows where)\n"


def test_notes_about_old_names(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("num_padding_at_beginning: 1\n")
    code, out, err = run(capsys, "ppo", "--config", str(path), "--dump-config")
    assert code == 0 and err == (
        "dschat: note: num_padding_at_beginning has no effect: masks are explicit here, so leading padding needs no "
        "number\n"
    )
    assert yaml.safe_load(out)["cliprange"] == 0.2


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "backend" in out and "reference" in out and f"torch {torch.__version__}" in out


def test_generate(capsys, monkeypatch):
    argv = ("generate", "--model", MODEL, "--max_new_tokens", "12", "--prompt", "Once upon a time")
    code, out, err = run(capsys, *argv)
    assert code == 0 and out.startswith(", there was a little girl named Lily") and "tokens/s" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day\n\nThe sun\n"))
    code, out, _ = run(
        capsys, "generate", "--model", MODEL, "--max_new_tokens", "4", "--n", "2", "--temperature", "1"
    )
    assert code == 0 and out.count("--- One day") == out.count("--- The sun") == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "there is no prompt" in run(capsys, "generate", "--model", MODEL)[2]


def test_verify_and_bench(capsys, tmp_path):
    out = str(tmp_path / "v.json")
    code, text, _ = run(capsys, "verify", "--model", MODEL, "--max_new_tokens", "4", "--output", out)
    assert code == 0 and "certificate:" in text and json.loads(Path(out).read_text())["passed"]
    out = str(tmp_path / "b.json")
    argv = ("bench", "generate", "--model", MODEL, "--workload", "2x4+4", "--repeats", "1", "--output", out)
    code, text, _ = run(capsys, *argv)
    assert code == 0 and "| 2, 4 + 4 |" in text and json.loads(Path(out).read_text())["rows"]
    assert parse_workload("16x128+64") == (16, 128, 64)


def test_verify_with_an_adapter_on_every_backend(capsys, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    argv = (
        "--model",
        MODEL,
        "--adapter",
        str(tmp_path / "adapter"),
        "--deep",
        "true",
        "--max_new_tokens",
        "2",
    )
    code, text, _ = run(capsys, "verify", *argv, "--dtype", "float32")
    assert code == 0 and text.count("LoRA layers 5") == text.count("the fused model is the model") == 2
    code, _, err = run(capsys, "verify", "--model", MODEL, "--adapter", str(tmp_path / "nothing"))
    assert code == 2 and "nothing does not exist; give a folder" in err


def test_a_tokenizer_that_knows_more_than_the_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dschat.cli import vocabulary_gap

    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    assert vocabulary_gap(model, tokenizer) == ""
    tokenizer.add_tokens(["<new>"])
    assert "the tokenizer has ids up to 512 and the model embeds 512" in vocabulary_gap(model, tokenizer)


def test_verify_that_fails_has_its_own_exit_code(capsys, monkeypatch):
    from dschat.engine.verify import Certificate

    monkeypatch.setattr("dschat.engine.verify.verify", lambda *a, **k: Certificate({}))
    assert run(capsys, "verify", "--model", MODEL)[0] == 1


def test_the_whole_pipeline(capsys, tmp_path, monkeypatch):
    """recipes/ci.yaml: three stages, one page, models that load; started again it only says what it did."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    argv = (
        "train",
        "--config",
        "recipes/ci.yaml",
        "--output_dir",
        str(folder),
        "--no-progress",
        "--threads",
        "1",
    )
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    expected = [
        "SFT: 6 steps",
        "Reward model: 9 steps",
        "held-out pairs",
        "PPO: 4 steps",
        "Reward on 12 held-out",
    ]
    expected += [
        "KL of a held-out answer",
        "Hugging Face generate",
        "mean |d| 0.00e+00",
        "dschat chat --model",
    ]
    for text in expected:
        assert text in out, text
    assert {p.name for p in folder.iterdir()} >= {
        "sft",
        "reward",
        "ppo",
        "curves.png",
        "report.md",
        "report.html",
    }
    assert config_text.load(configs.TrainConfig, str(folder / "config.yaml")).ppo.model == str(
        folder / "sft" / "model"
    )
    AutoModelForCausalLM.from_pretrained(folder / "ppo" / "model")
    AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "model")
    assert list((folder / "ppo" / "tensorboard").glob("events*"))
    lines = (folder / "ppo" / "metrics.jsonl").read_text()
    code, again, _ = run(capsys, *argv)
    assert code == 0 and again == out and (folder / "ppo" / "metrics.jsonl").read_text() == lines
    code, _, err = run(capsys, *argv, "--ppo.seed", "5")
    assert code == 2 and "holds a run with seed 0, not 5" in err


RECIPES = sorted(p.name for p in (ROOT / "recipes").glob("*.yaml"))


def recipe(name: str) -> configs.Config:
    """The config of a recipe, of the command that its comment shows."""
    (command,) = set(
        re.findall(rf"dschat (\w+) --config recipes/{name}", (ROOT / "recipes" / name).read_text())
    )
    return config_text.load(configs.COMMANDS[command], str(ROOT / "recipes" / name))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name, monkeypatch):
    """Every recipe resolves, and its data files are there and fit its stages."""
    from dschat.rlhf import data, reading

    monkeypatch.chdir(ROOT)
    config = recipe(name)
    stages = [config]
    if isinstance(config, configs.TrainConfig):
        assert config.sft and config.reward and config.ppo
        stages = [config.sft, config.reward, config.ppo]
    for stage in stages:
        assert stage.data and (isinstance(stage, configs.SFTConfig) or stage.eval_data)
        for source in (*stage.data, *stage.eval_data):
            records, _ = reading.read([source])
            pair = [["chosen"], ["rejected"]]
            wanted = {"sft": [data.RESPONSE_COLUMNS], "reward": pair, "dpo": pair}
            if not getattr(stage, "environment", ""):  # its reset makes the prompt
                reading.require_columns(records, *wanted.get(stage.command, [["prompt"]]))
            assert (Path(source).parent / "README.md").is_file()


@pytest.fixture
def tiny_chat(tmp_path) -> str:
    """The tiny model with a chat template, so that recipes for chat models run on it."""
    folder = tmp_path / "tiny_chat"
    shutil.copytree(MODEL, folder)
    path = folder / "tokenizer_config.json"
    text = json.loads(path.read_text()) | {
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    }
    path.write_text(json.dumps(text))
    return str(folder)


@pytest.mark.parametrize("name", [n for n in RECIPES if not isinstance(recipe(n), configs.TrainConfig)])
def test_recipes_of_one_stage_run(name, capsys, tmp_path, tiny_chat, monkeypatch):
    """Two steps on the tiny model: what the recipe asks for exists."""
    monkeypatch.chdir(ROOT)
    known = config_base.field_types(type(recipe(name)))
    turns = getattr(recipe(name), "environment", "")
    small = {
        "model": tiny_chat, "output_dir": str(tmp_path / "run"), "max_steps": 2, "lora_last": 2, "max_train_rows": 16,
        "max_eval_rows": 4, "max_new_tokens": 32 if turns else 8, "prompts_per_step": 2, "max_prompt_length": 200,
        "threads": 1,
        "max_length": 256, "progress": False, "tensorboard": False, "dtype": "float32", "compare_hf": 0,
    }  # fmt: skip
    if any(":" not in name for name in getattr(recipe(name), "reward", [])):
        small["reward"] = "dschat.rlhf.verifiers:marked"  # the recipe's reward model is another run's
    argv = [f"--{k}={v}" for k, v in small.items() if k in known]
    command = type(recipe(name)).command
    code, out, err = run(capsys, command, "--config", f"recipes/{name}", "--overlong=cut", *argv)
    assert code == 0, err
    assert '"steps": 2' in out


# ------------------------------------------------------------------------------------------------------- chat


def chat(text: str, tokenizer, model, **keys) -> str:
    from dschat.chat import chat as talk

    target = io.StringIO()
    talk(configs.ChatConfig(model="m", **keys), model, tokenizer, source=io.StringIO(text), target=target)
    return target.getvalue()


def test_chat_with_and_without_a_template(stories_model, stories_tokenizer):
    import copy

    out = chat(
        "Once upon a time\n\n/new\n/quit\nignored",
        stories_tokenizer,
        stories_model,
        max_new_tokens=8,
        temperature=0,
    )
    assert (
        "no chat template" in out
        and ", there was a" in out
        and "(a new conversation)" in out
        and "ignored" not in out
    )
    tokenizer = copy.deepcopy(stories_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    out = chat("Once\nupon\n", tokenizer, stories_model, max_new_tokens=8)
    assert out.count("> ") == 3 and "no chat template" not in out


def test_long_conversations_forget_their_start(stories_model, stories_tokenizer):
    import copy

    tokenizer = copy.deepcopy(stories_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    line = "once upon a time there was a little cat and a little dog " * 5 + "\n"
    assert chat(line * 5, tokenizer, stories_model, max_new_tokens=40).count("> ") == 6


def test_characters_of_several_tokens_wait():
    from dschat.chat import TextStream

    shown: list[str] = []
    pieces = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"z", 5: "é".encode()[:1]}
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), shown.append)
    for token in (1, 2, 3, 4, 5):
        stream.on_token(0, token)
    assert shown == ["a", "é", "z"] and stream.close() == "aéz\ufffd" and "".join(shown) == "aéz\ufffd"


def test_installed_entry_point_starts_fast():
    """`dschat` alone must not load torch: the help is there at once."""
    code = "import sys; from dschat.cli import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


PRESSED_AT_THE_END = """
import atexit, os, signal, sys, time
import dschat.cli as cli

late = sys.argv.pop() == "late"

def press():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)  # a handler runs between two lines

@atexit.register
def end():
    press()
    print("cleaned up", flush=True)
    if late:
        time.sleep(cli.PRESS)
        press()
        print("still here", flush=True)

cli.BODIES["doctor"] = lambda config: press()
cli.command()
"""


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_while_an_interrupted_command_ends(late: bool):
    """The same press again, as a launcher passes it on, reaches what Python does at exit: nothing is cut off and
    nothing more is said. A later one, of someone who does not want to wait, ends the process at once."""
    done = subprocess.run(
        [sys.executable, "-c", PRESSED_AT_THE_END, "doctor", "late" if late else "soon"], capture_output=True,
        text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=120, preexec_fn=as_in_a_terminal,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == ("dschat: interrupted\n", 130)
    assert done.stdout == "cleaned up\n"


MANY_LENGTHS = """
import ctypes, os
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import dschat.cli as cli
from dschat import HybridEngine, SamplingConfig

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free counts for nothing
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def train(config):
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(torch.bfloat16)
    engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    for step in range(151):
        rollout = engine.generate(torch.arange(2, 36 + step)[None], None, SamplingConfig(max_new_tokens=1, n=2))
        engine.backward(engine.logprobs(rollout).sum())
        engine.step()
        if step in (30, 150):
            print(resident(), flush=True)

cli.BODIES["doctor"] = train
cli.command()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc and glibc")
def test_memory_does_not_grow_with_every_length() -> None:
    """PyTorch keeps the products of a thousand shapes compiled, of which a run has others every step."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_LENGTHS, "doctor"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    before, after = (int(line) for line in done.stdout.splitlines())
    assert after - before < 60, "MiB"
