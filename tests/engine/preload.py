"""What a training imports when it needs it:
a process that is forked from one with all this saves four seconds.
"""

from __future__ import annotations

import contextlib

import timm  # noqa: F401

import detrellis.api  # noqa: F401

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard  # noqa: F401
