"""Every stack of schemes on every recipe, and every scheme with one class and 2,000:
finite, in float32 and bf16.
"""

from __future__ import annotations

import pytest

from ..contract.models import CASES, recipe_of
from ..engine.test_distributed import SCHEMES
from ..small import distinct, small
from ..test_numbers import assert_finite, losses_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::detrellis.errors.Advice"),
    pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"]),
]


@pytest.mark.parametrize("case", distinct(CASES), ids="-".join)
def test_every_stack(case: tuple[str, str], amp: bool) -> None:
    assert_finite(losses_of(recipe_of(*case), 5, amp=amp))


@pytest.mark.parametrize("classes", [1, 2000])
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "ms"])
def test_every_scheme(scheme: str, classes: int, amp: bool) -> None:
    recipe = small("tiny", (scheme,)).override("detector.queries.count=100")
    assert_finite(losses_of(recipe, classes, amp=amp))
