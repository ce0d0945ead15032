"""`dschat report`: one page that needs nothing else, and holds what the runs wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from dschat import cli
from dschat.config import ConfigError
from dschat.rlhf import report
from dschat.rlhf.metrics import Metrics

EMPTY = {"meta", "br", "img", "path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects texts, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def make(folder, stage="grpo", steps=20, done=True, **settings):
    """A run's folder as the trainers write it."""
    with Metrics(folder, stage, steps, tensorboard=False, progress=False) as metrics:
        for step in range(1, steps + 1):
            metrics.add_time("decode", 0.5)
            metrics.add_time("update", 0.25)
            values = {"score/mean": step / 10, "kl/sequence": 0.01 * step, "time/rollout_tokens_per_s": 50.0}
            metrics.log(step, values)
        rows = [
            {"prompt": "<p> & q", "before": "no", "score before": 0.5, "after": "yes", "score after": 1.25}
        ]
        metrics.completions(steps, rows)
    config = {"model": "m", "seed": 0, "learning_rate": 1e-3, **settings}
    (folder / "run.json").write_text(
        json.dumps({"stage": stage, "versions": {"torch": "9.9"}, "config": config})
    )
    if done:
        (folder / "result.json").write_text(json.dumps({"steps": steps, "seconds": 12.3}))
    return folder


def test_page_of_one_run(tmp_path, capsys):
    folder = make(tmp_path / "one")
    (folder / "certificate.json").write_text(json.dumps({"passed": False, "checks": {"<b>": 1}}))
    assert cli.main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), "nothing is fetched from elsewhere"
    assert len(set(page.ids)) == len(page.ids), "no id stands twice, or one curve would clip another"
    assert text.count("<svg") == 3 and "GRPO: score of the rollouts" in page.text
    for part in (
        "GRPO: 20 steps in 12 s.",
        "<p> & q",
        "1.25",
        "decode",
        "0.5",
        "FAILED",
        '"<b>": 1',
        "torch 9.9",
    ):
        assert part in page.text, part
    assert "<b>" not in text and "seed: 0" in page.text and "rollouts at 50 tokens/s" in page.text
    assert report.compare([folder], tmp_path / "again.html").read_text() == text, (
        "the same files, the same page"
    )


def test_page_of_several(tmp_path):
    a, b = make(tmp_path / "a", seed=1), make(tmp_path / "x" / "a", seed=2, steps=5, done=False)
    other = make(tmp_path / "c", stage="sft")
    target = tmp_path / "page.html"
    assert cli.main(["report", str(a), str(b), str(other), "--output", str(target)]) == 0
    page = Page(target.read_text())
    assert "a (2): 5 steps so far, not finished." in page.text and "a: GRPO: 20 steps" in page.text
    assert "a: score" in page.text and "a (2): score" in page.text, "curves of one stage share a panel"
    section = page.text[page.text.index("Differences in settings: grpo") :]
    assert (
        re.search(r"seed\s*1\s*2", section)
        and "learning_rate" not in section[: section.index("Settings and")]
    )


@pytest.mark.parametrize(
    ("norm", "label"), [("none", "total, less KL"), ("group", "total, less KL, of normed scores")]
)
def test_a_total_of_normed_scores_says_so(tmp_path, norm, label):
    (tmp_path / "run.json").write_text(json.dumps({"stage": "ppo", "config": {"reward_norm": norm}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "objective/rlhf_reward": 0.5}\n')
    assert report.curves(report.gather(tmp_path)) == [("PPO: score of the rollouts", [(label, [1.0], [0.5])])]


def test_samples_where_nothing_was_held_out(tmp_path):
    with Metrics(tmp_path / "r", "ppo", 3, tensorboard=False, progress=False) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"score/mean": 1.0})
            metrics.completions(step, [{"prompt": "p", "completion": f"answer {step}", "score": 1.0}])
    page = Page(report.compare([tmp_path / "r"], tmp_path / "p.html").read_text())
    assert "answer 1" in page.text and "answer 3" in page.text and "answer 2" not in page.text


def test_timings(tmp_path):
    (run,) = report.gather(make(tmp_path / "one"))
    for line in run.lines:
        line["time/step_s"] = 1.0
    run.lines[0]["time/decode_s"] = 100.0  # the warm-up does not count
    rows = report.timings(run)
    assert [(r["phase"], r["seconds a step"], r["share"]) for r in rows] == [
        ("decode", pytest.approx(0.5), pytest.approx(0.5)),
        ("update", pytest.approx(0.25), pytest.approx(0.25)),
        ("the whole step", 1.0, 1.0),
    ]


def test_bad_input(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no run"), ("nowhere", "is no folder")):
        with pytest.raises(ConfigError, match=message):
            report.compare([tmp_path / name], tmp_path / "p.html")
    assert cli.main(["report"]) == 2
    assert "there is no run to report; name its output_dir" in capsys.readouterr().err
