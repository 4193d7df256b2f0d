"""The study in plain sentences: what to take, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Sequence

from detrellis.engine.evaluate import DOUBLED, NMS
from detrellis.study.numbers import Estimate
from detrellis.study.report import Line, Report

HARDLY = 5.0  # AP in percent below which a detector has hardly learned anything
RISING = 1.0  # AP gained in the last fifth of a run that is not over yet


def recommend(found: Report) -> str:
    """Which row to take, as far as the seeds can tell; or how many of a paper's gains were found again."""
    others = sorted(found.others, key=lambda line: -_gain(line).mean)
    base = found.plan.baseline
    if not others:
        return f"Nothing to compare yet: {base or 'a row'} and another one need a finished seed in common."
    if any(line.published_gain is not None for line in others):
        return _found_again(others)
    if base is None:
        return f"{len(others)} rows are compared, each with a baseline of its own."
    if all(_gain(line).seeds == 1 for line in others):
        return _one_seed(base, others[0])
    above = [line for line in others if _gain(line).sign > 0]
    if above:
        text = f"{above[0].name}: {gain_text(_gain(above[0]))}{_price(above[0], base)}.{_in_time(found, above[0])}"
        text += _also("Also above", base, above[1:])
        text += _also("Not told apart from", base, [line for line in others if _gain(line).sign == 0])
    else:
        text = f"No row is above {base} by more than the spread over the seeds; the best is {others[0].name}: "
        text += f"{gain_text(_gain(others[0]))}."
    return text + _also("Below", base, [line for line in others if _gain(line).sign < 0])


def _gain(line: Line) -> Estimate:
    assert line.gain is not None
    return line.gain


def gain_text(gain: Estimate) -> str:
    """`+3.1 AP (± 0.9, 95 % interval over 3 seeds)`."""
    if gain.interval is None:
        return f"{gain.mean:+.1f} AP (one seed)"
    return f"{gain.mean:+.1f} AP (± {gain.interval:.1f}, 95 % interval over {gain.seeds} seeds)"


def _price(line: Line, base: str) -> str:
    return "" if line.cost is None else f" at {line.cost:.2f} times the step time of {base}"


def _in_time(found: Report, line: Line) -> str:
    """What is left of the gain when training time, not epochs, is the same."""
    base = found.line(line.row.against)
    if base is None or base.timely is None or line.timely is None:
        return ""
    gain = line.timely[1] - base.timely[1]
    return f" After the same training time ({minutes(line.budget)}) it is {gain:+.1f} AP."


def _also(what: str, base: str, lines: Sequence[Line]) -> str:
    named = ", ".join(f"{line.name} ({_short(_gain(line))})" for line in lines)
    return f" {what} {base}: {named}." if lines else ""


def _short(gain: Estimate) -> str:
    return f"{gain.mean:+.1f}" + ("" if gain.interval is None else f" ± {gain.interval:.1f}")


def _one_seed(base: str, best: Line) -> str:
    gain = _gain(best).mean
    told = f"{best.name}, {gain:+.1f} AP against {base}{_price(best, base)}"
    first = f"the best is {told}" if gain > 0 else f"no row is above {base}; the nearest is {told}"
    return f"In the one seed that ran, {first}. One seed cannot tell how much of this is chance: run more (--seeds 3)."


def _found_again(others: Sequence[Line]) -> str:
    """Of the differences that a paper published: which are here too."""
    pairs = [(_gain(line), line.published_gain) for line in others if line.published_gain]
    same = [gain for gain, published in pairs if gain.mean * published > 0]
    text = f"Of {len(pairs)} published differences, {len(same)} have the same sign here"
    if all(gain.interval is None for gain, _ in pairs):
        return f"{text}. One seed cannot tell how much of this is chance: run more (--seeds 3)."
    clear = sum(gain.sign != 0 for gain in same)
    against = sum(gain.sign * published < 0 for gain, published in pairs)
    return f"{text}, {clear} of them beyond the spread over the seeds; {against} have the other sign beyond it."


