"""The generation benchmark: a report with sane figures, other sides in processes of their own, and the bound."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dschat import HybridEngine, bench, bounds, cli, peers
from dschat.config import BenchGenerateConfig, ConfigError
from tests.conftest import STORIES
from tests.tiny_models import build


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 10e9)
    monkeypatch.setattr(bench, "matmul_peak", lambda dtype, device: 100e9)


def test_report(stories_model: Any, small_machine: None) -> None:
    said: list[str] = []
    report = bench.generate(stories_model, [(2, 5, 4), (1, 3, 2)], repeats=2, progress=said.append)
    assert said == ["batch 2, 5 + 4 tokens", "batch 1, 3 + 2 tokens"]
    data = json.loads(report.to_json())
    parameters = sum(p.numel() for p in stories_model.parameters())
    assert data["model"] == {
        "type": "llama",
        "parameters": parameters,
        "dtype": "float32",
        "weights": "model",
        "kv_cache": "auto",
    }
    assert data["machine"]["read_gb_per_s"] == 10.0 and data["machine"]["threads"] == torch.get_num_threads()
    assert data["machine"]["backends"]["cpu"] is True
    for row, (batch, prompt, new) in zip(data["rows"], [(2, 5, 4), (1, 3, 2)], strict=True):
        assert (row["batch_size"], row["prompt_length"], row["new_tokens"]) == (batch, prompt, new)
        for side in ("ours", "hf"):
            assert 0 < row[side]["low"] <= row[side]["median"] <= row[side]["high"]
        assert row["speedup"] == pytest.approx(row["ours"]["median"] / row["hf"]["median"])
        assert row["prefill"] > 0 and row["decode_ms"] > 0 and row["hf_prefill"] > 0
        assert row["bandwidth_share"] == pytest.approx(row["decode_gb_per_s"] / 10.0)
        assert row["hf_same_first"] == 1.0 and row["peers"] == {}  # the same weights: the same first tokens
        assert row["bound_share"] == pytest.approx(row["ours"]["median"] / row["bound_rate"])
        assert row["bound_limit"] in ("memory", "arithmetic") and row["bound_decode_ms"] > 0
    table = report.to_markdown().splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| 2, 5 + 4 | ") and table[2].endswith(" % |")


def test_report_without_hf(stories_model: Any, small_machine: None) -> None:
    report = bench.generate(stories_model, [(2, 5, 3)], repeats=1, compare_hf=False)
    (row,) = report.rows
    assert row.hf is None and row.speedup is None and row.hf_prefill is None
    assert json.loads(report.to_json())["rows"][0]["speedup"] is None
    assert "| - | - |" in report.to_markdown()


def test_spread_bandwidth_and_bad_input(stories_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.Spread.of([3.0, 1.0, 2.0]) == bench.Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="repeats is 0: measure at least once"):
        bench.generate(stories_model, [(1, 2, 2)], repeats=0)
    with pytest.raises(ValueError, match="there is no workload: give at least one"):
        bench.generate(stories_model, [])
    with pytest.raises(
        ValueError, match=r"workload \(1, 0, 2\): give a batch size, prompt length and number of new"
    ):
        bench.generate(stories_model, [(1, 0, 2)])
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 0.5 * next(ticks))
    assert bench.read_bandwidth(1) == 64 * 2**20 * 4 / 0.5


# ------------------------------------------------------------------------------------------------------ the bound


def test_bound_counts_what_hugging_face_computes() -> None:
    """FLOPs of the linears as PyTorch's own counter finds them in HF's forward; keys and pairs counted one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build("mistral", sliding_window=5)
    engine = HybridEngine(model)
    engine.flip()
    spec, lengths = engine.spec, [9, 3]
    assert {layer.window for layer in spec.layers} == {5}
    linears = 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(1, length, dtype=torch.long), logits_to_keep=1)
        found = counter.get_flop_counts()["Global"]
        linears += sum(n for op, n in found.items() if "mm" in str(op) and "bmm" not in str(op))
    pairs = len(spec.layers) * sum(1 for n in lengths for q in range(n) for k in range(q + 1) if q - k < 5)
    work = bounds.prefill(engine.decoder, lengths)
    assert work.flops == linears + 4 * spec.num_heads * spec.head_dim * pairs
    assert work.bytes == engine.decoder.packed_bytes

    step = bounds.decode_step(engine.decoder, [4, 9])
    keys = len(spec.layers) * (4 + 5)
    weights = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    assert step.flops == 2 * 2 * weights + 4 * spec.num_heads * spec.head_dim * keys
    assert step.bytes == engine.decoder.packed_bytes + 2 * keys * spec.num_kv_heads * spec.head_dim * 4


