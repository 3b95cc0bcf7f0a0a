"""The plot of the results."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from bench import Line

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, THEIRS = "#d9480f", "#868e96"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the rates beside scripts, the CPU beside the yardstick, and the growth of memory and cost."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    _rates(axes[0], [line for line in lines if line.question.endswith("instances/s")])
    _costs(axes[1], [line for line in lines if line.question == "(a) CPU"])
    _growth(axes[2], [line for line in lines if line.question == "(b) memory"], "MB", "peak memory, MB")
    _growth(axes[3], [line for line in lines if line.question == "(f) growth"], "us", "CPU, µs an instance")
    figure.savefig(path, dpi=110)


def draw_bad_rows(lines: Sequence[Line], path: Path) -> None:
    """Draw what a bad row costs, in requests and in instances, by how frequent bad rows are."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    found = [line.numbers for line in lines if "bound" in line.numbers]
    for kind, (requests, instances) in zip(("scattered", "in groups"), (axes[:2], axes[2:]), strict=True):
        numbers = [one for one in found if one["kind"] == kind]
        shares = [100 * one["share"] for one in numbers]
        for name, color, style in (("halving", THEIRS, "o-"), ("bulkwf", OURS, "o-"), ("bulkwf, named", OURS, "o:")):
            requests.plot(shares, [one[name][0] for one in numbers], style, color=color, label=name)
            instances.plot(shares, [one[name][1] for one in numbers], style, color=color, label=name)
        requests.plot(shares, [one["bound"] for one in numbers], "--", color="black", linewidth=1, label="lower bound")
        requests.set_title(f"{kind}: further requests a bad row", fontsize=9)
        instances.set_title(f"{kind}: instances sent a row", fontsize=9)
    for one in axes:
        one.set_xscale("log")
        one.set_ylim(0)
        one.set_xlabel("bad rows, %")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def _rates(axes: plt.Axes, lines: Sequence[Line]) -> None:
    rates = {name: rate for line in lines for name, rate in line.numbers.items()}
    names = sorted(rates, key=rates.__getitem__)
    bars = axes.barh(names, [rates[name] for name in names], color=[OURS if n == "bulkwf" else THEIRS for n in names])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.3)
    axes.set_xticks([])
    axes.set_title("instances/s, 200,000 rows,\nstart-up included", fontsize=9)


def _costs(axes: plt.Axes, lines: Sequence[Line]) -> None:
    places = range(len(lines))
    for shift, name, color in ((-0.2, "bulkwf", OURS), (0.2, "yardstick", THEIRS)):
        bars = axes.bar(
            [p + shift for p in places], [line.numbers[name] for line in lines], 0.4, label=name, color=color
        )
        axes.bar_label(bars, fmt="{:.1f}", fontsize=7)
    axes.set_xticks(places, [line.case.replace(" rows of ", "\nof ") for line in lines], fontsize=7)
    axes.legend(frameon=False)
    axes.set_title("CPU, µs an instance", fontsize=9)


def _growth(axes: plt.Axes, lines: Sequence[Line], unit: str, title: str) -> None:
    for line in lines:
        axes.plot(line.numbers["rows"], line.numbers[unit], "o-", color=OURS)
    axes.set_xscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("rows")
    axes.set_title(title, fontsize=9)
