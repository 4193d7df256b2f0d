"""Detrellis trains DETR-family object detectors on your own data.

>>> import detrellis
>>> result = detrellis.train("tiny", data="my_data", epochs=40)  # doctest: +SKIP
>>> detrellis.predict(result.run, "photo.jpg", out="pictures")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrellis.version import __version__ as __version__

if TYPE_CHECKING:
    from detrellis.api import (
        Model,
        Prediction,
        bench,
        convert,
        evaluate,
        export,
        info,
        load,
        predict,
        push,
        resume,
        serve,
        train,
    )
    from detrellis.errors import UserError

__all__ = ["Model", "Prediction", "UserError"]
__all__ += [
    "bench",
    "convert",
    "evaluate",
    "export",
    "info",
    "load",
    "predict",
    "push",
    "resume",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the interface when it is first used:
    torch takes seconds, `detrellis --help` need not.
    """
    if name == "UserError":
        from detrellis.errors import UserError

        return UserError
    if name in __all__:
        from detrellis import api

        return getattr(api, name)
    raise AttributeError(f"module 'detrellis' has no attribute {name!r}")
