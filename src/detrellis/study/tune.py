"""Searches the fields of a recipe for those that score best on the validation split, with optuna.

Each trial is a run in a process of its own, as in every study. A search goes on where it was
stopped, and draws what it would have drawn: a proposal follows from the seed, its number and the
trials that have ended before it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from detrellis.atomic import replace_text
from detrellis.data.files import read_object
from detrellis.engine.log import read_records
from detrellis.errors import UserError, listed
from detrellis.folders import held
from detrellis.outputs import Outputs
from detrellis.recipes import Recipe
from detrellis.study.plan import DONE, SHOWN, Trial, TrialOutcome, changes
from detrellis.study.rows import check_row
from detrellis.study.run import Conditions, Resources, run_trials
from detrellis.study.space import Dimension, assignments, chosen, rounded

RESULT = "tune.json"
AS_IT_IS = "as it is"  # the first trial: the recipe without a change
INSTALL = "pip install 'detrellis[tune]'"
STARTUP = 8  # trials at random before those that learn from the others
COMPARED = 4  # finished trials without which none is pruned


@dataclass(frozen=True)
class Search:
    """What is searched: values of `space` for the recipe, in so many trials of one seed."""

    recipe: Recipe
    space: tuple[Dimension, ...]
    conditions: Conditions
    trials: int
    seed: int = 0
    prune: bool = True
    command: str = ""

    def settings(self) -> dict[str, Any]:
        """What another call has to repeat to go on with the search."""
        data, skip_bad = dict(self.conditions.data), self.conditions.skip_bad
        space = {dimension.field: dimension.text for dimension in self.space}
        recipe = self.recipe.model_dump(mode="json")
        return {
            "recipe": recipe,
            "search": space,
            "data": data,
            "seed": self.seed,
            "skip_bad": skip_bad,
        }


@dataclass
class Candidate:
    """One trial of a search: its values, what became of it,
    and the best AP so far after each evaluated epoch.
    """

    number: int
    drawn: dict[str, Any]  # as optuna knows them
    outcome: TrialOutcome | None = None  # None: the recipe refuses these values
    refused: str = ""
    curve: dict[int, float] = field(default_factory=dict)  # percent

    @property
    def values(self) -> dict[str, Any]:
        """What the recipe's fields are set to."""
        return {name: rounded(value) for name, value in self.drawn.items()}

    @property
    def state(self) -> str:
        """As of a study's trial, or `refused`."""
        return "refused" if self.outcome is None else self.outcome.state

    @property
    def ap(self) -> float | None:
        """Best AP of any epoch in percent."""
        return max(self.curve.values(), default=None)

    def read(self) -> None:
        """Read the curve from the run's log."""
        assert self.outcome is not None
        log = self.outcome.folder / "metrics.jsonl"
        best = 0.0
        for record in read_records(log) if log.exists() else []:
            if record["kind"] == "epoch" and record["eval"] and record["eval"]["AP"] is not None:
                best = max(best, 100 * record["eval"]["AP"])
                self.curve[record["epoch"]] = best

    def to_dict(self) -> dict[str, Any]:
        """The candidate as JSON holds it."""
        log = "" if self.outcome is None else self.outcome.log
        result = {"number": self.number, "state": self.state, "values": self.values}
        result |= {"drawn": self.drawn, "AP": self.ap}
        return result | ({"why": self.refused or log} if self.refused or log else {})


