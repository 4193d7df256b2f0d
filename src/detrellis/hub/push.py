"""`push`: a run's weights to the Hugging Face Hub, from where `hf:org/name` loads them again.

| file | holds |
| --- | --- |
| `model.safetensors` | the weights and their card |
| `README.md` | the model card, see `modelcard.py` |
| `recipe.json` | the recipe, to read |

Nothing else is sent: no pictures, no annotations, no log, and no path of this machine, which the
card of a run holds.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from detrellis.arguments import checked
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import find_weights, load_whole, save_weights
from detrellis.errors import UserError, first_line
from detrellis.hub.modelcard import model_card
from detrellis.interop.files import HUB, OURS
from detrellis.interop.load import is_foreign
from detrellis.report.write import is_ours, stored_report

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
TOKEN = re.compile(r"hf_\w+|(?i:bearer\s+)\S+")  # never printed, whoever puts it into a message


@dataclass(frozen=True)
class Pushed:
    """Where a detector is now."""

    repository: str
    url: str
    private: bool  # as it was asked for; a repository that was there before stays as it is
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@checked
def push(
    run: str | Path,
    repository: str,
    *,
    public: bool = False,
    licence: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Send the weights of a run to `org/name` on the Hugging Face Hub,
    with a model card made from the run.

    A new repository is private unless it is to be `public`. `licence` is that of the weights, as
    the hub writes it (`"apache-2.0"`); without one the card says that none was chosen. You have to
    be logged in there (`hf auth login`, or HF_TOKEN). Raises `UserError` where that fails, and
    before anything is sent where the run cannot be read.
    """
    repository = repository.removeprefix(HUB)
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository}: not the name of a repository", "Write organisation/name.")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(
            f"licence {licence!r}",
            "Give its name on the hub, such as apache-2.0, mit or cc-by-4.0.",
        )
    if is_foreign(run):
        raise UserError(
            f"{run}: not a run of Detrellis", "Give a run, or make one of it: detrellis convert."
        )
    file = find_weights(Path(run))
    weights, card = load_whole(file)
    clean = without_paths(card)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder, OURS), weights, clean)
        Path(folder, "recipe.json").write_text(
            clean.recipe.model_dump_json(indent=1), encoding="utf-8"
        )
        report = stored_report(file, card) if is_ours(file) else {}
        text = model_card(
            clean, report, repository, licence, sum(w.numel() for w in weights.values())
        )
        Path(folder, "README.md").write_text(text, encoding="utf-8")
        _upload(
            folder,
            repository,
            not public,
            message or f"{card.recipe.name} after {card.epoch} epochs",
        )
        names = tuple(sorted(path.name for path in Path(folder).iterdir()))
    return Pushed(repository, f"https://huggingface.co/{repository}", not public, names)


def without_paths(card: Card) -> Card:
    """The card without what only this machine has:
    where the data are, and the files that the run started from.
    """
    public = {
        name: value
        for name in ("weights", "boxes")
        if (value := getattr(card, name)) and value.startswith(HUB)
    }
    gone: dict[str, Any] = {
        "weights": None,
        "boxes": None,
        "backbone": None,
        "data": {},
        "changes": (),
    }
    return replace(card, recipe=card.recipe.untrained(), **gone | public)


def _upload(folder: str, repository: str, private: bool, message: str) -> None:
    """Send the files of a folder as one commit.
    Raises `UserError` where the library or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError:
        raise UserError(
            "huggingface_hub is not installed, which push needs", "pip install 'detrellis[hub]'"
        ) from None
    try:
        api = HfApi(library_name="detrellis")
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        reason = TOKEN.sub("***", first_line(error))
        remedy = (
            "Log in with a token that may write there (hf auth login, or HF_TOKEN), and check "
            "the connection."
        )
        raise UserError(f"{HUB}{repository}: cannot be sent ({reason})", remedy) from None
