"""One picture of the curves and one short page of a run, made from the files that the run wrote."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import atomic_text
from .metrics import read_lines

STYLE = (
    "<style>body{font:15px sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3em .6em;vertical-align:top;"
    "white-space:pre-wrap;text-align:left}</style>"
)
STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "rloo")
Panels = list[tuple[str, list[tuple[str, str]]]]  # panel title -> (key, label) of its lines


def _pairs(name: str) -> Panels:
    return [
        (f"{name}: loss", [("loss", "training"), ("eval/loss", "held-out")]),
        (f"{name}: accuracy", [("accuracy", "training"), ("eval/accuracy", "held-out")]),
    ]


def _online(name: str) -> Panels:
    return [
        (f"{name}: score of the rollouts", [
            *(("score/mean", "score"), ("score/total", "score - KL penalty"), ("eval/score", "held-out")),
        ]),
        (f"{name}: KL to the reference, a whole answer", [("kl/sequence", "k1"), ("kl/sequence_k3", "k3")]),
        (f"{name}: losses", [("policy/loss", "policy"), ("value/loss", "value"), ("kl/loss", "KL")]),
        (f"{name}: answer length", [("rollout/length", "tokens")]),
        (f"{name}: entropy of a token", [("policy/entropy", "nats")]),
        (f"{name}: seconds of a step", [
            *(("time/prefill_s", "prefill"), ("time/decode_s", "decode"), ("time/score_s", "score")),
            *(("time/logprobs_s", "log-probs"), ("time/update_s", "update"), ("time/flip_s", "flip")),
        ]),
    ]  # fmt: skip


# What is drawn for each stage.
PANELS: dict[str, Panels] = {
    "sft": [("SFT: loss", [("loss", "training"), ("eval/loss", "held-out")])],
    "reward": _pairs("Reward model"),
    "dpo": [
        *_pairs("DPO"),
        ("DPO: margin of the implicit reward", [("margin", "training"), ("eval/margin", "held-out")]),
    ],
    **{name: _online(name.upper()) for name in ("ppo", "grpo", "rloo")},
}


def stage_folders(folder: str | Path) -> dict[str, Path]:
    """Stage name -> folder with metrics: the stages of a pipeline, or the one run that `folder` is."""
    folder = Path(folder)
    found = {s: folder / s for s in STAGES if (folder / s / "metrics.jsonl").is_file()}
    if not found and (folder / "metrics.jsonl").is_file():
        run = (
            json.loads((folder / "run.json").read_text(encoding="utf-8"))
            if (folder / "run.json").is_file()
            else {}
        )
        found = {run.get("stage", "ppo"): folder}
    return found


def _smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential mean with the bias of its start taken out."""
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def plot(folder: str | Path, target: str | Path) -> Path | None:
    """Draw the curves of a run or pipeline into a PNG file; None if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: list[tuple[str, list[tuple[str, list[float], list[float]]]]] = []
    for stage, where in stage_folders(folder).items():
        lines = read_lines(where / "metrics.jsonl")
        for title, keys in PANELS[stage]:
            curves = []
            for key, label in keys:
                points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
                if points:
                    curves.append((label, [float(p[0]) for p in points], [float(p[1]) for p in points]))
            if curves:
                drawn.append((title, curves))
    if not drawn:
        return None
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, curves) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, i + 1)
        for label, x, y in curves:
            noisy = len(y) > 15
            (line,) = axes.plot(
                x, _smooth(y) if noisy else y, label=label, marker="o" if len(y) < 3 else None
            )
            if noisy:
                axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=7)
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    return target


def write(
    folder: str | Path, title: str, sentences: Sequence[str], table: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """`curves.png`, `report.md` and `report.html` of a run: what it did in sentences, the picture, some
    completions.
    """
    folder = Path(folder)
    picture = plot(folder, folder / "curves.png")
    heads = list(table[0]) if table else []
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v).strip() for v in row.values()] for row in table]

    md = [f"# {title}", "", *(f"- {s}" for s in sentences), ""]
    page = ["<!doctype html><meta charset='utf-8'>", f"<title>{html.escape(title)}</title>", STYLE]
    page += [
        f"<h1>{html.escape(title)}</h1><ul>",
        *(f"<li>{html.escape(s)}</li>" for s in sentences),
        "</ul>",
    ]
    if picture:
        md += ["![curves](curves.png)", ""]
        page.append("<img src='curves.png' alt='curves'>")
    if table:
        md += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        md += [
            "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells
        ]
        page.append("<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in heads) + "</tr>")
        page += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells]
        page.append("</table>")
    atomic_text(folder / "report.html", "\n".join(page) + "\n")
    atomic_text(folder / "report.md", "\n".join(md) + "\n")
    return folder / "report.md"
