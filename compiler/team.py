"""Several processes at one job, as `accelerate launch` starts them; alone, everything here does nothing."""

import atexit
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from austeer.compiler.errors import AusteerError

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

    @contextmanager
    def first(self) -> Generator[None]:
        """The first process goes through the context before the others; where it fails, they end without a word."""
        if self.leads:
            try:
                yield
            except Exception:
                self._broadcast(value=False)
                raise
            self._broadcast(value=True)
        elif self._broadcast(value=None):
            yield
        else:
            sys.exit(1)

    def share(self, make: Callable[[], Value]) -> Value:
        """What `make` gives in the first process, in every process; where it fails, the others end without a word."""
        made: Value | None = None
        with self.first():
            if self.leads:
                made = make()
        return cast("Value", self._broadcast(made))

    def add(self, tensor: "Tensor") -> None:
        """Replaces a tensor by its sum over all processes."""
        if self.size > 1:
            import torch

            torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        import torch

        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.add(held)
        return held.item()

    def stop(self, error: AusteerError) -> NoReturn:
        """Ends every process of the team, for all have met the error; the first one raises it."""
        if self.leads:
            raise error
        sys.exit(error.exit_code)

    def _broadcast(self, value: Any) -> Any:
        held = [value]
        if self.size > 1:
            import torch

            torch.distributed.broadcast_object_list(held)
        return held[0]


def gather_team() -> Team:
    """The processes that were launched together with this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    state: Any = import_module("accelerate").PartialState(timeout=PATIENCE)
    atexit.register(state.destroy_process_group)
    return Team(state.process_index, state.num_processes, str(state.device))
