"""What a user asks of restoring, checked before any model is loaded."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from austeer.compiler.errors import UsageError
from austeer.passes.schedule import Schedule

MOST_LR = 1e37  # beyond it the optimiser's own numbers overflow

TopHeads: TypeAlias = int | Literal["all"] | None


@dataclass(frozen=True)
class Task:
    """How many heads (None: half of them), how many lost components of each, and how to train them."""

    top_heads: TopHeads
    components: int
    schedule: Schedule

    def count(self, heads: int) -> int:
        """How many of so many heads; UsageError where there are not enough."""
        asked = heads if self.top_heads == "all" else self.top_heads or max(1, heads // 2)
        if asked > heads:
            raise UsageError(f"--top-heads {asked} is more than the {heads} heads of all layers; or say all")
        return asked

    def __post_init__(self) -> None:
        schedule = self.schedule
        counts = {"--top-heads": self.top_heads, "--components": self.components, "--batch-size": schedule.batch_size}
        for option, count in counts.items():
            if isinstance(count, int) and count < 1:
                raise UsageError(f"{option} must be at least 1, got {count}")
        if schedule.epochs is not None and schedule.epochs < 0:
            raise UsageError(f"--epochs must be 0, for lost components alone, or more, got {schedule.epochs}")
        if not 0 < schedule.lr <= MOST_LR:
            raise UsageError(f"--lr must be a number above 0, and at most {MOST_LR:g}, got {schedule.lr}")
