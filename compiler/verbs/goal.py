"""What a user asks of steering, checked before any model is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from austeer.compiler.errors import UsageError
from austeer.compiler.sites import SiteName
from austeer.compiler.verbs.adaptive import Adaptive
from austeer.compiler.verbs.methods import METHODS, Method
from austeer.passes.steer2edit import elastic_net


@dataclass(frozen=True)
class Goal:
    """What is asked of the edits: where, how many, how strong, and how far the model may drift (nats per token).

    `rho` and `l1_ratio`, Steer2Edit's own terms, decide both how many and how strong. `trials` is the length of the
    search for what is left open, `study` the file that keeps it. `segments` is Fusion Steering's number of weights.
    """

    method: Method
    sites: tuple[SiteName, ...]
    top_k: int | None
    alpha: float | None
    max_drift: float
    rho: float | None = None
    l1_ratio: float | None = None
    trials: int | None = None
    study: Path | None = None
    segments: int | None = None
    adaptive: Adaptive | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is left to choose, so that no pair has to be held out."""
        counted = self.top_k is not None if self.method.rank else self.segments in (None, 1)
        return self.rho is not None or (counted and self.alpha is not None and len(self.places) == 1)

    @property
    def places(self) -> Mapping[str, tuple[SiteName, ...]]:
        """What there is to choose from, by name: each site, or all of them where they are edited together."""
        apart: list[tuple[SiteName, ...]] = [(site,) for site in self.sites]
        groups = [self.sites] if self.method.together else apart
        return {" and ".join(group): group for group in groups}

    @property
    def place(self) -> str:
        """The sites, for messages."""
        return " or ".join(self.places)

    def __post_init__(self) -> None:
        _require_penalty(self)
        _require_segments(self)
        if self.complete and (self.trials or self.study):
            raise UsageError("--trials and --study belong to a search, and nothing is left to search for")
        if self.trials is not None and self.trials < 1:
            raise UsageError(f"--trials must be at least 1, got {self.trials}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"--top-k must be at least 1, got {self.top_k}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha != 0):
            raise UsageError(f"--alpha must be a finite number other than 0, got {self.alpha}")
        if not (math.isfinite(self.max_drift) and self.max_drift > 0):
            raise UsageError(f"--max-drift must be a finite number above 0, got {self.max_drift}")


def _require_penalty(goal: Goal) -> None:
    if goal.method is METHODS["steer2edit"] and goal.alpha is not None and goal.alpha < 0:
        raise UsageError(f"--alpha must be above 0 for --method steer2edit, got {goal.alpha}; or swap the sides")
    if goal.rho is None and goal.l1_ratio is None:
        return
    if goal.method is not METHODS["steer2edit"]:
        raise UsageError("--rho and --l1-ratio belong to --method steer2edit")
    if goal.rho is None or goal.l1_ratio is None:
        raise UsageError("--rho and --l1-ratio need each other; or leave both out, and they are searched")
    if goal.top_k is not None or goal.alpha is not None:
        raise UsageError("--rho and --l1-ratio decide what --top-k and --alpha do: give one pair or the other")
    elastic_net((), goal.rho, goal.l1_ratio)  # refuses what has no closed form


def _require_segments(goal: Goal) -> None:
    if goal.segments is not None and goal.method.rank:
        raise UsageError("--segments belongs to --method fusion")
    if goal.top_k is not None and not goal.method.rank:
        raise UsageError("--top-k has no meaning for --method fusion, which edits every layer; see --segments")
