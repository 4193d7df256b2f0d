"""The record as one HTML page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from pathlib import Path

from detrellis.data.files import below_common_folder
from detrellis.engine.console import number
from detrellis.engine.eval_result import STATISTICS
from detrellis.report.charts import COLOURS, line_chart
from detrellis.report.record import Diagnosis, Operating, Picture, Report
from detrellis.version import __version__
from detrellis.webpage import document, facts, figure, table

SHOWN = 30  # rows of the longer tables
BACKGROUND = "(background)"
# Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020
TIDE = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too far off (IoU 0.1 to 0.5)",
    "Both": "wrong class, and box too far off",
    "Dupe": "an object found again",
    "Bkg": "background taken for an object",
    "Miss": "an object that nothing else explains is not found",
    "FP": "all false alarms together",
    "FN": "all missed objects together",
}


def page(report: Report) -> str:
    """The whole page, of which a reader needs no other file."""
    d, r = report.diagnosis, report.result
    folder, names = _short(report)
    interval = "" if r.ap_interval is None else f" ± {r.ap_interval:.3f} (95 %, over images)"
    answer = f"AP {number(r.ap)}{interval}, AP50 {number(r.stats['AP50'])}. {_point(d.best)}"
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="answer">{escape(answer)}</p>',
        table("COCO's statistics", STATISTICS, [[number(r.stats[name]) for name in STATISTICS]]),
        _training(report),
        "<h2>Classes</h2>",
        _classes(d),
        _curves(d),
        "<h2>What goes wrong</h2>",
        _tide(d),
        _confusions(d),
        f'<p class="soft">Pictures are in {escape(folder)}.</p>' if folder else "",
        *(
            _gallery(name, pictures, names)
            for name, pictures in report.galleries.items()
            if pictures
        ),
        "<h2>Labels that are probably wrong</h2>",
        _label_errors(d, names),
        "<h2>Do scores mean what they say?</h2>",
        _calibration(d),
        *(f"<h2>{escape(name)}</h2>\n{facts(values)}" for name, values in report.facts.items()),
        f"<details><summary>The whole recipe</summary><pre>{escape(report.recipe)}</pre></details>",
        f"<h2>Do it again</h2>\n<pre>{escape(report.command)}</pre>",
        f'<p class="soft">Written by Detrellis {escape(__version__)}. The numbers as JSON stand beside this file.</p>',
    ]
    return document(report.title, parts)


def _point(best: Operating) -> str:
    if best.threshold is None:
        return "No threshold: there are no boxes, or no detections."
    return (
        f"F1 at IoU 0.5 is highest, {number(best.f1)}, from score {best.threshold:.2f} on: of "
        f"what is detected {100 * (best.precision or 0):.0f} % is right, and "
        f"{100 * (best.recall or 0):.0f} % of the objects are found."
    )


def _training(report: Report) -> str:
    """The curves of the run."""
    history = report.history
    loss = {"loss": [(float(e.number), e.loss) for e in history if e.loss is not None]}
    ap = {"AP": [(float(e.number), e.ap) for e in history if e.ap is not None]}
    charts = [
        figure(line_chart(lines, "epoch", name), caption)
        for name, lines, caption in (
            ("AP", ap, "AP after each epoch."),
            ("loss", loss, "Mean loss of each epoch."),
        )
        if len(lines[name]) > 1
    ]
    return f'<h2>Training</h2>\n<div class="pair">{"".join(charts)}</div>' if charts else ""


def _classes(d: Diagnosis) -> str:
    of_ap = ("AP", "AP50", "small", "medium", "large")
    of_best = ("threshold", "F1", "precision", "recall")
    columns = ("class", *of_ap, "boxes", "detections", *of_best)
    rows = []
    for c in d.classes:
        values = (c.ap, c.ap50, *c.by_size)
        best = (c.best.threshold, c.best.f1, c.best.precision, c.best.recall)
        counts = (str(c.boxes), str(c.detections))
        rows.append((c.name, *map(number, values), *counts, *map(number, best)))
    title = (
        "AP by class and size; the threshold with the highest F1 at IoU 0.5, as predict "
        "--threshold auto takes it"
    )
    return table(title, columns, rows)


def _curves(d: Diagnosis) -> str:
    """Precision over recall of the classes with most boxes, and F1 over the threshold."""
    largest = sorted((c for c in d.classes if c.curve), key=lambda c: -c.boxes)[: len(COLOURS)]
    lines = {c.name: [(recall / 100, p) for recall, p in enumerate(c.curve)] for c in largest}
    f1 = {"all classes": [(threshold / 100, value) for threshold, value in enumerate(d.f1_curve)]}
    which = (
        "" if len(largest) == len(d.classes) else f" The {len(largest)} classes with most boxes."
    )
    charts = (
        figure(
            line_chart(lines, "recall", "precision", 1), f"Precision over recall at IoU 0.5.{which}"
        ),
        figure(
            line_chart(f1, "score threshold", "F1", 1),
            "F1 over the score threshold, all classes together.",
        ),
    )
    return f'<div class="pair">{"".join(charts)}</div>'


def _tide(d: Diagnosis) -> str:
    rows = [
        (name, TIDE[name], number(d.tide[name]), str(d.tide_counts.get(name, "")))
        for name in TIDE
        if name in d.tide
    ]
    return table(
        "AP50 that would be gained without them (TIDE)", ("error", "", "AP50", "detections"), rows
    )


def _confusions(d: Diagnosis) -> str:
    parts = []
    sure = "0.5" if d.best.threshold is None else f"{d.best.threshold:.2f}"
    if d.matrix:
        names = [*(c.name for c in d.classes), BACKGROUND]
        rows = [(name, *map(str, row)) for name, row in zip(names, d.matrix, strict=True)]
        title = (
            f"Confusion matrix from score {sure} on: rows are what the data set says, columns "
            "what is detected"
        )
        parts.append(table(title, ("", *names), rows))
    listed = [
        (c.given or BACKGROUND, c.detected or BACKGROUND, str(c.count))
        for c in d.confusions[:SHOWN]
    ]
    parts.append(
        table("The most frequent errors", ("the data set says", "detected", "times"), listed)
    )
    return "\n".join(parts)


def _short(report: Report) -> tuple[str, Mapping[str, str]]:
    """The folder that all shown pictures are in, and by its path the name of each in there."""
    files = {picture.file for pictures in report.galleries.values() for picture in pictures}
    files |= {error.file for error in report.diagnosis.label_errors}
    folder, names = below_common_folder([Path(file) for file in files])
    return folder, {file: names[Path(file)] for file in files}


def _gallery(name: str, pictures: tuple[Picture, ...], names: Mapping[str, str]) -> str:
    shown = "\n".join(
        f'<figure><img src="data:image/jpeg;base64,{b64encode(p.jpeg).decode()}" alt="{escape(p.caption)}"'
        f"><figcaption>{escape(p.caption)}<br>{escape(names[p.file])}</figcaption></figure>"
        for p in pictures
    )
    return f'<h3>{escape(name)}</h3>\n<div class="gallery">{shown}</div>'


def _label_errors(d: Diagnosis, names: Mapping[str, str]) -> str:
    if not d.label_errors:
        return "<p>None found.</p>"
    rows = [
        (
            names[e.file],
            "-" if e.annotation is None else str(e.annotation),
            e.given or "nothing",
            e.detected,
            number(e.score),
        )
        for e in d.label_errors[:SHOWN]
    ]
    columns = ("picture", "annotation", "the data set says", "detected", "score")
    title = (
        f"{len(rows)} of {d.label_errors_found} sure detections that contradict the data set; "
        "wrong labels first"
    )
    return table(title, columns, rows)


def _calibration(d: Diagnosis) -> str:
    rows = [
        (f"{n / 10:.1f} to {(n + 1) / 10:.1f}", str(b.count), number(b.score), number(b.right))
        for n, b in enumerate(d.calibration)
        if b.count
    ]
    text = (
        f"Scores are off by {d.calibration_error:.3f} on average: of those with 0.7, 7 in 10 "
        "should be right."
    )
    title = "Detections by score, and how many of them are right at IoU 0.5"
    return f"<p>{escape(text)}</p>" + table(
        title, ("score", "detections", "mean score", "right"), rows
    )
