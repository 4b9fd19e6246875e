"""The picture of a run: its loss, where its time went, and the load of every expert over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from moe_lm.report import differences, summary
from moe_lm.settings import Settings
from moe_lm.training import History

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_BLUE, _ORANGE, _GREEN, _SAND = "#2166ac", "#d6604d", "#3a9a6d", "#d9c8a5"


def draw(path: Path, machine: dict[str, Any], settings: Settings, history: History, single: History | None) -> None:
    """Draw the loss, where the time went, and the load of every expert over time."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _MUTED,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
        }
    )
    figure = plt.figure(
        figsize=(12, 7.2), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.91), hspace=0.06, wspace=0.04)
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.15), height_ratios=(1.6, 1.0))
    _draw_loss(figure.add_subplot(grid[0, 0]), history, single)
    _draw_time(figure.add_subplot(grid[1, 0]), history)
    _draw_load(figure, figure.add_subplot(grid[:, 1]), settings, history)
    figures = summary(history, settings, single)
    figure.text(
        0.012,
        0.98,
        f"Byte-level language model, {settings.layers} layers of {settings.experts} experts (top-{settings.top_k}), "
        f"on {machine['ranks']} MPI rank{'s' if machine['ranks'] != 1 else ''}",
        va="top",
        fontsize=14,
        fontweight="bold",
    )
    figure.text(
        0.012,
        0.94,
        f"Python's standard library, {figures['tokens_per_second']:,.0f} tokens/s on {machine['cpu']}, "
        f"{figures['seconds']:.0f} s; held-out text: {figures['held_out_bits_per_byte']:.2f} bits per byte",
        color=_MUTED,
        va="top",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_loss(axes: Axes, history: History, single: History | None) -> None:
    steps = [record.step for record in history.records]
    bits = np.array([record.bits for record in history.records])
    axes.plot(steps, bits, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(bits), color=_BLUE, linewidth=2, label="training, all ranks")
    if single is not None:
        single_bits = np.array([record.bits for record in single.records])
        label = f"one process (mean difference {np.mean(differences(history, single)):.4f})"
        axes.plot(
            [r.step for r in single.records], _smooth(single_bits), "--", color=_ORANGE, linewidth=1.5, label=label
        )
    eval_steps, eval_bits = zip(*history.evaluations, strict=True)
    axes.plot(eval_steps, eval_bits, "o", color=_INK, markersize=4, label="held-out files")
    axes.annotate(
        f"{eval_bits[-1]:.2f}", (eval_steps[-1], eval_bits[-1]), (0, 8), textcoords="offset points", ha="center"
    )
    axes.set_title("Loss")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, 8.3)
    axes.set_xlim(0, None)
    axes.legend(frameon=False, loc="upper right")
    _clean(axes)


def _draw_time(axes: Axes, history: History) -> None:
    """Shares of the step time, averaged over bins of steps."""
    records = history.records
    num_bins = min(60, len(records))
    bins = np.array_split(np.arange(len(records)), num_bins)
    total = np.array([sum(records[i].seconds for i in chosen) for chosen in bins])
    steps = [records[chosen[-1]].step for chosen in bins]
    base = np.zeros(num_bins)
    for key, label, color in (
        ("dispatch_seconds", "dispatch", _BLUE),
        ("combine_seconds", "combine", _GREEN),
        ("synchronize_seconds", "gradient average", _SAND),
    ):
        share = np.array([sum(getattr(records[i], key) for i in chosen) for chosen in bins]) / total * 100
        axes.fill_between(steps, base, base + share, color=color, label=f"{label} {share.mean():.0f} %", linewidth=0)
        base = base + share
    axes.set_title("Where the time goes, waiting for other ranks included")
    axes.set_ylabel("% of a step")
    axes.set_xlabel("step")
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(0, max(10.0, 1.5 * float(base.max())))
    axes.legend(frameon=False, loc="upper right", ncols=3, fontsize=9, handlelength=1.0, columnspacing=1.2)
    _clean(axes)


def _draw_load(figure: Figure, axes: Axes, settings: Settings, history: History) -> None:
    load = np.array(history.expert_load, dtype=float)  # [columns, layers, experts]
    relative = load / load.mean(axis=2, keepdims=True)
    picture = relative.transpose(1, 2, 0).reshape(settings.layers * settings.experts, -1)
    end = history.records[-1].step
    image = axes.imshow(
        picture, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest", extent=(0, end, len(picture), 0)
    )
    for layer in range(1, settings.layers):
        axes.axhline(layer * settings.experts, color="white", linewidth=3)
    axes.set_yticks(
        [(layer + 0.5) * settings.experts for layer in range(settings.layers)],
        [f"layer {layer}" for layer in range(settings.layers)],
        rotation=90,
        va="center",
    )
    axes.tick_params(axis="y", length=0)
    axes.set_title("Load of every expert over time")
    axes.set_xlabel("step")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=40, extend="max")
    bar.set_label("tokens of the expert / mean of its layer")
    bar.outline.set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window that shrinks at both ends."""
    half = max(1, len(values) // 80)
    sums = np.concatenate(([0.0], values.cumsum()))
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    begins = np.maximum(np.arange(len(values)) - half, 0)
    smooth: np.ndarray = (sums[ends] - sums[begins]) / (ends - begins)
    return smooth


def _clean(axes: Axes) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
