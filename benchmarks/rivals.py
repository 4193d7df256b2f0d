"""The detectors that the four papers are compared with, at the size of `dino-r50 --scale tiny`,
each a scheme or a network part beside the base's contrastive denoising.

    python benchmarks/rivals.py --data shapes --epochs 4 --seeds 3 --out rivals

A study like those of `detrellis compare`, which has schemes for rows and not network parts. The
same command again goes on with what was stopped. `-o` sets fields of all rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detrellis.data.layout import find_data
from detrellis.recipes import Recipe, find_recipe, tiny_sized
from detrellis.study.conduct import conduct
from detrellis.study.plan import StudyPlan, StudyRow
from detrellis.study.rows import check_row, count_classes, with_exactly
from detrellis.study.tables import report_tables
from detrellis.study.words import caveats, recommend

BASE = "cdn"
BOXED = ("detector.cross_attention={kind: conditional, within_boxes: true}",)
QUALITY = ("detector.iou_branch=product", "loss.iou_branch=2", "loss.iou_error=l2")
FOCUS = "detector.encoder={kind: salience, layers: 2, hidden: 512, levels: 3, %s}"
# Schemes beside the base's, and fields that a row sets
ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    BASE: ((), ()),
    "DAC-DETR": (("dac",), ()),
    "MS-DETR": (("ms",), ("detector.decoder.cross_first=true",)),
    "Rank-DETR": (("rank",), ("detector.decoder.ranked=true",)),
    "SQR": (("sqr",), ()),
    "Relation-DETR": ((), ("detector.decoder.relation=true",)),
    "Cascade-DETR": ((), BOXED + QUALITY),
    "Stable-DINO": (("stable",), ("detector.encoder.fusion=true",)),
    "Salience-DETR": (
        (),
        (
            FOCUS % "targets: salience",
            "detector.queries.distinct=0.3",
            "detector.queries.distinct_by=cells",
        ),
    ),
    "Focus-DETR": ((), (FOCUS % "level_ratios: 0.5, targets: objects, background: false",)),
}


def row(name: str, base: Recipe) -> StudyRow:
    """The rival of that name, against the base."""
    schemes, fields = ROWS[name]
    recipe = with_exactly(base.override(fields), (BASE, *schemes))
    return StudyRow(name, recipe, None if name == BASE else BASE)


def plan(args: argparse.Namespace) -> StudyPlan:
    """The study; raises `UserError` for a row that cannot be built."""
    source = find_data(args.data)
    base = tiny_sized(find_recipe("dino-r50"))
    base = base.override([f"schedule.epochs={args.epochs}", *args.override])
    rows = tuple(row(name, base) for name in ROWS)
    classes = count_classes(source, False)
    for each in rows:
        check_row(each.recipe, classes)
    title = "rivals at the size of tiny"
    return StudyPlan(title, rows, source.to_dict(), tuple(range(args.seeds)))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", dest="override", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    report = conduct(plan(args), args.out, workers=0, device="cpu")
    for sheet in report_tables(report):
        print(sheet.title, "\t".join(sheet.columns), *map("\t".join, sheet.rows), sep="\n")
    print(recommend(report), *caveats(report), sep="\n")


if __name__ == "__main__":
    main()
