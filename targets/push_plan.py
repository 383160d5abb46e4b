"""What a push will do: a compiled folder compared, file by file, with a repository of the Hub and with its base's."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from austeer.compiler.errors import Refused, UsageError
from austeer.compiler.manifest import MANIFEST
from austeer.compiler.progress import bar
from austeer.targets.contents import Contents, is_written
from austeer.targets.trouble import explained, trouble

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

Action = Literal["upload", "copy", "already there", "delete"]
ATTRIBUTES = ".gitattributes"  # the Hub puts it into every repository
CHUNK = 2**24


@dataclass(frozen=True)
class Step:
    """What happens to one file of the repository; `size` in bytes, `source` a path in the base's repository."""

    path: str
    size: int
    action: Action
    source: str | None = None


@dataclass(frozen=True)
class Remote:
    """A repository as it was read: its newest commit, None if there is no such repository, and its files."""

    id: str
    head: str | None
    private: bool
    files: "dict[str, RepoFile]"


@dataclass(frozen=True)
class Plan:
    """What a push will do. `kept` are the repository's files that no compile writes."""

    contents: Contents
    remote: Remote
    steps: tuple[Step, ...]
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def changes(self) -> tuple[Step, ...]:
        """The steps that change the repository."""
        return tuple(step for step in self.steps if step.action != "already there")

    def bytes_to(self, action: Action) -> int:
        """The size of all files that the action is for."""
        return sum(step.size for step in self.steps if step.action == action)


@dataclass(frozen=True)
class LocalFile:
    """A file of the compiled folder; it is read only where its size leaves a doubt."""

    path: Path
    size: int

    @cached_property
    def sha256(self) -> str:
        """As the Hub names large files."""
        return self._hexdigest(hashlib.sha256())

    @cached_property
    def git_sha1(self) -> str:
        """As git names small files."""
        return self._hexdigest(hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False))

    def equals(self, entry: "RepoFile") -> bool:
        """Whether a file of a repository has the same content."""
        if entry.size != self.size:
            return False
        return entry.lfs.sha256 == self.sha256 if entry.lfs else entry.blob_id == self.git_sha1

    def _hexdigest(self, digest: Any) -> str:
        with self.path.open("rb") as file, bar(f"Reading {self.path.name}", self.size) as advance:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                advance(len(chunk))
        return digest.hexdigest()


def plan(contents: Contents, repo: str, *, public: bool = False) -> Plan:
    """Compares a compiled folder with a repository and with its base's; changes nothing anywhere.

    Raises UsageError for a name that cannot be one or without a token, Refused if the repository holds something
    else or is public and `public` is not set, OutputError if the Hub denies access or is out of reach.
    """
    _require_name(repo)
    _require_token()
    with explained(repo):
        remote = read(repo)
    _refuse(remote, public=public)
    base, notes = _base_files(contents)
    if contents.revision is None and contents.card_base == contents.base:
        notes.append(
            f"the base was the local folder {contents.base!r}, so the card's base_model is no Hub id and links to "
            "nothing. Compile from the Hub id, or put it into the card"
        )
    if public and remote.head and remote.private:
        notes.append(f"{repo} is private and stays so; its settings on the Hub can make it public")
    kept = tuple(sorted(name for name in remote.files if name != ATTRIBUTES and not is_written(name)))
    return Plan(contents, remote, compare(contents, remote, base), kept, tuple(notes))


def read(repo: str) -> Remote:
    """A repository's newest commit and its files; raises the errors of huggingface_hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the token itself is bad: nothing is known of the repository
            raise
        return Remote(repo, None, private=True, files={})
    return Remote(repo, info.sha, bool(info.private), {file.path: file for file in _tree(repo, info.sha)})


def _tree(repo: str, revision: str | None) -> "Iterable[RepoFile]":
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = HfApi().list_repo_tree(repo, revision=revision, recursive=True)
    return (entry for entry in found if isinstance(entry, RepoFile))


def _base_files(contents: Contents) -> "tuple[dict[str, RepoFile], list[str]]":
    """The base's files that the Hub can copy, by their SHA-256."""
    if contents.revision is None:
        return {}, []
    try:
        files = list(_tree(contents.base, contents.revision))
    except trouble():
        return {}, [f"{contents.base} cannot be read on the Hub: what it has in common is uploaded, not copied"]
    return {file.lfs.sha256: file for file in files if file.lfs and file.xet_hash}, []


def compare(contents: Contents, remote: Remote, base: "dict[str, RepoFile]") -> tuple[Step, ...]:
    """What makes a repository hold `contents`; `base` has the files that the Hub can copy, by their SHA-256."""
    gone = [name for name in remote.files if name not in contents.files and is_written(name)]
    steps = [_step(contents.path, name, remote.files.get(name), base) for name in contents.files]
    steps += [Step(name, remote.files[name].size, "delete") for name in sorted(gone)]
    return tuple(steps)


def _step(folder: Path, name: str, there: "RepoFile | None", base: "dict[str, RepoFile]") -> Step:
    file = LocalFile(folder / name, (folder / name).stat().st_size)
    if there and file.equals(there):
        return Step(name, file.size, "already there")
    if any(file.size == entry.size for entry in base.values()) and file.sha256 in base:
        return Step(name, file.size, "copy", base[file.sha256].path)
    return Step(name, file.size, "upload")


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        named = "/" in repo
    except HFValidationError:
        named = False
    if not named:
        raise UsageError(f"{repo!r} cannot name a repository; write it as user/name or organisation/name")


def _require_token() -> None:
    from huggingface_hub import constants, get_token

    if get_token() is None:
        raise UsageError(
            f"no token of {constants.ENDPOINT} is stored here. Make one with write access at "
            f"{constants.ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )


def _refuse(remote: Remote, *, public: bool) -> None:
    if remote.head and not remote.private and not public:
        raise Refused(f"{remote.id} is public, and a push is private by default: add --public to publish this model")
    others = sorted(remote.files.keys() - {ATTRIBUTES})
    if others and MANIFEST not in others:
        raise Refused(
            f"{remote.id} has no {MANIFEST}, so what it holds ({', '.join(others[:3])}) was not pushed from here, and "
            "is not overwritten. Give another REPO_ID, or delete these files on the Hub first"
        )
    if ".gitignore" in others:
        raise Refused(f"{remote.id} has a .gitignore, by which the Hub may drop files of a push; delete it there first")
