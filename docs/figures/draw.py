"""The method page's pictures. `python docs/figures/draw.py` writes them beside this file; the same input gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "digrap-scale", "font.family": "DejaVu Sans", "font.size": 10})

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY, RED = "#3b5bdb", "#e8590c", "#2f9e44", "#868e96", "#c92a2a"

LEGEND = (
    "d = θ − θ₀,  c = ⟨g,d⟩ / ‖d‖²\nα = learning rate,  μ = strength_lr\n"
    "′ = of the step before (d′ is computed\nagain from Adam's moments, or kept)"
)


def main() -> None:
    """Draw all of them."""
    for name, figure in {"projection": projection(), "loop": loop(), "shards": shards()}.items():
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")
        print(FOLDER / f"{name}.svg")


def project(g: np.ndarray, d: np.ndarray, strength: float) -> np.ndarray:
    """g̃ of one layer, as the page has it: g − ω · (⟨g,d⟩/‖d‖²) · d where ⟨g,d⟩ < 0, else g."""
    inner = float(g @ d)
    return g - strength * inner / float(d @ d) * d if inner < 0 else g


def projection() -> Figure:
    """Two layers in two dimensions: one in conflict, one not."""
    figure = Figure(figsize=(10.4, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    theta = d = np.array([2.2, 0.7])  # θ₀ is the origin
    for axes in (left, right):
        axes.plot(*np.array([[0, 0], theta]).T, color=GREY, linestyle=":", linewidth=1.5)
        axes.text(1.0, 0.62, "d = θ − θ₀", color=GREY, ha="right")
        _point(axes, np.zeros(2), "θ₀ pre-trained", (-1.3, -0.4))
        _point(axes, theta, "θ now", (-0.1, 0.2))
        axes.set_ylim(-2.45, 1.4)
        axes.set_aspect("equal")
        axes.axis("off")
    left.set_title("conflict, ⟨g, d⟩ < 0: the step leads away from θ₀", fontsize=10)
    g = np.array([-2.4, 1.9])
    for strength, color, label in (
        (0.0, BLUE, "−g, plain: ω = 0"),
        (0.5, ORANGE, "−g̃ at ω = 0.5"),
        (1.0, GREEN, "−g̃ at ω = 1 (PCGrad)"),
    ):
        end = theta - project(g, d, strength)
        _arrow(left, theta, end, color)
        side = ("left", 0.12) if strength < 1 else ("right", -0.12)
        left.text(end[0] + side[1], end[1] - 0.22, label, color=color, ha=side[0])
    ends = np.array([theta - g, theta - project(g, d, 1.0)])
    left.plot(*ends.T, color=GREY, linewidth=0.8, linestyle="--")
    left.text(3.05, -2.35, "what is taken away lies along d", color=GREY, fontsize=8)
    left.set_xlim(-1.4, 6.6)
    right.set_title("no conflict, ⟨g, d⟩ ≥ 0: the step leads back", fontsize=10)
    g = np.array([1.5, 1.7])
    _arrow(right, theta, theta - project(g, d, 0.5), BLUE)
    right.text(0.85, -1.1, "−g̃ = −g, whatever ω is", color=BLUE)
    right.set_xlim(-1.4, 4.8)
    return figure


def _point(axes: Axes, at: np.ndarray, label: str, shift: tuple[float, float]) -> None:
    axes.plot(*at, "o", color="black", markersize=5, zorder=3)
    axes.text(*(at + np.array(shift)), label)


def _arrow(axes: Axes, start: np.ndarray, end: np.ndarray, color: str) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    )


def loop() -> Figure:
    """What one step does for a layer, and what it hands to the next."""
    figure = Figure(figsize=(9.6, 3.9))
    axes = figure.subplots()
    boxes = {
        "g": (0.0, 2.0, "gradient g\nafter backward", GREY),
        "stats": (2.2, 2.0, "four sums\n⟨g,d⟩  ‖d‖²  ⟨g,d′⟩  ‖g‖²", BLUE),
        "omega": (5.1, 2.0, "ω ← clip(Adam(ω, h; μ), 0, 1)\nh = normalize(α′ · c′ · ⟨g,d′⟩)", ORANGE),
        "apply": (8.65, 2.0, "⟨g,d⟩ < 0?\ng̃ = g − ω·c·d", GREEN),
        "step": (8.65, 0.4, "the optimizer's\nown step on g̃", GREY),
        "keep": (4.5, 0.4, "kept of each layer, for the next step\nω and its two moments, c, ‖d‖², α", ORANGE),
    }
    edges: dict[str, tuple[float, float, float, float]] = {}
    for name, (x, y, text, color) in boxes.items():
        width = 0.09 * max(len(line) for line in text.splitlines()) + 0.3
        edges[name] = (x, y, x + width, y + 0.75)
        axes.add_patch(
            FancyBboxPatch((x, y), width, 0.75, boxstyle="round,pad=0.06", facecolor=color + "18", edgecolor=color)
        )
        axes.text(x + width / 2, y + 0.375, text, ha="center", va="center", fontsize=9)
    for one, other in (("g", "stats"), ("stats", "omega"), ("omega", "apply")):
        _flow(axes, (edges[one][2] + 0.07, 2.375), (edges[other][0] - 0.07, 2.375))
    middle = (edges["apply"][0] + edges["apply"][2]) / 2
    _flow(axes, (middle, 1.93), (middle, 1.22))
    _flow(axes, (6.6, 1.93), (6.6, 1.22), ORANGE)
    _flow(axes, (5.7, 1.22), (5.7, 1.93), ORANGE)
    axes.text(5.6, 1.52, "step t+1", ha="right", color=ORANGE, fontsize=8)
    axes.text(6.7, 1.52, "step t", color=ORANGE, fontsize=8)
    axes.text(2.2, 2.95, "one pass over memory, one all-reduce", color=BLUE, fontsize=8)
    axes.text(8.65, 2.95, "one pass over memory, in place", color=GREEN, fontsize=8)
    axes.text(
        0.0,
        0.35,
        LEGEND,
        fontsize=8,
        color=GREY,
    )
    axes.set_xlim(-0.2, 11.4)
    axes.set_ylim(0.1, 3.2)
    axes.axis("off")
    return figure


def shards() -> Figure:
    """Three ranks hold slices of two layers and of the reference; scalars meet, nothing else."""
    figure = Figure(figsize=(9.6, 4.6))
    axes = figure.subplots()
    colors = (BLUE, ORANGE, GREEN)
    for rank, color in enumerate(colors):
        y = 3.6 - 1.45 * rank
        axes.text(0.0, y + 0.35, f"rank {rank}", va="center", color=color, fontweight="bold")
        for start, elements, layer in ((1.1, (6, 6, 4)[rank], "A"), (4.2, (2, 1, 0)[rank], "B")):
            for row, name in enumerate(("g", "θ", "θ₀")):
                for i in range(elements):
                    axes.add_patch(
                        FancyBboxPatch(
                            (start + 0.33 * i, y + 0.66 - 0.33 * row),
                            0.26,
                            0.24,
                            boxstyle="square,pad=0",
                            facecolor=color + ("55", "88", "22")[row],
                            edgecolor=color,
                            linewidth=0.6,
                        )
                    )
                if layer == "A":
                    axes.text(start - 0.1, y + 0.78 - 0.33 * row, name, ha="right", va="center", fontsize=8)
            if elements == 0:
                axes.text(
                    start, y + 0.45, "no element of it,\nand still in the sum", fontsize=7, color=GREY, va="center"
                )
        _flow(axes, (5.75, y + 0.45), (6.45, y + 0.45), color)
        axes.text(6.55, y + 0.45, "[L × 4] partial sums\n32 bytes a layer", va="center", fontsize=8, color=color)
        _flow(axes, (8.35, y + 0.45), (9.05, 2.6 + 0.1 * (1 - rank)), color)
    axes.text(1.1, 4.75, "layer A: 16 elements", fontsize=9)
    axes.text(4.2, 4.75, "layer B: 3", fontsize=9)
    axes.add_patch(
        FancyBboxPatch((9.15, 2.05), 1.75, 1.1, boxstyle="round,pad=0.06", facecolor=RED + "14", edgecolor=RED)
    )
    axes.text(10.02, 2.6, "one all-reduce\n(float64)", ha="center", va="center", fontsize=9)
    axes.text(
        9.15,
        1.0,
        "the same ω, conflicts and\ngradient norm on every rank;\neach projects its own slices",
        fontsize=8,
        va="center",
    )
    axes.set_xlim(-0.1, 11.2)
    axes.set_ylim(0.4, 5.0)
    axes.axis("off")
    return figure


def _flow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.3})


if __name__ == "__main__":
    main()
