"""What goes wrong between this machine and the Hub while a model is pushed, in words."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from austeer.compiler.errors import OutputError

_AGAIN = "Run this again: what has arrived is not sent again"
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")  # hf_xet has the status in its text only
_MAYBE = "the repository is unchanged or complete, never in between"


def trouble() -> tuple[type[Exception], ...]:
    """What huggingface_hub and hf_xet raise; they have no base class in common."""
    from huggingface_hub.errors import (
        FileDuplicationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    )

    return OSError, HTTPError, FileDuplicationError, RuntimeError, ValueError


@contextmanager
def explained(repo: str) -> Generator[None]:
    """Turns what huggingface_hub raises into an OutputError that says what became of `repo`, and what to do."""
    try:
        yield
    except trouble() as error:
        raise OutputError(f"{repo}: {_explain(error, repo)}") from error


def is_about_copies(error: Exception) -> bool:
    """Whether it was the copying from another repository that failed."""
    from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.request.url.path.endswith("/lfs-files/duplicate")
    return isinstance(error, FileDuplicationError)


def _explain(error: Exception, repo: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause = _cause(error)
    where = f"{error} " if cause is not error else ""
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to reach the Hub; unset it to push"
    if isinstance(cause, ValueError):  # huggingface_hub's for a card that the Hub does not accept, among others
        return f"the Hub does not accept this push ({in_a_line(cause)}). Nothing was committed"
    if isinstance(cause, OSError) and cause.errno is not None and cause.filename:
        return f"{cause.filename} cannot be read: {cause.strerror}. Nothing was committed"
    status, owner = _status(cause), repo.partition("/")[0]
    match status:
        case 401:
            return f"{where}the Hub does not know the token (401). Nothing was committed. Run `hf auth login`"
        case 403:
            return (
                f"{where}the token may not write there (403{_said(cause)}). Nothing was committed. Use one with "
                f"write access to {owner}: {constants.ENDPOINT}/settings/tokens, then `hf auth login`"
            )
        case 409 | 412:
            return (
                f"{where}the repository was made or changed by somebody else meanwhile ({status}). Nothing was "
                "committed. Run this again to push on top of that; --dry-run shows what would change"
            )
        case None:
            return f"{where}the connection to {constants.ENDPOINT} broke ({in_a_line(cause)}); {_MAYBE}. {_AGAIN}"
        case _ if status >= 500:
            return f"{where}the Hub is in trouble ({status}{_said(cause)}); {_MAYBE}. {_AGAIN}"
        case _:
            return (
                f"{where}the Hub answered {status}{_said(cause)}. Nothing was committed; mend that and run this again"
            )


def _cause(error: Exception) -> Exception:
    # For a file, huggingface_hub raises a RuntimeError that names it, from the error itself.
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    named = _XET_STATUS.search(str(error))
    return int(named[1]) if named else None


def _said(error: Exception) -> str:
    message = getattr(error, "server_message", None)
    return f": {message}" if message else ""


def in_a_line(error: Exception) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
