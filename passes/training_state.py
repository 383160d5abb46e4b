"""The state of a training on disk: what it needs to go on where it was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.compiler.errors import CheckpointError
from austeer.compiler.staging import write_atomically

METADATA_KEY = "austeer-training"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """After `step` steps: named arrays, among them what is trained and the best so far; held-out losses by step."""

    step: int
    arrays: Mapping[str, Any]
    losses: Mapping[int, float]


@dataclass(frozen=True)
class StateFile:
    """Where the state of a training is kept, and what makes it that training's."""

    path: Path
    identity: Mapping[str, str]

    def save(self, state: TrainingState) -> None:
        """Replaces what the file held, whole or not at all."""
        from safetensors.numpy import save

        body = {"identity": dict(self.identity), "step": state.step, "losses": [*state.losses.items()]}
        write_atomically(self.path, save(dict(state.arrays), metadata={METADATA_KEY: json.dumps(body)}))

    def load(self) -> TrainingState | None:
        """What the file holds, None if it is not there; CheckpointError for another training's, or no such file."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                body = json.loads(file.metadata()[METADATA_KEY])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            found, losses = dict(body["identity"]), {int(step): float(loss) for step, loss in body["losses"]}
            state = TrainingState(int(body["step"]), arrays, losses)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: not the state of a training ({error!r}); name another file") from None
        if differing := [name for name in self.identity if found.get(name) != self.identity[name]]:
            raise CheckpointError(
                f"{self.path}: it is the state of another training, with other {', '.join(differing)}; delete it to "
                "begin anew, or name another file with --checkpoint"
            )
        return state
