"""A picture of where time went: of a job, or of a cluster's slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.recover.ledger import Category
from orchestrator.simulate.plot import check_plot
from orchestrator.views import AccountView, ClusterAccount

__all__ = ["COLOURS", "check_plot", "draw"]

COLOURS = {
    Category.TRAINING: "#54a24b",
    Category.EVALUATING: "#88d27a",
    Category.SAVING: "#4c78a8",
    Category.EXPORTING: "#9ecae9",
    Category.RUNNING: "#79706e",
    Category.STARTING: "#eeca3b",
    Category.LOST: "#e45756",
    Category.RECOVERING: "#f58518",
    Category.STOPPING: "#b279a2",
    Category.QUEUED: "#d8d5d2",
    Category.PAUSED: "#bab0ac",
}
UNITS = ((3 * 86400.0, 86400.0, "days"), (3 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
"""From which length on an axis is written in what."""


def draw(path: Path, view: AccountView | ClusterAccount) -> None:
    """Write the picture. Raises SpecError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot(path)
    rows = len(view.attempts) + 1 if isinstance(view, AccountView) else 0
    figure = Figure(figsize=(14, 5 if not rows else 2.2 + 0.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if isinstance(view, AccountView):
        _job(axes, view)
    else:
        _cluster(axes, view)
    try:
        figure.savefig(path, dpi=100)
    except OSError as problem:
        raise SpecError(
            f"cannot write {path}: {problem.strerror}", code="bad-plot", field="plot", hint="check its directory"
        ) from problem


def _job(axes: Any, view: AccountView) -> None:
    """A row for the waits and one for each attempt; of what is spread over a stretch, heights are the shares."""
    unit, name = _unit(view.wall_s)
    names = ["no attempt", *(f"attempt {one.number}" for one in view.attempts)]
    row_of = {None: 0} | {one.number: row for row, one in enumerate(view.attempts, start=1)}
    seen = set()
    for span in view.spans:
        left, width = (span.since - view.since) / unit, (span.until - span.since) / unit
        bottom, whole = row_of[span.attempt] - 0.4, sum(span.seconds.values())
        for category in COLOURS:
            height = 0.8 * span.seconds.get(category, 0.0) / whole
            if height > 0:
                axes.barh(bottom, width, height, left, align="edge", color=COLOURS[category], edgecolor="none")
                bottom += height
                seen.add(category)
    axes.set(xlim=(0, max(view.wall_s / unit, 1e-9)), ylim=(len(names) - 0.5, -0.5), xlabel=f"{name} since submission")
    axes.set_yticks(range(len(names)), names)
    share = "" if view.goodput is None else f", goodput {100 * view.goodput:.1f} %"
    axes.set_title(f"{view.job} ({view.state}){share}")
    _legend(axes, [category for category in COLOURS if category in seen])


def _cluster(axes: Any, view: ClusterAccount) -> None:
    """Slots by what they did, stacked, and how many there were."""
    unit, name = _unit(view.until - view.since)
    lefts = [(one.since - view.until) / unit for one in view.bins]
    width = (view.until - view.since) / max(1, len(view.bins))
    bottoms, seen = [0.0] * len(view.bins), []
    for category in COLOURS:
        heights = [one.slot_seconds.get(category, 0.0) / width for one in view.bins]
        if any(heights):
            axes.bar(lefts, heights, width / unit, bottoms, align="edge", color=COLOURS[category], edgecolor="none")
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
            seen.append(category)
    there = [float("nan") if one.offered_slot_s is None else one.offered_slot_s / width for one in view.bins]
    axes.stairs(there, [*lefts, 0.0], baseline=None, color="black", linewidth=1, label="slots")
    axes.set(xlim=(lefts[0] if lefts else -1, 0), ylim=(0, None), xlabel=f"{name} from now", ylabel="slots")
    axes.set_title("who held slots, and what for; the line is how many there were")
    _legend(axes, seen)


def _legend(axes: Any, categories: Sequence[Category]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[category], label=str(category)) for category in categories]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit, name) for least, unit, name in UNITS if seconds >= least)
