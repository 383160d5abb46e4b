"""The manifest austeer.json: what a compiled checkpoint was made from, how, and how exact it is."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckpointError

MANIFEST = "austeer.json"
# In a folder of its own: engines load every *.safetensors that lies beside the weights.
PROGRAM = "austeer/program.safetensors"
FORMAT = 1
_CHUNK = 2**24
VERSIONED = ("austeer-compile", "numpy", "safetensors", "torch", "transformers")


def describe_base(checkpoint: Checkpoint, name: str, revision: str | None, sha256: dict[str, str]) -> dict[str, Any]:
    """The base: its name, revision, and for every shard its size and the SHA-256 of its safetensors header.

    `sha256` holds the content hashes that are already known, by file name. No path, no user name.
    """
    files = {
        shard: {
            "size": checkpoint.headers[shard].size,
            "header_sha256": checkpoint.headers[shard].sha256,
            **({"sha256": sha256[shard]} if shard in sha256 else {}),
        }
        for shard in checkpoint.shards
    }
    return {"id": name, "revision": revision, "files": files}


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, which is read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    """The versions of this tool and of the libraries whose behaviour shows in its results."""
    return {name: version(name) for name in VERSIONED}


def render(manifest: dict[str, Any]) -> bytes:
    """The bytes of the file; equal content gives equal bytes."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a compiled checkpoint; CheckpointError if it has none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was not compiled by austeer-compile") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); compile again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT}; update austeer-compile or compile again")
    return manifest
