"""`-o detector.queries.kind=anchors`:
one value of a recipe set by its dotted name, each name checked on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from detrellis.errors import UserError, brief, cut
from detrellis.fields import Config, configs_of, kind_of, unknown_name
from detrellis.recipes.values import read_value


def assign(data: dict[str, Any], config: type[Config], assignment: str) -> None:
    """Apply one `key.sub=value` to the plain data of a `config`; the value is read as YAML 1.2.

    Raises `UserError` for an unknown name, with the nearest one, and for what is no assignment.
    Whether the value fits is not checked here.
    """
    key, separator, value = assignment.partition("=")
    if not separator:
        raise UserError(
            f"-o {cut(assignment)}: no value",
            "Write -o key.sub=value, for example -o optim.lr=1e-4.",
        )
    try:
        parsed = read_value(value)
    except yaml.YAMLError:
        problem = f"-o {cut(assignment)}: {brief(value)} is not YAML"
        raise UserError(problem, "Quote it: -o 'data.size=[192, 256]'.") from None
    _set(data, config, key.strip().split("."), parsed, cut(assignment))


def merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with other values; a mapping changes what it names and leaves the rest."""
    result = dict(data)
    for name, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if inside else value
    return result


def _set(
    data: dict[str, Any], config: type[Config], path: list[str], value: Any, text: str
) -> None:
    """Set one value in nested plain data, checking each name against the class that holds it."""
    name, rest = path[0], path[1:]
    if name not in config.model_fields:
        raise _unknown(name, config, text)
    kinds = configs_of(config.model_fields[name].annotation)
    if not rest:
        data[name] = _whole(kinds, name, value, text)
        return
    if data.get(name) is None:
        data[name] = {}
    if not isinstance(data[name], dict):
        raise UserError(f"-o {text}: {name} has no parts", f"Write -o {name}=value.")
    if not kinds:  # a mapping with free keys
        data[name][".".join(rest)] = value
    elif len(kinds) == 1:
        _set(data[name], kinds[0], rest, value, text)
    elif rest == ["kind"]:
        data[name] = _switched(data[name], kinds, value, text)
    else:
        _set(data[name], _having(data[name], kinds, name, rest[0], text), rest, value, text)


def _whole(kinds: Sequence[type[Config]], name: str, value: Any, text: str) -> Any:
    """The value of a whole part. A scheme can be switched on and off; a kind alone is no part."""
    if len(kinds) == 1 and isinstance(value, bool):
        return {} if value else None
    if len(kinds) > 1 and isinstance(value, str):
        raise UserError(
            f"-o {text}: {name} has parts",
            f"Write -o {text.partition('=')[0].strip()}.kind={cut(value)}.",
        )
    return value


def _switched(
    data: Mapping[str, Any], kinds: Sequence[type[Config]], value: Any, text: str
) -> dict[str, Any]:
    """The data as another kind: fields that both have stay, all others have its defaults."""
    known = {kind_of(config): config for config in kinds}
    if value not in list(known):
        raise unknown_name(str(value), list(known), f"-o {text}")
    kept = {name: held for name, held in data.items() if name in known[value].model_fields}
    return kept | {"kind": value}


def _having(
    data: Mapping[str, Any], kinds: Sequence[type[Config]], part: str, name: str, text: str
) -> type[Config]:
    """The class of the data's kind;
    `UserError` that names the kinds that have the field, where this one has not.
    """
    current = next((config for config in kinds if kind_of(config) == data.get("kind")), kinds[0])
    if name in current.model_fields:
        return current
    others = [kind_of(config) for config in kinds if name in config.model_fields]
    if not others:
        every = dict.fromkeys(
            field for config in (current, *kinds) for field in config.model_fields
        )
        raise unknown_name(name, list(every), f"-o {text}")
    place = text.partition("=")[0].rpartition(f".{name}")[0].strip()
    raise UserError(
        f"-o {text}: {part}.kind={kind_of(current)} has no {brief(name)}",
        f"kind={' or '.join(others)} has it: before this, -o {place}.kind={others[0]}.",
    )


def _unknown(name: str, config: type[Config], text: str) -> UserError:
    """The error for a name that does not exist here,
    with the parts that have it, or the nearest one here.
    """
    parts = {part: configs_of(field.annotation) for part, field in config.model_fields.items()}
    having = [
        f"{part}.{name}"
        for part, kinds in parts.items()
        if any(name in kind.model_fields for kind in kinds)
    ]
    if having:
        return UserError(
            f"-o {text}: there is no {brief(name)}", f"Did you mean {' or '.join(having)}?"
        )
    return unknown_name(name, list(config.model_fields), f"-o {text}")
