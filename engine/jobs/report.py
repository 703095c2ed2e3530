"""What is left of a run for people: a picture of its losses, and a page with its figures.

Reads metrics.jsonl and run.json, whoever wrote them. Knows no model.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from engine.jobs.folders import write_file
from engine.jobs.run_folder import RunFolder
from engine.jobs.run_log import MB, read_metrics

PACKAGES: Final = ("comboio", "torch", "transformers", "peft", "trl", "accelerate", "axonn")
SMOOTHING: Final = 0.9  # of the curve's running mean, from this many steps on
SMOOTH_FROM: Final = 50


def summarize(folder: RunFolder) -> dict[str, Any]:
    """The figures of a run, from its metrics."""
    events = read_metrics(folder.metrics)
    steps = [it for it in events if it.get("event") == "train"]
    looks = [it for it in events if it.get("event") == "validation"]
    epochs = [it for it in events if it.get("event") == "epoch"]
    seconds = sum(it["seconds"] for it in steps)
    memories = [it["memory"] for it in steps]
    best = min(looks, key=lambda it: it["loss"], default=None)
    busy = _values(memories, "gpu_busy")
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "first_validation_loss": looks[0]["loss"] if looks else None,
        "last_validation_loss": looks[-1]["loss"] if looks else None,
        "best_validation_loss": best["loss"] if best else None,
        "best_validation_step": best["step"] if best else None,
        "seconds": seconds,
        "tokens": sum(it["tokens"] for it in steps),
        "samples": sum(it["samples"] for it in steps),
        "tokens_per_s": sum(it["tokens"] for it in steps) / seconds if seconds else None,
        "samples_per_s": sum(it["samples"] for it in steps) / seconds if seconds else None,
        "epoch_seconds": [it["seconds"] for it in epochs],
        "peak_rss_bytes": max(_values(memories, "peak_rss_bytes"), default=None),
        "peak_gpu_bytes": max(_values(memories, "peak_gpu_bytes"), default=None),
        "gpu_busy": sum(busy) / len(busy) if busy else None,
    }


def write_curve(folder: RunFolder) -> bool:
    """Draw loss.png; False where matplotlib is not installed, without which a run goes well.

    Raises:
        Error: it cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    events = read_metrics(folder.metrics)
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _points(events, "train")
    many = len(steps) >= SMOOTH_FROM
    axes.plot(steps, losses, color="tab:blue", alpha=0.35 if many else 1.0, label="training")
    if many:
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, running mean")
    looked, validation = _points(events, "validation")
    if looked:
        axes.plot(looked, validation, "o-", color="tab:orange", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if steps or looked:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file(folder.curve, image.getvalue())
    return True


def write_report(folder: RunFolder, run: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write report.md.

    Args:
        run: as run.json has it.
        figures: from `summarize`.
    Raises:
        Error: it cannot be written.
    """
    write_file(folder.report, "\n".join(_page(folder, run, figures)) + "\n")


def versions() -> dict[str, str]:
    """Of what computed, without importing it."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def _page(folder: RunFolder, run: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    settings, data, model = run["settings"], run["data"], run["model"]
    lora, training = settings["lora"], settings["training"]
    lines = [
        f"# {settings['method'].upper()} of {model['name']}",
        "",
        *_table(
            [
                ("steps", f"{figures['steps']}"),
                ("training loss", _from_to(figures["first_loss"], figures["last_loss"])),
                (
                    "validation loss",
                    _from_to(figures["first_validation_loss"], figures["last_validation_loss"]),
                ),
                ("best validation loss", _best(figures)),
                ("time", f"{figures['seconds']:.1f} s of training"),
                ("time an epoch", _epochs(figures["epoch_seconds"])),
                ("speed", _speed(figures)),
                ("peak memory", _memory(figures)),
                ("GPU busy", _percent(figures["gpu_busy"])),
            ]
        ),
        "",
    ]
    if folder.curve.is_file():
        lines += [f"![losses]({folder.curve.name})", ""]
    lines += ["## Model", ""]
    lines += _table(
        [
            ("base model", f"`{model['reference']}`"),
            ("adapted layers", model["targets"]),
            ("trainable", f"{model['trainable']:,} of {model['weights']:,} weights"),
            (
                "LoRA",
                f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}"
                + (", rank-stabilised" if lora["rslora"] else "")
                + (", weight-decomposed (DoRA)" if lora["dora"] else ""),
            ),
            ("arithmetic", f"{run['dtype']} on {run['device']}"),
        ]
    )
    lines += ["", "## Training", ""]
    lines += _table(
        [
            (
                "rows a step",
                f"{training['batch_size']} x {training['accumulation']} x {run['processes']} "
                "(batch, accumulation, processes)",
            ),
            (
                "learning rate",
                f"{training['learning_rate']:g}, {training['schedule']}, "
                f"warmup {training['warmup']:g}",
            ),
            ("seed", str(training["seed"])),
        ]
    )
    lines += ["", "## Data", ""]
    lines += _table(
        (source["split"], f"{source['name']} ({source['shape']}, {source['samples']} samples)")
        for source in data["sources"]
    )
    lines += ["", *_split("training", data["train"])]
    if data["validation"]:
        lines += _split("validation", data["validation"])
    lines += [f"- {sentence}" for sentence in data["sentences"]]
    lines += ["", "## What to do with it", "", "```sh"]
    if folder.merged.is_dir():
        lines.append(f"manager generate --spawn 2 --model {folder.merged} PROMPT")
    else:
        lines.append(f"manager finetune merge --adapter {folder.adapters} --output {folder.merged}")
    lines += ["```", "", "## Versions", ""]
    lines += _table(list(run["versions"].items()))
    return lines


def _split(name: str, split: Mapping[str, Any]) -> list[str]:
    lengths = split["lengths"]
    return [
        f"- {name}: {split['samples']} samples in {split['rows']} rows, {split['tokens']} tokens, "
        f"{split['learnt_tokens']} of them learnt; lengths p50 {lengths['p50']}, "
        f"p95 {lengths['p95']}, longest {lengths['max']}"
    ]


def _table(rows: Any) -> list[str]:
    lines = ["| | |", "| --- | --- |"]
    return lines + [f"| {name} | {value} |" for name, value in rows if value]


def _from_to(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return ""
    return f"{first:.4f} at first, {last:.4f} at the end"


def _best(figures: Mapping[str, Any]) -> str:
    if figures["best_validation_loss"] is None:
        return ""
    return f"{figures['best_validation_loss']:.4f} after step {figures['best_validation_step']}"


def _epochs(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    return f"{sum(seconds) / len(seconds):.1f} s (mean of {len(seconds)})"


def _speed(figures: Mapping[str, Any]) -> str:
    if figures["tokens_per_s"] is None:
        return ""
    return f"{figures['tokens_per_s']:.0f} tokens/s, {figures['samples_per_s']:.1f} samples/s"


def _memory(figures: Mapping[str, Any]) -> str:
    if figures["peak_rss_bytes"] is None:
        return ""
    line = f"CPU {figures['peak_rss_bytes'] / MB:.0f} MB"
    if figures["peak_gpu_bytes"] is not None:
        line += f", GPU {figures['peak_gpu_bytes'] / MB:.0f} MB"
    return line


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _values(memories: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [it[name] for it in memories if it.get(name) is not None]


def _points(events: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    found = [it for it in events if it.get("event") == kind]
    return [it["step"] for it in found], [it["loss"] for it in found]


def _smoothed(values: Sequence[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        smooth.append(mean)
    return smooth
