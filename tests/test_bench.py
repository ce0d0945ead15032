"""The generation benchmark: a report with sane figures, as JSON and as a table."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from dschat import bench


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda: 10e9)


def test_report(stories_model: Any, small_machine: None) -> None:
    said: list[str] = []
    report = bench.generate(stories_model, [(2, 5, 4), (1, 3, 2)], repeats=2, progress=said.append)
    assert said == ["batch 2, 5 + 4 tokens", "batch 1, 3 + 2 tokens"]
    data = json.loads(report.to_json())
    parameters = sum(p.numel() for p in stories_model.parameters())
    assert data["model"] == {"type": "llama", "parameters": parameters, "dtype": "float32"}
    assert data["machine"]["read_gb_per_s"] == 10.0 and data["machine"]["threads"] == torch.get_num_threads()
    assert data["machine"]["backends"]["cpu"] is True
    for row, (batch, prompt, new) in zip(data["rows"], [(2, 5, 4), (1, 3, 2)], strict=True):
        assert (row["batch_size"], row["prompt_length"], row["new_tokens"]) == (batch, prompt, new)
        for side in ("ours", "hf"):
            assert 0 < row[side]["low"] <= row[side]["median"] <= row[side]["high"]
        assert row["speedup"] == pytest.approx(row["ours"]["median"] / row["hf"]["median"])
        assert row["prefill"] > 0 and row["decode_ms"] > 0 and row["hf_prefill"] > 0
        assert row["bandwidth_share"] == pytest.approx(row["decode_gb_per_s"] / 10.0)
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


def test_int8_says_how_far_its_log_probs_are(stories_model: Any, small_machine: None) -> None:
    report = bench.generate(stories_model, [(2, 5, 4)], repeats=1, compare_hf=False, weights="int8")
    assert report.model["weights"] == "int8" and 0 < report.model["logprob_gap"]["mean"] < 0.1
    plain = bench.generate(stories_model, [(2, 5, 4)], repeats=1, compare_hf=False)
    ratio = report.rows[0].decode_gb_per_s * report.rows[0].decode_ms
    assert (
        ratio < 0.5 * plain.rows[0].decode_gb_per_s * plain.rows[0].decode_ms
    )  # bytes a step: float32 to int8
