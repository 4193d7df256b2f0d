"""The figure of `query_distance.py`: distances by branch, and the queries of one image a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detrellis.analysis.figures import BLUE, FAINT, INK, canvas, colours, heading, headline, tidy, value_bars
from detrellis.analysis.pictures import outline
from detrellis.analysis.query_distance import PlacedImage, QueryDistanceResult, RunQueryDistance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL, HEIGHT = (4.2, 6.4), 4.4  # inches: width of the bars and of a picture; height of a run
MATCHED, UNMATCHED = BLUE, FAINT  # the detector's own queries
MARKERS = "x+1234|"  # of the branches' queries: they may lie on each other


def draw(result: QueryDistanceResult) -> Figure:
    """A row a run: Fig. 7b, on one scale, and Fig. 7a. Raises `UserError` where matplotlib is missing."""
    runs = result.runs
    figure = canvas(sum(PANEL), HEIGHT * len(runs) + 0.5, "Distance of the branches' queries from the detector's")
    grid = figure.subplots(len(runs), 2, width_ratios=PANEL, squeeze=False)
    means = [mean for run in runs for mean in run.branches.values()]
    highest = max(value or 0 for mean in means for value in (mean.matched, mean.unmatched)) or 1
    for run, (left, right) in zip(runs, grid, strict=True):
        _bars(left, run, highest)
        if run.example is None:
            right.set_axis_off()
        else:
            _queries(right, run.example)
    return figure


def _bars(axes: Axes, run: RunQueryDistance, highest: float) -> None:
    tidy(axes)
    places = np.arange(len(run.branches))
    parts = list(run.branches.values())
    for shift, colour, label, values in (
        (-0.2, MATCHED, "to the matched query", [p.matched for p in parts]),
        (0.2, UNMATCHED, "to unmatched queries", [p.unmatched for p in parts]),
    ):
        value_bars(axes, places + shift, values, 0.37, color=colour, label=label)
    axes.set_xticks(places, list(run.branches), rotation=45 if len(parts) > 4 else 0)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.set_ylim(0, 1.3 * highest)
    axes.set_ylabel("distance, share of the image", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    headline(axes, run.name, f"mean of {max(p.counted for p in parts):,} boxes")


def _queries(axes: Axes, example: PlacedImage) -> None:
    picture, places = example
    height, width = picture.pixels.shape[:2]
    axes.imshow(picture.pixels, alpha=0.45)
    outline(axes, picture, INK)
    size = np.array([width, height])
    matched = places.matched[places.matched >= 0]
    free = np.delete(places.main.numpy(), matched.numpy(), axis=0)
    groups = [("main, unmatched", free, UNMATCHED, ".", 18)]
    _, *others = colours(len(places.positives) + 1)
    for i, (branch, positives) in enumerate(places.positives.items()):
        groups.append((f"{branch}, positive", positives.centres.numpy(), others[i], MARKERS[i % len(MARKERS)], 22))
    groups.append(("main, matched", places.main[matched].numpy(), MATCHED, "o", 26))
    for label, points, colour, marker, area in groups:
        x, y = (points * size - 0.5).T
        axes.scatter(x, y, s=area, c=colour, marker=marker, linewidths=0.9, label=label)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    heading(axes, "centres of queries in one image")
