"""What a Hub for tests holds: repositories, large files, a record of what it received, and the faults it is to make."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGE = 100_000  # bytes from which a file is an LFS file, besides .safetensors


@dataclass(frozen=True)
class Blob:
    """A file of a commit: a small one with its bytes, or a large one by its SHA-256."""

    size: int
    data: bytes | None = None
    sha256: str | None = None

    @property
    def git(self) -> str:
        content = self.data if self.data is not None else f"oid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)  # the large files that were uploaded or copied to it

    def commit(self, files: dict[str, Blob]) -> str:
        listing = repr([self.head if self.commits else "", *((name, files[name].git) for name in sorted(files))])
        self.commits.append((hashlib.sha1(listing.encode()).hexdigest(), files))
        return self.head

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Refusal(Exception):
    """An answer that is an error; `code` is the Hub's own, for huggingface_hub."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Fault:
    """A way to fail: an answer with `status`, or, without one, a connection cut after `cut` bytes of the body."""

    status: int | None
    cut: int
    times: int
    late: bool  # the request is carried out, and only its answer fails

    def strike(self) -> None:
        if self.status is None:
            raise ConnectionError
        # So huggingface_hub reads every 401 of the real Hub, whose URLs it knows.
        raise Refusal(self.status, "RepoNotFound" if self.status == 401 else "", "as the test wants it")


@dataclass
class Hub:
    """The state of the server. `received` has for each request its route, and the bytes of its body."""

    multipart: int | None = None  # the size of a part
    xet: Path | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    xet_hashes: dict[str, str] = field(default_factory=dict)  # of what went to the Xet store, by SHA-256
    faults: dict[str, Fault] = field(default_factory=dict)
    received: list[tuple[str, int]] = field(default_factory=list)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    lose: str | None = None  # the SHA-256 of a large file that never arrives
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def publish(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
        """A repository with these files, as if long there; returns its commit."""
        repository = self.repositories.setdefault(name, Repository(private))
        blobs = {path: self._stored(repository, path, data) for path, data in files.items()}
        return repository.commit({".gitattributes": Blob(3, b"lfs"), **blobs})

    def _stored(self, repository: Repository, path: str, data: bytes) -> Blob:
        if not is_large(path, len(data)):
            return Blob(len(data), data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects[sha256], self.sizes[sha256] = data, len(data)
        repository.objects.add(sha256)
        return Blob(len(data), sha256=sha256)

    def content(self, name: str) -> dict[str, bytes]:
        """The files at the head of a repository."""
        files = self.repositories[name].files
        return {
            path: blob.data if blob.data is not None else self.objects[blob.sha256 or ""]
            for path, blob in files.items()
            if path != ".gitattributes"
        }

    def fail(
        self, route: str, status: int | None = None, *, cut: int = 0, times: int = 1000, late: bool = False
    ) -> None:
        """Lets the next requests of a route fail with a status or, without one, by a cut connection."""
        self.faults[route] = Fault(status, cut, times, late)

    def fault(self, route: str) -> Fault | None:
        """The fault that a request of this route has to suffer."""
        with self.lock:
            fault = self.faults.get(route)
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault

    def bytes_received(self, *routes: str) -> int:
        return sum(size for route, size in self.received if route in routes)

    def requests(self, route: str) -> int:
        return sum(name == route for name, _ in self.received)

    def xet_hash(self, blob: Blob) -> str:
        return self.xet_hashes.get(blob.sha256 or "", blob.sha256 or "")


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > LARGE