class Tuner:
    """The trials of a search: the recipe as it is, then what optuna proposes. See `TrialSource`."""

    def __init__(self, search: Search, out: Path) -> None:
        self.search, self.out = search, out
        self.outcomes: list[TrialOutcome] = []
        self.candidates: list[Candidate] = []
        self._asked: dict[int, Any] = {}  # optuna's trials that have not ended, by number
        self._study = _study(search)
        self._restore()

    def total(self) -> int:
        """Outcomes of the whole search; a trial that the recipe refuses has none."""
        most = max(self.search.trials, len(self.candidates))
        return most - sum(candidate.outcome is None for candidate in self.candidates)

    def unfinished(self) -> int:
        """Trials that have not come to their end, or have not begun."""
        ended = sum(c.state in ("finished", "pruned", "refused") for c in self.candidates)
        return max(self.search.trials, len(self.candidates)) - ended

    def next(self) -> TrialOutcome | None:
        """A trial that was stopped, or a new one while there are to be more."""
        for candidate in self.candidates:
            if candidate.outcome is not None and candidate.outcome.state == "waiting":
                return candidate.outcome
        while len(self.candidates) < self.search.trials:
            candidate = self._proposed(len(self.candidates))
            self.save()
            if candidate.outcome is not None:
                return candidate.outcome
        return None

    def ended(self, outcome: TrialOutcome) -> None:
        """Tell optuna what the trial scored."""
        candidate = self._of(outcome)
        candidate.read()
        self._tell(candidate)
        self.save()

    def hopeless(self, outcome: TrialOutcome) -> bool:
        """Whether it is below the median of the others after as many epochs."""
        candidate = self._of(outcome)
        trial = self._asked.get(candidate.number)
        if not self.search.prune or trial is None:
            return False
        known = set(candidate.curve)
        candidate.read()
        for epoch in sorted(set(candidate.curve) - known):
            trial.report(candidate.curve[epoch], epoch)
        return bool(trial.should_prune())

    def save(self) -> None:
        """Write `OUT/tune.json`."""
        content = self.search.settings() | {"command": self.search.command}
        content["trials"] = [candidate.to_dict() for candidate in self.candidates]
        self.out.mkdir(parents=True, exist_ok=True)
        replace_text(self.out / RESULT, json.dumps(content, indent=1))

    def importances(self) -> dict[str, float]:
        """How much of the scores' variation each field explains;
        empty where too few trials have ended.
        """
        import optuna

        scored = [trial for trial in self._study.trials if trial.value is not None]
        if len(scored) < STARTUP or len(self.search.space) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings(action="ignore"):
            importances: dict[str, float] = optuna.importance.get_param_importances(
                self._study, evaluator=evaluator
            )
        return importances

    def _of(self, outcome: TrialOutcome) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.outcome is outcome)

    def _proposed(self, number: int, drawn: Mapping[str, Any] | None = None) -> Candidate:
        """Add the trial of that number, with what was drawn for it before or is drawn now."""
        if number == 0:
            return self._added(Candidate(0, {}))
        self._study.sampler = _sampler(self.search.seed + number)
        if drawn is not None:
            self._study.enqueue_trial(dict(drawn))
        trial = self._study.ask(_distributions(self.search.space))
        self._asked[number] = trial
        return self._added(Candidate(number, dict(trial.params)))

    def _added(self, candidate: Candidate) -> Candidate:
        """Give the candidate a recipe, and with it a run, unless it is refused."""
        self.candidates.append(candidate)
        try:
            recipe = chosen(self.search.recipe, self.search.space, candidate.values)
            check_row(recipe, classes=2)
        except UserError as error:
            candidate.refused = error.message
            self._tell(candidate)
            return candidate
        name = f"trial-{candidate.number:03}" if candidate.number else AS_IT_IS
        trial = Trial(name, self.search.seed, recipe)
        candidate.outcome = TrialOutcome(trial, trial.folder(self.out))
        self.outcomes.append(candidate.outcome)
        return candidate

    def _tell(self, candidate: Candidate) -> None:
        """Say to optuna how a trial ended; of one that was pruned it knows the curve."""
        import optuna

        trial = self._asked.pop(candidate.number, None)
        if trial is None:
            return
        if candidate.state == "finished" and candidate.ap is not None:
            self._study.tell(trial, candidate.ap)
        else:
            pruned = candidate.state == "pruned"
            self._study.tell(
                trial, state=getattr(optuna.trial.TrialState, "PRUNED" if pruned else "FAIL")
            )

    def _restore(self) -> None:
        """Take over the trials of an earlier call; those that were stopped go on."""
        for number, record in enumerate(read_search(self.out, self.search)):
            candidate = self._proposed(number, record["drawn"])
            if candidate.outcome is not None:
                self._resume(candidate, candidate.outcome, pruned=record["state"] == "pruned")

    def _resume(self, candidate: Candidate, outcome: TrialOutcome, *, pruned: bool) -> None:
        """Tell optuna the curve of a trial's run, and how it ended, if it has."""
        candidate.read()
        if (asked := self._asked.get(candidate.number)) is not None:
            for epoch, ap in candidate.curve.items():
                asked.report(ap, epoch)
        if (outcome.folder / DONE).exists():
            outcome.state = "finished"
        elif pruned:
            outcome.state = "pruned"
        if outcome.state != "waiting":
            self._tell(candidate)


