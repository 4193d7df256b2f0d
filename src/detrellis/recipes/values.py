"""What stands behind `key=` on a command line:
YAML 1.2, where `1e-4` is a number, `no` is text, and `010` is ten.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from detrellis.yaml_reader import Unrolled, parse


class _Core(Unrolled, yaml.SafeLoader):
    """YAML 1.2's core schema: null, true and false, decimal numbers; everything else is text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's, which it copies before it adds to it)


NULL, BOOL, INT, FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_Core.add_implicit_resolver(NULL, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Core.add_implicit_resolver(BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Core.add_implicit_resolver(INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Core.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _int(loader: _Core, node: yaml.ScalarNode) -> int | float:
    """Python reads no number of thousands of digits; infinity is one that every range refuses."""
    digits = loader.construct_scalar(node)
    return int(digits) if len(digits) < 1000 else float("inf")


def _float(loader: _Core, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=[in])", "", loader.construct_scalar(node).lower()))


_Core.add_constructor(INT, _int)
_Core.add_constructor(FLOAT, _float)


def read_value(text: str) -> Any:
    """The value that `text` stands for. Raises `yaml.YAMLError`."""
    return parse(text, _Core)[1]
