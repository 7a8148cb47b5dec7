"""Draws the two pictures of docs/method.md, method_accumulation.svg and method_intra.svg.

    .venv-docs/bin/python docs/draw_method.py

They are sketches: the arrows and numbers are made up to show what the formulas do.
"""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent
SCORE, RUNNING, REMOVED, OWN = "#666666", "#1f5fa8", "#c0392b", "#1e8449"


def arrow(axes, start, end, color, label, at, dashed=False):
    """An arrow between two points, and its name at a third."""
    style = {"linestyle": (0, (3, 2))} if dashed else {}
    axes.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
        | style,
    )
    axes.text(*at, label, color=color, fontsize=11, ha="center", va="center")


def plane(axes, title):
    """A plane of parameters, with the level lines of the log-probability of one sequence."""
    for height in np.arange(-0.7, 3.5, 0.7):
        axes.plot([-1.4, 4.6], [height, height], color="#dddddd", lw=1, zorder=0)
    axes.set(xlim=(-1.4, 4.6), ylim=(-0.9, 3.5), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=12)
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def accumulation():
    """G loses its part along the score; then the microbatch's own gradient is added."""
    figure, (before, after) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    origin, total, left, own = (0, 0), (2.6, 2.3), (2.6, 0), (-0.9, 1.5)

    plane(before, "1. Remove from G what lies along the scores")
    arrow(before, (-0.95, -0.2), (-0.95, 1.6), SCORE, "score $s_i$", (-0.75, 1.95))
    arrow(before, origin, total, RUNNING, "G so far", (0.85, 1.55))
    arrow(before, left, total, REMOVED, "$P_S(G)$,\nremoved", (3.35, 1.2), dashed=True)
    arrow(before, origin, left, RUNNING, "what is left of G", (1.3, -0.35))
    before.text(4.5, 3.4, "grey lines: equal log-probability\nof the sequence", **NOTE)

    plane(after, "2. Add the microbatch's own gradient")
    end = (left[0] + own[0], left[1] + own[1])
    arrow(after, origin, left, RUNNING, "what is left of G", (1.3, -0.35))
    arrow(after, left, end, OWN, "$g_m$", (2.65, 0.95))
    arrow(after, origin, end, RUNNING, "new G", (0.45, 1.1))
    after.text(
        4.5, 3.4, "$g_m$ alone now decides how far this\nsequence's probability moves", **NOTE
    )
    return figure


NOTE = {"fontsize": 9.5, "color": "#555555", "ha": "right", "va": "top"}


def intra():
    """A kernel's gradient in the bases of its inputs and output gradients, before and after."""
    rng = np.random.default_rng(3)
    rows, columns, rank = 9, 12, 3
    decay = np.exp(-np.arange(rows) / 3)[:, None] * np.exp(-np.arange(columns) / 4)
    gradient = (0.5 + rng.random((rows, columns))) * decay
    projected = gradient.copy()
    projected[:rank, :rank] = 0
    figure, both = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    titles = ("A kernel's gradient $g_m$, seen in both bases", "After intra of rank 3")
    for axes, shown, title in zip(both, (gradient, projected), titles, strict=True):
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=gradient.max())
        axes.set_title(title, fontsize=12)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("directions of the output gradients D,\nstrongest at the left", fontsize=10)
        axes.set_ylabel("directions of the inputs X,\nstrongest at the top", fontsize=10)
        box = plt.Rectangle((-0.5, -0.5), rank, rank, fill=False, ec=REMOVED, lw=2.5)
        axes.add_patch(box)
    both[0].text(
        3.5, 6.5, "in the box: $Q_x^T\\, g_m\\, Q_d$,\nstrong in both, to be removed", color=REMOVED
    )
    both[1].text(3.5, 6.5, "the box is empty; the rest\nis as it was", color=REMOVED)
    return figure


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "proma_jax"
    for name, draw in [("method_accumulation", accumulation), ("method_intra", intra)]:
        draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
