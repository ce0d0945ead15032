"""The page of a run, or of several side by side: one HTML file that needs nothing else, made from the files
that the runs wrote.

What it shows: what each run did, in sentences; curves, runs over one another; held-out answers before and
after; where the time went; the certificate, where `dschat verify --output RUN/certificate.json` left one; the
settings, and in what they differ. `curves.png` and `report.md` hold the short form.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError
from . import evaluate, names
from .checkpoint import atomic_bytes, atomic_text, read_json
from .metrics import read_lines, read_log

STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
.curves{display:flex;flex-wrap:wrap;gap:8px}.curves svg,.curves img{width:380px;height:auto}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9em}
td,th{border:1px solid #bbb;padding:.3em .6em;vertical-align:top;white-space:pre-wrap;text-align:left}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
pre{background:#f4f4f4;padding:1em;overflow-x:auto}.pass{color:#060}.fail{color:#a00}
</style>"""
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
            *(("score/mean", "score"), ("score/total", "total, less KL"), ("eval/score", "held-out")),
        ]),
        (f"{name}: KL to the reference, a whole answer", [("kl/sequence", "k1"), ("kl/sequence_k3", "k3")]),
        (f"{name}: losses", [("policy/loss", "policy"), ("value/loss", "value"), ("kl/loss", "KL")]),
        (f"{name}: answer length", [("rollout/length", "tokens")]),
        (f"{name}: entropy of a token", [("policy/entropy", "nats")]),
        (f"{name}: seconds of a step", [
            *(("time/flip_s", "flip"), ("time/prefill_s", "prefill"), ("time/decode_s", "decode")),
            *(("time/sample_s", "sample"), ("time/score_s", "score"), ("time/values_s", "values")),
            *(("time/logprobs_s", "log-probs"), ("time/reference_s", "reference"), ("time/update_s", "update")),
        ]),
    ]  # fmt: skip


# What is drawn for each stage, by the trainers' names.
PANELS: dict[str, Panels] = {
    "sft": [
        ("SFT: loss", [("loss", "training"), ("eval/loss", "held-out")]),
        (
            "SFT: share of tokens that are the likeliest",
            [
                ("mean_token_accuracy", "training"),
                ("eval/mean_token_accuracy", "held-out"),
            ],
        ),
    ],
    "reward": _pairs("Reward model"),
    "dpo": [
        *_pairs("DPO"),
        ("DPO: margin of the implicit reward", [("margin", "training"), ("eval/margin", "held-out")]),
    ],
    **{name: _online(name.upper()) for name in ("ppo", "grpo", "rloo")},
}

ROWS = 20  # of completions on a page


# ------------------------------------------------------------------------------------------ what the runs wrote


@dataclass
class RunFiles:
    """What one stage's folder holds."""

    name: str
    stage: str
    folder: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "delete it, or put back what it was") if path.is_file() else {}


def stage_folders(folder: str | Path) -> dict[str, Path]:
    """Stage name -> folder with metrics: the stages of a pipeline, or the one run that `folder` is."""
    folder = Path(folder)
    found = {s: folder / s for s in STAGES if (folder / s / "metrics.jsonl").is_file()}
    if not found and (folder / "metrics.jsonl").is_file():
        found = {_json(folder / "run.json").get("stage", "ppo"): folder}
    return found


def gather(folder: str | Path) -> list[RunFiles]:
    """The stages of a run or pipeline. Raises ConfigError where there is none."""
    folder = Path(folder)
    stages = stage_folders(folder)
    if not stages:
        what = (
            "is no folder" if not folder.is_dir() else "holds no run (no metrics.jsonl in it or its stages)"
        )
        raise ConfigError(f"{folder} {what}; name the output_dir of a run")
    out = []
    for stage, where in stages.items():
        run = _json(where / "run.json")
        name = folder.name if where == folder else f"{folder.name}/{stage}"
        certificate = _json(where / "certificate.json") or _json(folder / "certificate.json")
        out.append(
            RunFiles(
                name,
                stage,
                where,
                read_log(where, stage),
                read_lines(where / "completions.jsonl"),
                run.get("config", {}),
                run.get("versions", {}),
                _json(where / "result.json"),
                certificate,
                run,
            )
        )
    return out


