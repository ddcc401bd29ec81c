"""A picture of simulations: who held which GPUs, use and queue over time, and distributions of JCT and wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.schedule.gang import HOUR_S
from orchestrator.simulate.engine import Outcome
from orchestrator.simulate.report import SIZES, jct, size_class

KINDS = (".png", ".svg", ".pdf")
MOST_NODES = 64
"""Of a chart of nodes, so many are drawn."""
POINTS = 400
"""Of a curve over time: means of so many equal spans."""
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2")


def check_plot(path: Path) -> None:
    """Raises SpecError if no picture can be written there."""
    if path.suffix not in KINDS:
        raise SpecError(
            f"no picture is named {path.name}", code="bad-plot", field="plot", hint=f"end it in {', '.join(KINDS)}"
        )
    if not path.parent.is_dir() or path.is_dir():
        raise SpecError(f"{path} cannot be written", code="bad-plot", field="plot", hint="name a file in a directory")


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the picture. Raises SpecError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot(path)
    charts = len(outcomes)
    figure = Figure(figsize=(14, 4 * charts + 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(charts + 2, 2, height_ratios=[1.6] * charts + [1, 1])
    hours = max(outcome.meter.now - outcome.meter.start for outcome in outcomes) / HOUR_S
    for row, outcome in enumerate(outcomes):
        _nodes(figure.add_subplot(grid[row, :]), outcome, hours)
    used, waiting = figure.add_subplot(grid[charts, 0]), figure.add_subplot(grid[charts, 1])
    jcts, waits = figure.add_subplot(grid[charts + 1, 0]), figure.add_subplot(grid[charts + 1, 1])
    for outcome in outcomes:
        meter, name = outcome.meter, outcome.policy
        middles, held = means(meter.times, meter.used_steps, meter.now)
        used.plot(middles, [one / outcome.slots for one in held], label=name, linewidth=1)
        waiting.plot(*means(meter.times, meter.waiting_steps, meter.now), label=name, linewidth=1)
        _distribution(jcts, sorted(map(jct, outcome.lives)), name)
        _distribution(waits, sorted(life.waited_s for life in outcome.lives), name)
    used.set(title="GPUs held", xlabel="hours", ylabel="share", ylim=(0, 1.02))
    waiting.set(title="jobs that wait", xlabel="hours", ylim=(0, None))
    jcts.set(title="job completion time", xlabel="seconds", ylabel="share of jobs", xscale="log")
    waits.set(title="wait", xlabel="seconds", xscale="symlog")
    for axes in (used, waiting, jcts, waits):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=100)
    except OSError as problem:
        raise SpecError(
            f"cannot write {path}: {problem.strerror}", code="bad-plot", field="plot", hint="check its directory"
        ) from problem


def _nodes(axes: Any, outcome: Outcome, hours: float) -> None:
    """A row for each GPU, a bar for each attempt, its colour the size of its gang."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    rows, first = {}, 0
    for node in outcome.nodes[:MOST_NODES]:
        rows[node.id] = first
        first += len(node.gpus) or node.cpu_slots
    bars: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in SIZES}
    for size, node_id, low, high, since, until in _held(outcome):
        if node_id in rows:
            bottom, top = rows[node_id] + low, rows[node_id] + high
            left, right = ((at - outcome.meter.start) / HOUR_S for at in (since, until))
            bars[size].append([(left, bottom), (right, bottom), (right, top), (left, top)])
    for colour, (_, several) in zip(COLOURS, bars.items(), strict=True):
        axes.add_collection(PolyCollection(several, facecolors=colour, edgecolors="none"))
    more = f", the first {MOST_NODES} of {len(outcome.nodes)} nodes" if len(outcome.nodes) > MOST_NODES else ""
    axes.set(
        xlim=(0, hours),
        ylim=(0, max(first, 1)),
        title=f"{outcome.policy}: who held which GPU{more}",
        xlabel="hours",
        ylabel="node",
    )
    step = max(1, len(rows) // 20)
    axes.set_yticks(list(rows.values())[::step], list(rows)[::step], fontsize="x-small")
    drawn = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, SIZES, strict=True) if bars[name]]
    axes.legend(handles=drawn, title="GPUs", fontsize="x-small", loc="upper right")


def _held(outcome: Outcome) -> Iterator[tuple[str, str, int, int, float, float]]:
    """Size class, node, first slot and the one after the last, from when to when: of all that was held."""
    for life in outcome.lives:
        size = size_class(life.job.num_gpus)
        for attempt in life.attempts:
            assert attempt.until is not None
            for share in attempt.placement.shares:
                for low, high in _spans(share.gpus or range(share.processes)):
                    yield size, share.node, low, high, attempt.since, attempt.until


def _spans(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring slots as one."""
    start = slots[0]
    for one, two in pairwise(slots):
        if two != one + 1:
            yield start, one + 1
            start = two
    yield start, slots[-1] + 1


def means(times: Sequence[float], steps: Sequence[int], end: float) -> tuple[list[float], list[float]]:
    """Middles of equal spans, in hours from the first time, and the mean of a step function in each."""
    start, width = times[0], (end - times[0]) / POINTS
    hours, found = [], []
    at = 0
    for point in range(POINTS):
        low, high = start + point * width, start + (point + 1) * width
        total, now = 0.0, low
        while at + 1 < len(times) and times[at + 1] <= high:
            total += steps[at] * (times[at + 1] - now)
            now = times[at + 1]
            at += 1
        hours.append((low + high - 2 * start) / 2 / HOUR_S)
        found.append((total + steps[at] * (high - now)) / width)
    return hours, found


def _distribution(axes: Any, ordered: Sequence[float], name: str) -> None:
    shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
    axes.step(ordered, shares, where="post", label=name, linewidth=1)
