"""Draws docs/ratios.png, time relative to plain policy gradient, from the tables of docs/cost.md.

.venv-docs/bin/python docs/draw_costs.py
"""

import pathlib
import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent
HEADINGS = ("Layers written out one by one", "Layers scanned and rematerialised")
ROW = re.compile(r"^\| ([^|]+) \| ([\d.]+)(?: \[([\d.]+), ([\d.]+)\])? \|", re.MULTILINE)


def rows(page, heading):
    """Name, median, lower and upper quartile of each method below a heading."""
    section = page.split(f"### {heading}\n")[1].split("\n#")[0]
    for name, *numbers in ROW.findall(section):
        median, lower, upper = (float(x) if x else float(numbers[0]) for x in numbers)
        yield name, median, lower, upper


def main():
    """Draws a panel for each table."""
    page = (FOLDER / "cost.md").read_text()
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    for panel, heading in zip(panels, HEADINGS, strict=True):
        names, medians, lowers, uppers = zip(*rows(page, heading), strict=True)
        whiskers = [
            [median - lower for median, lower in zip(medians, lowers, strict=True)],
            [upper - median for median, upper in zip(medians, uppers, strict=True)],
        ]
        colours = ["#999999" if "plain" in name or "GRPO" in name else "#0072b2" for name in names]
        panel.barh(names, medians, xerr=whiskers, color=colours, capsize=2)
        for y, (median, upper) in enumerate(zip(medians, uppers, strict=True)):
            panel.text(upper + 0.03, y, f"{median:.2f}", va="center", fontsize=8)
        panel.axvline(1, color="black", linewidth=1)
        panel.invert_yaxis()
        panel.set(title=heading, xlim=(0, 1.12 * max(uppers)))
        panel.set_xlabel("time relative to the fastest plain form")
    figure.savefig(FOLDER / "ratios.png", dpi=130)


if __name__ == "__main__":
    main()