def sentences(stage: str, result: Mapping[str, Any]) -> list[str]:
    """What a finished stage did, for people."""
    found = result.get("float16")
    if not found:
        return _sentences(stage, result)
    scale, skipped = (", ".join(f"{v:g}" for v in found[k]) for k in ("loss_scale", "skipped"))
    return [
        *_sentences(stage, result),
        f"float16: {skipped} steps left out for an overflow, loss scale {scale}.",
    ]


def _sentences(stage: str, result: Mapping[str, Any]) -> list[str]:
    seconds = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
    if stage == "sft":
        loss = f", held-out loss {result['eval_loss']:.3f}" if "eval_loss" in result else ""
        return [f"SFT: {result['steps']} steps{seconds}{loss}."]
    if stage == "reward":
        accuracy = ""
        if "eval_accuracy" in result:
            accuracy = (
                f", accuracy {result['eval_accuracy']:.3f} on {result['eval_pairs']} held-out pairs "
                f"(the longer answer is the better one in {result['eval_longer_wins']:.3f})"
            )
        return [f"Reward model: {result['steps']} steps{seconds}{accuracy}."]
    if stage == "dpo":
        accuracy = ""
        if "eval_accuracy" in result:
            accuracy = (
                f", accuracy of the implicit reward {result['eval_accuracy']:.3f} on held-out pairs, "
                f"margin {result['eval_margin']:.3f}"
            )
        return [f"DPO: {result['steps']} steps{seconds}{accuracy}."]
    return [f"{stage.upper()}: {result['steps']} steps{seconds}.", *evaluate.sentences(result)]


# ------------------------------------------------------------------------------------------------------- curves

Curve = tuple[str, list[float], list[float]]


def _smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential mean with the bias of its start taken out."""
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def curves(runs: Sequence[RunFiles]) -> list[tuple[str, list[Curve]]]:
    """(panel title, [(label, x, y)]) for everything that the runs logged; runs of one stage share a panel."""
    drawn: dict[str, list[Curve]] = {}
    for run in runs:
        several = sum(other.stage == run.stage for other in runs) > 1
        normed = run.settings.get("reward_norm", "none") != "none"
        for title, keys in PANELS.get(run.stage, []):
            for key, label in keys:
                name = names.logged(run.stage, key)
                points = [(line["step"], line[name]) for line in run.lines if line.get(name) is not None]
                if points:
                    label = f"{label}, of normed scores" if normed and key == "score/total" else label
                    label = f"{run.name}: {label}" if several else label
                    x, y = ([float(p[i]) for p in points] for i in range(2))
                    drawn.setdefault(title, []).append((label, x, y))
    return list(drawn.items())


PANEL = (4.2, 3.1)  # inches
MARGINS = {"left": 0.62, "right": 0.15, "bottom": 0.45, "top": 0.32}  # fixed: to fit them means to draw twice


def _panel(figure: Any, columns: int = 1, rows: int = 1, number: int = 0) -> Any:
    """The axes of panel `number` of a figure of so many columns and rows of panels, from the upper left."""
    (width, height), m = PANEL, MARGINS
    left, bottom = number % columns * width + m["left"], (rows - 1 - number // columns) * height + m["bottom"]
    size = (
        (width - m["left"] - m["right"]) / (columns * width),
        (height - m["bottom"] - m["top"]) / (rows * height),
    )
    return figure.add_axes((left / (columns * width), bottom / (rows * height), *size))


def _draw(axes: Any, title: str, lines: Sequence[Curve]) -> None:
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))  # labels that the left margin has room for
    axes.locator_params(axis="x", integer=True, nbins=6)
    for label, x, y in lines:
        noisy = len(y) > 15
        (line,) = axes.plot(x, _smooth(y) if noisy else y, label=label, marker="o" if len(y) < 3 else None)
        if noisy:
            axes.plot(x, y, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(lines) > 3:  # no corner is free for so many: above the lines, where room is made for it
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.35 * (high - low))
        axes.legend(fontsize=7, loc="upper center", ncols=3)
    elif len(lines) > 1:
        axes.legend(fontsize=7)


def plot(folder: str | Path, target: str | Path) -> Path | None:
    """Draw the curves of a run or pipeline into a PNG file; None if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = curves(gather(folder)) if stage_folders(folder) else []
    if not drawn:
        return None
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows))
    FigureCanvasAgg(figure)
    for i, (title, lines) in enumerate(drawn):
        _draw(_panel(figure, columns, rows, i), title, lines)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_bytes(target, picture.getvalue())
    return Path(target)


