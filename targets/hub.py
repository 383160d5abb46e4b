"""Models from the Hugging Face Hub: only the files that a compiled model is made of, at one commit."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from austeer.compiler.checkpoint import (
    CONFIG,
    COPIED,
    INDEX,
    WEIGHTS,
    is_copied,
    read_index,
    read_json,
    refuse_ambiguous,
    refuse_config,
    refuse_files,
)
from austeer.compiler.errors import CheckpointError

CARD = "README.md"


@dataclass(frozen=True)
class Fetched:
    """A model on this disk. `id` is its Hub id or its directory's name, `revision` the Hub's commit hash."""

    path: Path
    id: str
    revision: str | None


def fetch(model: str, revision: str | None = None) -> Fetched:
    """The model at a local path, which wins, or of a Hub id; `revision` is for the latter only.

    Downloads into the Hub's cache what is not there yet; where the Hub is out of reach, the cache has to do.
    Raises CheckpointError if there is no such model or no access to it, Refused if it is of an unsupported
    kind, which is found out before its weights are downloaded.
    """
    # The base class of whichever HTTP library huggingface_hub uses; it has changed more than once.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if model and os.path.lexists(model):
        return Fetched(Path(model), Path(model).resolve().name, None)
    _require_id(model)
    try:
        folder = _download(model, revision)
    except (OSError, HTTPError) as raised:
        error = _unwrapped(raised)
        cached = _cached(model, revision) if _out_of_reach(error) else None
        if cached is None:
            raise CheckpointError(_explain(error, model, revision)) from raised
        folder = cached
    # The cache keeps each commit in a directory of its name.
    return Fetched(folder, model, folder.name)


def content_sha256(file: Path) -> str | None:
    """The SHA-256 of a file's content where the Hub's cache names it, else None; the file is not read."""
    blob = file.resolve()
    named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if named else None


def _require_id(model: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        raise CheckpointError(
            f"{model}: there is no such directory, and a model of the Hub is written as org/name"
        ) from None


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi

    names = [file.rfilename for file in HfApi().model_info(model, revision=revision).siblings or ()]
    refuse_files(model, names)
    folder = _snapshot(model, revision, [name for name in names if is_copied(name) or name in {INDEX, CARD}])
    refuse_config(model, read_json(folder / CONFIG))
    places = read_index(folder / INDEX) if INDEX in names else {}
    refuse_ambiguous(model, names, places)
    return _snapshot(model, folder.name, places.values() or [WEIGHTS])


def _snapshot(model: str, revision: str | None, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = sorted({escape(name) for name in names})
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def _cached(model: str, revision: str | None) -> Path | None:
    """What the cache has of a model, if that is all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No `/`: a pattern's star would match it and demand files that were never fetched.
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(COPIED),
                ignore_patterns=["*/*"],
            )
        )
    except LocalEntryNotFoundError:
        return None
    places = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
    complete = all((folder / name).is_file() for name in {CONFIG, *(places.values() or [WEIGHTS])})
    return folder if complete else None


def _unwrapped(error: Exception) -> Exception:
    # For a file, huggingface_hub reports every trouble as "not in the cache either".
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def _out_of_reach(error: Exception) -> bool:
    # What has an errno is this machine's own trouble, such as a full disk.
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, OSError) or error.errno is None


def _explain(error: Exception, model: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model}"
    match error:
        case errors.GatedRepoError():
            return f"{model} is gated: accept its licence at {page}, then run `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"{model} has no revision {revision!r}; {page}/commits/main lists them"
        case errors.RepositoryNotFoundError():
            return (
                f"{model} is neither a local directory nor a Hub model. Check the spelling; "
                "if it is private, run `hf auth login`"
            )
        case errors.HfHubHTTPError() if error.response.status_code in {401, 403}:
            return f"{model}: the Hub denies access to {page} ({_first_line(error)}). Try `hf auth login`"
        case OSError() if error.errno is not None:
            return f"{model} cannot be stored in the Hub's cache: {error.strerror} ({constants.HF_HUB_CACHE})"
        case errors.OfflineModeIsEnabled():
            return f"{model} is not in the Hub's cache, and HF_HUB_OFFLINE forbids to download it"
        case _:
            return (
                f"{model} cannot be downloaded from {constants.ENDPOINT} ({_first_line(error)}), and the "
                "cache does not have all of it. Check the connection and run this again: a download continues"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