def caveats(found: Report) -> list[str]:
    """What a reader has to know before believing a number."""
    return [*_of_seeds(found), *_of_budget(found), *_of_duplicates(found), *_of_setting(found)]


def _of_seeds(found: Report) -> list[str]:
    seeds, told = len(found.plan.seeds), []
    if seeds == 1:
        told.append("One seed: no interval can be given, and any difference may be chance.")
    if seeds == 2:
        told.append("Two seeds: an interval from two values is so wide that few differences can stand out.")
    if len(found.others) > 1 and seeds > 1:
        told.append(
            f"Each interval is for its row alone. Of {len(found.others)} rows compared, the best is partly the "
            "luckiest: repeat it with other seeds before relying on its figure."
        )
    if found.unfinished:
        named = ", ".join(f"{o.trial} ({o.state})" for o in found.unfinished)
        told.append(f"Not in the figures: {named}. The same command goes on with them.")
    return told


def _of_budget(found: Report) -> list[str]:
    told = []
    for base in (line for line in found.lines if line.name in found.plan.baselines):
        if base.final.mean < HARDLY:
            told.append(
                f"{base.name} ends at AP {base.final.mean:.1f}: it has hardly learned anything, and differences at "
                "this stage say little about longer runs. Give it more --epochs."
            )
        elif (rise := _late_rise(base)) is not None and rise > RISING:
            told.append(
                f"{base.name} still gains {rise:.1f} AP in the last fifth of its epochs: who learns faster is ahead "
                "here, and need not be after a longer run."
            )
    if found.plan.pace is not None:
        told.append(
            "All rows train for the same time, as far as whole epochs allow, by the step times measured before the "
            f"study: {', '.join(f'{row.name} {row.recipe.schedule.epochs}' for row in found.plan.rows)} epochs."
        )
    if any(line.timely is not None and line.timely[0] < line.curve[-1][0] for line in found.lines):
        told.append(
            "AP after the same training time reads slower rows before their learning rate has come down, which costs "
            "them some: it is a lower bound."
        )
    return told


def _of_duplicates(found: Report) -> list[str]:
    costs = {line.name: line.duplicates for line in found.lines if line.duplicates is not None}
    named = ", ".join(f"{name} {cost:+.1f}" for name, cost in costs.items() if cost > 100 * DOUBLED)
    if not named:
        return []
    return [
        f"Objects are found more than once: NMS at IoU {NMS} adds AP ({named}). One query for each object is what "
        "DETRs learn last. Train longer, or predict with --nms; and read gains after NMS beside those without."
    ]


def _late_rise(line: Line) -> float | None:
    """AP gained over the last fifth of the epochs."""
    last, ap = line.curve[-1]
    before = [value for epoch, value in line.curve if epoch <= 0.8 * last]
    return ap - before[-1] if before else None


def _of_setting(found: Report) -> list[str]:
    told = []
    if any(line.row.published is not None for line in found.lines):
        told.append(
            "The published figures are of the paper's network, data (COCO unless it says otherwise) and schedule. "
            "Where ours are smaller or shorter, compare signs and order of the gains, not their sizes."
        )
    runs = [run for line in found.lines for run in line.runs]
    timed = [run for run in runs if run.step_seconds is not None]
    if len({run.setting for run in runs}) > 1 and timed:
        device, threads, _ = timed[0].setting
        told.append(
            f"Times and memory are of the {len(timed)} runs on {device}, CPU threads {threads}; the other "
            f"{len(runs) - len(timed)} had another machine, or other numbers of threads or of runs at a time."
        )
    if timed and (timed[0].machine.get("jobs") or 1) > 1:
        told.append(f"{timed[0].machine['jobs']} runs at a time slowed each other down: read times as ratios.")
    told.append('AP is after the last epoch. "Best" picks an epoch on the split it is measured on, and flatters.')
    return told


def minutes(seconds: float | None) -> str:
    """`12.3 min`, or `45 s` where it is less than two."""
    if seconds is None:
        return "-"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