def _svg(number: int, title: str, lines: Sequence[Curve]) -> str:
    """Panel `number` of a page as an SVG element, its text as text, its ids its own."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL)
    FigureCanvasSVG(figure)
    _draw(_panel(figure), title, lines)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}p{number}-")
    return text[text.index("<svg") :]


# --------------------------------------------------------------------------------------------------------- page


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{html.escape(str(value))}</td>"
    if isinstance(value, float):
        return f"<td class='n'>{value:.4g}</td>"
    if isinstance(value, int):
        return f"<td class='n'>{value}</td>"
    return f"<td>{html.escape(str(value).strip())}</td>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML table of rows that share their keys."""
    heads = "".join(f"<th>{html.escape(str(h))}</th>" for h in rows[0])
    body = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>\n" for row in rows)
    return f"<div class='wide'><table><tr>{heads}</tr>\n{body}</table></div>"


def timings(run: RunFiles) -> list[dict[str, Any]]:
    """Mean seconds of each phase of a step and its share, the first step (warm-up) left out if there are more."""
    lines = run.lines[1:] or run.lines
    phases = {k for line in lines for k in line if k.startswith("time/") and k.endswith("_s")}
    phases -= {"time/step_s", "time/rollout_tokens_per_s"}
    whole = sum(line.get("time/step_s", 0.0) for line in lines) / max(len(lines), 1)
    rows = []
    for key in sorted(phases):
        mean = sum(line.get(key, 0.0) for line in lines) / len(lines)
        rows.append({"phase": key[5:-2], "seconds a step": mean, "share": mean / whole if whole else 0.0})
    rows.sort(key=lambda row: -float(row["seconds a step"]))
    if whole:
        rows.append({"phase": "the whole step", "seconds a step": whole, "share": 1.0})
    return rows


