"""The study in plain sentences: what to take, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Sequence

from detrellis.engine.evaluate import DOUBLED, NMS
from detrellis.study.report import RowResult, StudyReport
from detrellis.study.results import Estimate

HARDLY = 5.0  # AP in percent below which a detector has hardly learned anything
RISING = 1.0  # AP that a fifth of a run gains while it is not over yet


def recommend(report: StudyReport) -> str:
    """Which row to take, as far as the seeds can tell;
    or how many of a paper's gains were found again.
    """
    others = sorted(report.others, key=lambda row: -_gain(row).mean)
    base = report.plan.baseline
    if not others:
        return (
            f"Nothing to compare yet: {base or 'a row'} and another one need a finished seed in "
            "common."
        )
    if any(row.published_gain is not None for row in others):
        return _found_again(others)
    if base is None:
        return f"{len(others)} rows are compared, each with a baseline of its own."
    if all(_gain(row).seeds == 1 for row in others):
        return _one_seed(base, others[0])
    above = [row for row in others if _gain(row).sign > 0]
    if above:
        text = (
            f"{above[0].name}: "
            f"{gain_text(_gain(above[0]))}{_price(above[0], base)}.{_in_time(report, above[0])}"
        )
        text += _also("Also above", base, above[1:])
        text += _also("Not told apart from", base, [row for row in others if _gain(row).sign == 0])
    else:
        text = (
            f"No row is above {base} by more than the spread over the seeds; the best is "
            f"{others[0].name}: "
        )
        text += f"{gain_text(_gain(others[0]))}."
    return text + _also("Below", base, [row for row in others if _gain(row).sign < 0])


def _gain(row: RowResult) -> Estimate:
    assert row.gain is not None
    return row.gain


def gain_text(gain: Estimate) -> str:
    """A gain in words, such as `+3.1 AP (± 0.9, 95 % interval over 3 seeds)`."""
    if gain.interval is None:
        return f"{gain.mean:+.1f} AP (one seed)"
    return f"{gain.mean:+.1f} AP (± {gain.interval:.1f}, 95 % interval over {gain.seeds} seeds)"


def _price(row: RowResult, base: str) -> str:
    return "" if row.cost is None else f" at {row.cost:.2f} times the step time of {base}"


def _in_time(report: StudyReport, row: RowResult) -> str:
    """The gain when training time, not epochs, is the same, as a sentence;
    empty where it is not known.
    """
    base = report.row(row.planned.against)
    if base is None or base.timely is None or row.timely is None:
        return ""
    gain = row.timely[1] - base.timely[1]
    return f" After the same training time ({minutes(row.budget)}) it is {gain:+.1f} AP."


def _also(what: str, base: str, rows: Sequence[RowResult]) -> str:
    named = ", ".join(f"{row.name} ({_short(_gain(row))})" for row in rows)
    return f" {what} {base}: {named}." if rows else ""


def _short(gain: Estimate) -> str:
    return f"{gain.mean:+.1f}" + ("" if gain.interval is None else f" ± {gain.interval:.1f}")


def _one_seed(base: str, best: RowResult) -> str:
    gain = _gain(best).mean
    what = f"{best.name}, {gain:+.1f} AP against {base}{_price(best, base)}"
    first = (
        f"the best is {what}"
        if round(gain, 1) > 0
        else f"no row is above {base}; the nearest is {what}"
    )
    return (
        f"In the one seed that ran, {first}. One seed cannot tell how much of this is chance: "
        "run more (--seeds 3)."
    )


def _found_again(others: Sequence[RowResult]) -> str:
    """How many of the differences that a paper published were found here too."""
    pairs = [(_gain(row), row.published_gain) for row in others if row.published_gain]
    same = [gain for gain, published in pairs if gain.mean * published > 0]
    text = f"Of {len(pairs)} published differences, {len(same)} have the same sign here"
    if all(gain.interval is None for gain, _ in pairs):
        return f"{text}. One seed cannot tell how much of this is chance: run more (--seeds 3)."
    clear = sum(gain.sign != 0 for gain in same)
    against = sum(gain.sign * published < 0 for gain, published in pairs)
    return (
        f"{text}, {clear} of them beyond the spread over the seeds; {against} have the other "
        "sign beyond it."
    )


def caveats(report: StudyReport) -> list[str]:
    """What a reader has to know before believing a number."""
    return [*_of_seeds(report), *_of_budget(report), *_of_duplicates(report), *_of_setting(report)]


def _of_seeds(report: StudyReport) -> list[str]:
    seeds, sentences = len(report.plan.seeds), []
    if seeds == 1:
        sentences.append("One seed: no interval can be given, and any difference may be chance.")
    if seeds == 2:
        sentences.append(
            "Two seeds: an interval from two values is so wide that few differences can stand out."
        )
    if len(report.others) > 1 and seeds > 1:
        sentences.append(
            f"Each interval is for its row alone. Of {len(report.others)} rows compared, the "
            "best is partly the luckiest: repeat it with other seeds before relying on its "
            "figure."
        )
    if report.unfinished:
        named = ", ".join(f"{o.trial} ({o.state})" for o in report.unfinished)
        sentences.append(f"Not in the figures: {named}. The same command goes on with them.")
    return sentences


def _of_budget(report: StudyReport) -> list[str]:
    sentences = []
    for base in (row for row in report.rows if row.name in report.plan.baselines):
        if base.final.mean < HARDLY:
            sentences.append(
                f"{base.name} ends at AP {base.final.mean:.1f}: it has hardly learned anything, "
                "and differences at this stage say little about longer runs. Give it more "
                "--epochs."
            )
        elif (late := _late_rise(base)) is not None:
            rise, epoch = late
            sentences.append(
                f"{base.name} still gains {rise:.1f} AP after epoch {epoch} of "
                f"{base.curve[-1][0]}: who learns faster is ahead here, and need not be after a "
                "longer run."
            )
    if report.plan.pace is not None:
        sentences.append(
            "All rows train for the same time, as far as whole epochs allow, by the step times "
            "measured before the study: "
            f"{', '.join(f'{row.name} {row.recipe.schedule.epochs}' for row in report.plan.rows)} "
            "epochs."
        )
    if any(row.timely is not None and row.timely[0] < row.curve[-1][0] for row in report.rows):
        sentences.append(
            "AP after the same training time reads slower rows before their learning rate has "
            "come down, which costs them some: it is a lower bound."
        )
    return sentences


def _of_duplicates(report: StudyReport) -> list[str]:
    costs = {row.name: row.duplicates for row in report.rows if row.duplicates is not None}
    named = ", ".join(f"{name} {cost:+.1f}" for name, cost in costs.items() if cost > 100 * DOUBLED)
    if not named:
        return []
    return [
        f"Objects are found more than once: NMS at IoU {NMS} adds AP ({named}). One query for "
        "each object is what DETRs learn last. Train longer, or predict with --nms; and read "
        "gains after NMS beside those without."
    ]


def _late_rise(row: RowResult) -> tuple[float, int] | None:
    """The AP gained since the last evaluation before the last fifth of the epochs, and the epoch
    of that; None where a fifth gained less than `RISING` of it on average.
    """
    last, ap = row.curve[-1]
    before = [(epoch, value) for epoch, value in row.curve if epoch <= 0.8 * last]
    if not before:
        return None
    epoch, value = before[-1]
    rise, fifths = ap - value, 5 * (last - epoch) / last
    return (rise, epoch) if rise / fifths > RISING else None


def _of_setting(report: StudyReport) -> list[str]:
    sentences = []
    if any(row.planned.published is not None for row in report.rows):
        sentences.append(
            "The published figures are of the paper's network, data (COCO unless it says "
            "otherwise) and schedule. Where ours are smaller or shorter, compare signs and "
            "order of the gains, not their sizes."
        )
    runs = [run for row in report.rows for run in row.runs]
    timed = [run for run in runs if run.step_seconds is not None]
    if len({run.setting for run in runs}) > 1 and timed:
        device, threads, _ = timed[0].setting
        sentences.append(
            f"Times and memory are of the {len(timed)} runs on {device}, CPU threads {threads}; "
            f"the other {len(runs) - len(timed)} had another machine, or other numbers of "
            "threads or of runs at a time."
        )
    if timed and (timed[0].machine.get("jobs") or 1) > 1:
        sentences.append(
            f"{timed[0].machine['jobs']} runs at a time slowed each other down: read times as "
            "ratios."
        )
    sentences.append(
        'AP is after the last epoch. "Best" picks an epoch on the split it is measured on, and flatters.'
    )
    return sentences


def minutes(seconds: float | None) -> str:
    """A time as `12.3 min`, or as `45 s` where it is less than two minutes."""
    if seconds is None:
        return "-"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
