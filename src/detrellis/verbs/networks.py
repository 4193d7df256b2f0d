"""`info` and `bench`: what a recipe costs."""

from __future__ import annotations

from collections.abc import Sequence

from detrellis.arguments import Classes, Runs, Scale, Threads, Warmup, checked
from detrellis.engine.bench import BenchResult, bench_recipe
from detrellis.engine.measure import RecipeInfo, measure
from detrellis.errors import UserError
from detrellis.recipes import Recipe, choose_recipe


@checked
def info(
    recipe: str | Recipe,
    *,
    classes: Classes = 80,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
) -> RecipeInfo:
    """Parameters, multiply-adds and training schemes of a recipe;
    `scale`, `scheme` and `override` as in `train`.
    """
    return measure(choose_recipe(recipe, scale, scheme, override), classes)


@checked
def bench(
    recipe: str | Recipe,
    *,
    classes: Classes = 80,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
    batch_sizes: str | int | Sequence[int] = 1,
    size: str | int | tuple[int, int] | None = None,
    threads: Threads | None = None,
    compiled: bool = False,
    train: bool = False,
    runs: Runs = 10,
    warmup: Warmup = 2,
    device: str | None = None,
    half: bool = False,
) -> BenchResult:
    """Latency and throughput of a recipe with random weights:
    inference, or with `train` a training step.

    Times `runs` passes at each of `batch_sizes` (`"1,2,4"`, a number or numbers) after `warmup`
    untimed ones. `size` is the height and width of the images, `"640x480"` or a pair, or the short
    side of a landscape image; by default the recipe's. `threads` are those of the CPU (default:
    torch's), `compiled` takes `torch.compile` and times eager too, and `half` lets inference
    compute products in bfloat16.
    """
    if train and half:
        raise UserError(
            "half precision of a training step", "The recipe says it: -o optim.amp=true or false."
        )
    return bench_recipe(
        choose_recipe(recipe, scale, scheme, override),
        classes,
        batch_sizes=batch_sizes,
        size=size,
        threads=threads,
        compiled=compiled,
        task="training step" if train else "half" if half else "inference",
        runs=runs,
        warmup=warmup,
        device=device,
    )
