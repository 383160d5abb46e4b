"""How much of what pruning lost is back."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recovery:
    """One figure of the dense, the pruned and the restored model, measured on the same held-out samples.

    Less is better, as of a loss, unless `rising`.
    """

    dense: float
    pruned: float
    restored: float
    rising: bool = False

    @property
    def share(self) -> float | None:
        """Of what pruning lost, the part that is back: negative if more was lost, None where it lost nothing."""
        lost = self.pruned - self.dense
        return (self.pruned - self.restored) / lost if lost and (lost < 0) is self.rising else None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"dense": self.dense, "pruned": self.pruned, "restored": self.restored, "recovered": self.share}
