"""YAML from anybody: plain data and nothing else, whatever the text holds.

An alias may stand for a word. One of a list or a mapping is refused: a few lines of them mean
billions of entries, or a list that holds itself.
"""

from __future__ import annotations

from typing import Any

import yaml

# What PyYAML's own code raises for `!!int x`, `!!timestamp x`, or a thousand brackets.
CARELESS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class Unrolled(yaml.parser.Parser, yaml.composer.Composer):
    """What a loader inherits before one of PyYAML's own."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node. Raises `yaml.YAMLError` for an alias of more than a word."""
        if self.check_event(yaml.AliasEvent):
            peek: Any = self.peek_event
            event = peek()
            if not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
                raise yaml.YAMLError(
                    f"an alias that is no word's: *{event.anchor}{event.start_mark}"
                )
        return super().compose_node(parent, index)


class Texts(Unrolled, yaml.BaseLoader):
    """All scalars are text."""


def parse(
    text: str, loader: type[yaml.BaseLoader | yaml.SafeLoader] = Texts
) -> tuple[yaml.Node | None, Any]:
    """The one document of a text:
    its nodes, which know their lines, and its value. Raises `yaml.YAMLError` alone.
    """
    try:
        reader = loader(text)
        node = reader.get_single_node()
        return node, None if node is None else reader.construct_document(node)
    except CARELESS as error:
        raise yaml.YAMLError(
            f"not understood: {str(error)[:200] or type(error).__name__}"
        ) from error