def test_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    work = bounds.Work(bytes=2e9, flops=3e9)
    assert (
        work.seconds(bounds.Machine(1e9, 1e9)) == 3.0 and work.limit(bounds.Machine(1e9, 1e9)) == "arithmetic"
    )
    assert work.seconds(bounds.Machine(1e8, 1e9)) == 20.0 and work.limit(bounds.Machine(1e8, 1e9)) == "memory"
    engine = HybridEngine(build("llama"))
    engine.flip()
    machine, d = bounds.Machine(1e9, 1e9), engine.decoder
    steps = [bounds.decode_step(d, [c, c]).seconds(machine) for c in (5, 6)]
    expected = bounds.prefill(d, [4, 4]).seconds(machine) + sum(steps)
    assert bounds.generation_seconds(d, machine, 2, 4, 3) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ other sides


def test_a_peer_in_its_own_process_gives_the_same_tokens(stories_model: Any, small_machine: None) -> None:
    ids = torch.randint(500, (3, 7), generator=torch.Generator().manual_seed(1)).tolist()
    with peers.start(["hf"], str(STORIES), dtype="float32", threads=1) as (worker,):
        process = worker._process
        seconds, tokens = worker.run(ids, 5)
        assert seconds > 0 and tokens == peers.Here(stories_model).run(ids, 5)[1]
        assert worker.version.startswith("transformers ")
        worker.name = "other"
        report = bench.generate(stories_model, [(2, 6, 4), (1, 5, 2)], repeats=1, peers=[worker])
    assert process.poll() == 0
    (first, second), data = report.rows, json.loads(report.to_json())
    assert (
        first.peers["other"].same_first == 1.0
        and second.peers["other"].rate.median > 0
        and first.hf is not None
    )
    assert data["rows"][0]["speedups"]["other"] == pytest.approx(
        first.ours.median / first.peers["other"].rate.median
    )
    assert data["versions"].keys() == {"hf", "other"}
    head, _, *rows = report.to_markdown().splitlines()
    assert "| other tok/s | ratio |" in head and len({line.count("|") for line in (head, *rows)}) == 1