def tune(search: Search, out: Path, resources: Resources, console: Console) -> Tuner:
    """Train what is missing of the search below `out`,
    and write `tune.json` there after each trial.

    Raises `UserError` before anything is trained where optuna is missing, or another search is in
    the folder.
    """
    with held(out, new=True):
        tuner = Tuner(search, out)
        tuner.save()
        run_trials(tuner, search.conditions, resources, console)
        tuner.save()
    return tuner


def options(search: Search, candidate: Candidate) -> list[str]:
    """The words of a command that trains a candidate: `--scheme` and `-o`."""
    recipe = chosen(search.recipe, search.space, candidate.values)
    words = [
        word
        for text in assignments(search.space, candidate.values, recipe)
        for word in ("-o", text)
    ]
    if (schemes := candidate.values.get("schemes")) is None:
        return words
    return [
        "--scheme",
        ",".join(["none", *schemes.split("+")] if schemes != "none" else ["none"]),
        *words,
    ]


def read_search(out: Path, search: Search) -> list[dict[str, Any]]:
    """The trials that `OUT/tune.json` lists; none where there is no such file.

    Raises `UserError` where it is another search: what may grow is the number of trials.
    """
    path = out / RESULT
    if not path.exists():
        Outputs(out).alone()
        return []
    stored = read_object(path, again="Take another --out")
    now = json.loads(json.dumps(search.settings()))
    was = {name: stored.get(name) for name in now}
    differing = changes("", was, now)
    if differing or not isinstance(stored.get("trials"), list):
        said = listed([text.strip() for text in differing], SHOWN, "; ") or "it is not whole"
        raise UserError(
            f"{path}: another search: {said}",
            "Repeat its settings to go on, or take another --out.",
        )
    return list(stored["trials"])


def _study(search: Search) -> Any:
    """optuna's study, in memory: its trials are those of the folder."""
    try:
        import optuna
    except ImportError:
        raise UserError("tune needs optuna, which is not installed", INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warmup = 1 + search.recipe.schedule.epochs // 4  # before that a curve says little
    pruner = optuna.pruners.MedianPruner(n_startup_trials=COMPARED, n_warmup_steps=warmup)
    return optuna.create_study(direction="maximize", pruner=pruner)


def _sampler(seed: int) -> Any:
    """Proposals that follow from the seed and the trials so far;
    those that still run count as bad ones.
    """
    import optuna

    with warnings.catch_warnings(action="ignore"):  # both are called experimental
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, constant_liar=True, multivariate=True
        )


def _distributions(space: tuple[Dimension, ...]) -> dict[str, Any]:
    """What optuna draws from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for each in space:
        if each.choices:
            made[each.field] = CategoricalDistribution(each.choices)
        elif each.whole:
            made[each.field] = IntDistribution(int(each.low), int(each.high), log=each.log)
        else:
            made[each.field] = FloatDistribution(each.low, each.high, log=each.log)
    return made


def best_of(tuner: Tuner) -> Candidate | None:
    """The candidate with the highest AP of those that have finished."""
    finished = [c for c in tuner.candidates if c.state == "finished" and c.ap is not None]
    return max(finished, key=lambda c: c.ap or 0.0, default=None)
