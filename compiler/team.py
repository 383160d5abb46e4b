"""Several processes at one job, as `accelerate launch` or `torchrun` starts them; alone, all this does nothing."""

import atexit
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from austeer.compiler.errors import AusteerError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)  # the others wait while the first prepares


@dataclass(frozen=True)
class Team:
    """This process, number `rank` of `size`, and its torch device ("" where the user's choice stands).

    Those that end without a word exit with 0: a launcher kills the others once one has failed, and the message of the
    one that has something to say would be lost.
    """

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
            sys.exit()

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
        held = torch.tensor(value, dtype=torch.float64)
        self.add(held)
        return held.item()

    def stop(self, error: AusteerError) -> NoReturn:
        """For an error that every process has met: the first one raises it, the others end without a word."""
        if self.leads:
            raise error
        sys.exit()

    def _broadcast(self, value: Any) -> Any:
        held = [value]
        if self.size > 1:
            import torch

            torch.distributed.broadcast_object_list(held)
        return held[0]


def gather_team(device: str = "auto") -> Team:
    """The processes that were launched together with this one, each on a GPU of its own, or all on the CPU.

    Raises UsageError in the first one for a `device` that they cannot share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    import torch

    on_gpus = device != "cpu" and torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)
    mine = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else "cpu"
    team = Team(torch.distributed.get_rank(), torch.distributed.get_world_size(), mine)
    if device not in ("auto", "cpu", "cuda"):
        team.stop(UsageError(f"{team.size} processes take a device each: leave out --device {device}, or say cpu"))
    return team