def worker_script(folder: Path, body: str) -> str:
    """An "interpreter" that answers as `body` says, whatever it is told to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}")
    path.chmod(0o755)
    return str(path)


def test_peers_that_fail_say_why(tmp_path: Path) -> None:
    settings: Any = {"dtype": "float32", "threads": 1}
    missing = str(tmp_path / "nowhere" / "python")
    with pytest.raises(peers.PeerError, match=r"vllm cannot be started with .*python: No such file"):
        peers.Peer("vllm", "m", python=missing, **settings)
    with pytest.raises(
        peers.PeerError, match=r"openvino cannot run: ModuleNotFoundError: .*; it needs: pip install"
    ):
        peers.Peer("openvino", "m", python=sys.executable, **settings)
    silent = worker_script(tmp_path, "sys.exit('went away')")
    with pytest.raises(peers.PeerError, match="hf ended without an answer; it said last: went away"):
        peers.Peer("hf", "m", python=silent, **settings)
    short = worker_script(
        tmp_path,
        "print(json.dumps({'version': '1'}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'seconds': 1.0, 'tokens': [[1, 2]]}), flush=True)",
    )
    with (
        peers.Peer("hf", "m", python=short, **settings) as worker,
        pytest.raises(
            peers.PeerError, match=r"hf generated 1 rows of \[2\] tokens and 1 of 3 were asked for"
        ),
    ):
        worker.run([[5]], 3)
    stuck = worker_script(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(peers.PeerError, match="ended without an answer"):
        peers.Peer("hf", "m", python=stuck, limit=0.3, **settings)
    for names, message in (
        (["nosuch"], "there is no peer 'nosuch'"),
        (["openvino"], "needs a converted model"),
    ):
        with pytest.raises(ValueError, match=message), peers.start(names, "m", **settings):
            pass


@pytest.fixture
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bench_command(
    tmp_path: Path, small_machine: None, same_threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    words = ["bench", "generate", "--model", str(STORIES), "--workload", "2x4+3", "--repeats", "1", "--threads", "1",
             "--dtype", "float32", "--output", str(out)]  # fmt: skip
    assert cli.main([*words, "--against", "hf", "--plot", str(picture)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["hf_same_first"] == 1.0 and picture.read_bytes()[:4] == b"\x89PNG"
    assert cli.main([*words, "--against", "none"]) == 0
    assert json.loads(out.read_text())["rows"][0]["hf"] is None
    assert cli.main([*words, "--against", "hf,nosuch"]) == 2
    assert "there is no peer 'nosuch': give some of hf, openvino, trl, vllm." in capsys.readouterr().err


def test_bench_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BenchGenerateConfig(against=["hf,vllm", "trl"]).against == ["hf", "vllm", "trl"]
    assert BenchGenerateConfig(against=["hf,trl"], compare_hf=False).against == ["trl"]
    with pytest.raises(ConfigError, match="peer_python is 'openvino', but it must be NAME=PATH"):
        BenchGenerateConfig(peer_python=["openvino"])
    with pytest.raises(ConfigError, match="isa limits hf and trl only; leave vllm out"):
        BenchGenerateConfig(against=["hf", "vllm"], isa="avx2")
    for name in ("DSCHAT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, "before")
    with pytest.raises(ValueError, match="isa is 'sse9': give one of portable, avx2"):
        peers.limit_isa("sse9")
    peers.limit_isa("avx2")
    assert [os.environ[n] for n in ("DSCHAT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")] == [
        "avx2", "avx2", "AVX2",
    ]  # fmt: skip
    assert peers.environment("hf", 2, sys.executable)["ATEN_CPU_CAPABILITY"] == "avx2"
    monkeypatch.setenv("PYTHONPATH", "ours")
    assert peers.environment("hf", 2, sys.executable)["PYTHONPATH"] == "ours"
    assert "PYTHONPATH" not in peers.environment("vllm", 2, "another/python")
    assert peers.environment("vllm", 3, "another/python")["OMP_NUM_THREADS"] == "3"


def test_an_int8_cache_is_counted_and_says_how_far_its_log_probs_are(
    stories_model: Any, small_machine: None
) -> None:
    report = bench.generate(stories_model, [(2, 5, 4)], repeats=1, compare_hf=False, kv_cache="int8")
    assert report.model["kv_cache"] == "int8" and 0 < report.model["logprob_gap"]["mean"] < 0.1
    plain, quantised = (HybridEngine(stories_model, kv_cache=kind) for kind in ("auto", "int8"))
    for engine in (plain, quantised):
        engine.flip()
    less = bounds.decode_step(plain.decoder, [9]).bytes - bounds.decode_step(quantised.decoder, [9]).bytes
    spec = plain.spec
    assert less == len(spec.layers) * 9 * 2 * spec.num_kv_heads * (4 * spec.head_dim - (spec.head_dim + 4))


def test_int8_says_how_far_its_log_probs_are(stories_model: Any, small_machine: None) -> None:
    report = bench.generate(stories_model, [(2, 5, 4)], repeats=1, compare_hf=False, weights="int8")
    assert report.model["weights"] == "int8" and 0 < report.model["logprob_gap"]["mean"] < 0.1
    plain = bench.generate(stories_model, [(2, 5, 4)], repeats=1, compare_hf=False)
    ratio = report.rows[0].decode_gb_per_s * report.rows[0].decode_ms
    assert (
        ratio < 0.5 * plain.rows[0].decode_gb_per_s * plain.rows[0].decode_ms
    )  # bytes a step: float32 to int8
