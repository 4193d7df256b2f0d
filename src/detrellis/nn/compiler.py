"""What `torch.compile` imports when it first compiles."""

from __future__ import annotations

import contextlib
import importlib
import logging

EXTENSIONS = "torch.utils.cpp_extension"


def import_compiler() -> None:
    """Import what is imported for a CPU's code,
    without its line that there is CUDA and no GPU: nobody asked for one.

    The line is logged by that import, where CUDA's tools are installed; call this before
    `torch.compile`. What else the module logs, then or later, is not touched.
    """
    logger = logging.getLogger(EXTENSIONS)
    logger.addFilter(_is_news)
    try:
        with contextlib.suppress(ImportError):  # then the compiler says whether it needs it
            importlib.import_module(EXTENSIONS)
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()
