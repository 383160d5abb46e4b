"""Several processes at one job, as `accelerate launch` starts them; alone, everything here does nothing."""

import os
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)  # the others wait while the first prepares


@dataclass(frozen=True)
class Team:
    """This process, number `rank` of `size`, and its torch device ("" where the user's choice stands)."""

    rank: int = 0
    size: int = 1
    device: str = ""

    @property
    def leads(self) -> bool:
        """Whether this is the process that prepares, reports and writes."""
        return self.rank == 0

    def share(self, value: Value | None) -> Value:
        """What the first process has, in every process."""
        if self.size > 1:
            held = [value]
            import_module("accelerate.utils").broadcast_object_list(held, from_process=0)
            value = held[0]
        assert value is not None
        return value

    def add(self, *tensors: "Tensor") -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.size > 1:
            import torch

            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


def gather_team() -> Team:
    """The processes that were launched together with this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    state: Any = import_module("accelerate").PartialState(timeout=PATIENCE)
    return Team(state.process_index, state.num_processes, str(state.device))
