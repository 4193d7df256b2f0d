"""The training schemes of a recipe."""

from __future__ import annotations

from detrellis.fields import Config
from detrellis.schemes.config import (
    AlignConfig,
    CDNConfig,
    CoConfig,
    DNConfig,
    GroupConfig,
    HybridConfig,
    StableConfig,
)


class SchemesConfig(Config):
    """Training schemes; None: off."""

    dn: DNConfig | None = None
    cdn: CDNConfig | None = None
    hybrid: HybridConfig | None = None
    co: CoConfig | None = None  # before those that set what positives aim at: its labels stay
    align: AlignConfig | None = None
    stable: StableConfig | None = None
    group: GroupConfig | None = None
