"""The small run of the predictions' tests."""

from tests.predictions.conftest import model, run

__all__ = ["model", "run"]
