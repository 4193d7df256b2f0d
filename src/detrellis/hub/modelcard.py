"""The model card of a run, as the Hugging Face Hub shows it: Markdown below a YAML front matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from detrellis.engine.card import Card
from detrellis.interop.files import HUB

# Of a report's data; not where they are
TOLD = ("Images", "Boxes", "Crowd regions", "Images without a box")


def model_card(
    card: Card, report: Mapping[str, Any], repository: str, licence: str | None, parameters: int
) -> str:
    """The text for `card`'s weights; `report` is what `report.json` holds, or empty.

    It says what is known: without a report there are no intervals and no AP by class, without an
    evaluation no AP.
    """
    result = report.get("result") or {}
    stats = result.get("stats") or card.stats or {}
    of = result.get("of") or ("mask" if card.recipe.needs_bitmaps else "box")
    front = yaml.safe_dump(
        _front(card, stats, of, repository, licence), sort_keys=False, allow_unicode=True
    )
    parts = [
        f"---\n{front}---\n",
        f"# {_text(repository.split('/')[1])}\n",
        f"{_about(card, parameters)}\n",
        _section("Accuracy", _accuracy(stats, of, result)),
        _section("Use", _use(repository)),
        _section("Classes", _classes(card, result)),
        _section("Data", _data(report)),
        _section("Training", _training(card)),
        _section(
            "Licence", f"{licence}." if licence else "No licence has been chosen for these weights."
        ),
    ]
    return "\n".join(parts)


def _front(
    card: Card, stats: Mapping[str, float | None], of: str, repository: str, licence: str | None
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "detrellis", "pipeline_tag": "object-detection"}
    front |= {"license": licence} if licence else {}
    front |= {"tags": ["object-detection", "detr", card.recipe.name]}
    metrics = [
        {"type": name.lower(), "name": f"{of} {name}", "value": round(100 * value, 1)}
        for name in ("AP", "AP50", "AP75")
        if (value := stats.get(name)) is not None
    ]
    if metrics:
        task = {"type": "object-detection"}
        data = {"name": "own data, validation split", "type": "custom"}
        results = [{"task": task, "dataset": data, "metrics": metrics}]
        front["model-index"] = [{"name": repository.split("/")[1], "results": results}]
    return front


def _about(card: Card, parameters: int) -> str:
    count = "1 class" if len(card.classes) == 1 else f"{len(card.classes)} classes"
    return (
        f"A detector of the recipe `{card.recipe.name}` for {count}, with {parameters / 1e6:.1f} "
        f"million parameters, trained with Detrellis {card.version}."
    )


def _accuracy(stats: Mapping[str, float | None], of: str, result: Mapping[str, Any]) -> str:
    known = {name: value for name, value in stats.items() if value is not None}
    if not known:
        return "These weights have not been evaluated."
    rows = [(name, f"{100 * value:.1f}") for name, value in known.items()]
    interval = result.get("ap_interval")
    text = f"On the validation split, after COCO, by the IoU of each {of}, in percent."
    if interval is not None:
        text += (
            f" AP is {100 * known['AP']:.1f} ± {100 * interval:.1f}: the 95 % interval over "
            "images like these."
        )
    return f"{text}\n\n{_table(('', 'value'), rows)}"


def _classes(card: Card, result: Mapping[str, Any]) -> str:
    scores = {row["name"]: row for row in result.get("per_class") or ()}
    if not scores:
        rows: list[Sequence[str]] = [
            (str(i), n) for i, n in zip(card.classes.ids, card.classes.names, strict=True)
        ]
        return _table(("id", "class"), rows)
    rows = []
    for id_, name in zip(card.classes.ids, card.classes.names, strict=True):
        row = scores.get(name, {})
        ap = row.get("ap")
        rows.append(
            (
                str(id_),
                name,
                "-" if ap is None else f"{100 * ap:.1f}",
                str(row.get("ground_truth", "-")),
            )
        )
    return _table(("id", "class", "AP", "boxes in the validation split"), rows)


def _data(report: Mapping[str, Any]) -> str:
    facts = (report.get("facts") or {}).get("Data") or {}
    rows = [(name, str(facts[name])) for name in TOLD if name in facts]
    if not rows:
        return "Nothing is known of the data. They are not part of this repository."
    text = "The validation split. Neither it nor the training data are part of this repository."
    return f"{text}\n\n{_table(('', ''), rows)}"


def _use(repository: str) -> str:
    place = f"{HUB}{repository}"
    python = (
        f'import detrellis\n\nmodel = detrellis.load("{place}")\nfor p in model.predict("photo.jpg", threshold=0.4):\n'
        "    print(p.names, p.scores, p.boxes)  # x1, y1, x2, y2 in pixels"
    )
    shell = (
        f"detrellis predict {place} photo.jpg\ndetrellis train --weights {place} --data my_data  "
        "# fine-tune it"
    )
    return f"```python\n{python}\n```\n\n```bash\n{shell}\n```"


def _training(card: Card) -> str:
    recipe = card.recipe
    schemes = [name for name, value in recipe.schemes.model_dump().items() if value is not None]
    rows = [
        ("recipe", recipe.name),
        ("training schemes", ", ".join(schemes) or "none"),
        ("epoch of these weights", f"{card.epoch} of {recipe.schedule.epochs}, step {card.step:,}"),
        ("batch size", str(recipe.optim.batch_size)),
        ("learning rate", f"{recipe.optim.lr:g}"),
        ("image size", str(recipe.data.size)),
        ("seed", str(card.seed)),
    ]
    rows += [("started from", card.weights)] if card.weights else []
    return f"{_table(('', ''), rows)}\n\nAll of it stands in `recipe.json`."


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: str) -> str:
    """Text that Markdown shows as it is, within a cell: names come from a data set."""
    plain = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#!" else c for c in plain)