def _before_after(run: RunFiles) -> list[dict[str, Any]]:
    """Held-out answers before and after; without them the samples of the first and of the last step."""
    held = [r for r in run.completions if "before" in r]
    if held:
        return [{k: v for k, v in row.items() if k != "step"} for row in held[-ROWS:]]
    steps = dict.fromkeys(run.completions[i]["step"] for i in (0, -1))
    each = [[dict(r) for r in run.completions if r["step"] == step][: ROWS // len(steps)] for step in steps]
    return [row for rows in each for row in rows]


def _differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Settings in which runs of one stage differ, one row a setting."""
    keys = dict.fromkeys(k for run in runs for k in run.settings)
    rows = []
    for key in keys:
        values = [json.dumps(run.settings.get(key), ensure_ascii=False) for run in runs]
        if len(set(values)) > 1:
            rows.append({"setting": key, **{run.name: v for run, v in zip(runs, values, strict=True)}})
    return rows


def _certificate(run: RunFiles) -> list[str]:
    found = run.certificate
    if not found:
        return []
    good = bool(found.get("passed"))
    verdict = f"<p class='{'pass' if good else 'fail'}'>{'passed' if good else 'FAILED'}</p>"
    body = html.escape(json.dumps(found, indent=1, ensure_ascii=False))
    return [f"<h2>Certificate of {html.escape(run.name)}</h2>", verdict,
            f"<details><summary>all of it</summary><pre>{body}</pre></details>"]  # fmt: skip


def page(
    title: str, runs: Sequence[RunFiles], said: Sequence[str], table: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The HTML page. table: completions to show instead of those that the runs kept."""
    escape = html.escape
    out = ["<!doctype html><html lang='en'><head><meta charset='utf-8'>",
           "<meta name='viewport' content='width=device-width,initial-scale=1'>",
           f"<title>{escape(title)}</title>", STYLE, f"</head><body><h1>{escape(title)}</h1>"]  # fmt: skip
    out += ["<ul>", *(f"<li>{escape(s)}</li>" for s in said), "</ul>"]
    if drawn := curves(runs):
        out += [
            "<h2>Curves</h2><div class='curves'>",
            *(_svg(i, *panel) for i, panel in enumerate(drawn)),
            "</div>",
        ]
    if table:
        out += ["<h2>Answers</h2>", _table(table)]
    else:
        for run in runs:
            if rows := _before_after(run) if run.completions else []:
                out += [f"<h2>Answers of {escape(run.name)}</h2>", _table(rows)]
    for run in runs:
        if rows := timings(run) if run.lines else []:
            out += [f"<h2>Time of {escape(run.name)}</h2>", _table(rows)]
            memory = max((line.get("time/peak_memory_gib") or 0.0 for line in run.lines), default=0.0)
            speeds = [
                line["time/rollout_tokens_per_s"] for line in run.lines if "time/rollout_tokens_per_s" in line
            ]
            speed = f", rollouts at {sum(speeds) / len(speeds):.0f} tokens/s" if speeds else ""
            out.append(f"<p>Peak memory {memory:.2f} GiB{speed}.</p>")
        out += _certificate(run)
    for stage in dict.fromkeys(run.stage for run in runs):
        alike = [run for run in runs if run.stage == stage]
        if len(alike) > 1 and (rows := _differences(alike)):
            out += [f"<h2>Differences in settings: {escape(stage)}</h2>", _table(rows)]
    for run in runs:
        if run.settings:
            text = "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in run.settings.items())
            text += "\n\n# " + "\n# ".join(f"{k} {v}" for k, v in run.versions.items())
            summary = f"<summary>Settings and versions of {escape(run.name)}</summary>"
            out.append(f"<details>{summary}<pre>{escape(text)}</pre></details>")
    return "\n".join([*out, "</body></html>"]) + "\n"


def compare(folders: Sequence[str | Path], target: str | Path) -> Path:
    """The page of several runs at once."""
    runs = [run for folder in folders for run in gather(folder)]
    seen: dict[str, int] = {}
    for run in runs:  # two runs may lie in folders of one name
        seen[run.name] = seen.get(run.name, 0) + 1
        run.name += f" ({seen[run.name]})" if seen[run.name] > 1 else ""
    said = [
        s if len(runs) == 1 else f"{run.name}: {s}"
        for run in runs
        for s in (
            sentences(run.stage, run.result)
            if run.result
            else [f"{len(run.lines)} steps so far, not finished."]
        )
    ]
    title = " and ".join(dict.fromkeys(Path(f).resolve().name for f in folders))
    atomic_text(target, page(title, runs, said))
    return Path(target)


def write(
    folder: str | Path, title: str, sentences: Sequence[str], table: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """`curves.png`, `report.md` and `report.html` of a run: what it did in sentences, curves, some completions."""
    folder = Path(folder)
    picture = plot(folder, folder / "curves.png")
    md = [f"# {title}", "", *(f"- {s}" for s in sentences), ""]
    if picture:
        md += ["![curves](curves.png)", ""]
    if table:
        heads = list(table[0])
        cells = [
            [f"{v:.2f}" if isinstance(v, float) else str(v).strip() for v in row.values()] for row in table
        ]
        md += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        md += [
            "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells
        ]
    runs = gather(folder) if stage_folders(folder) else []
    atomic_text(folder / "report.html", page(title, runs, sentences, table))
    atomic_text(folder / "report.md", "\n".join(md) + "\n")
    return folder / "report.md"
