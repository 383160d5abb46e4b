"""How long, how fast and in which order something is trained."""

import math
from dataclasses import dataclass

import numpy as np

WARM_UP = 0.05  # of the steps
LEAST_EPOCHS, LEAST_STEPS = 3, 300  # where the user names no epochs: the paper's, and more where samples are few


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam with warm-up and cosine. `lr` is a step as a share of a head's RMS output."""

    lr: float = 0.02
    epochs: int | None = None  # None: 3, and as many more as 300 steps need
    batch_size: int = 8  # samples of a step
    seed: int = 0

    def steps(self, samples: int) -> int:
        """The number of steps over so many samples."""
        needed = max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / self._an_epoch(samples)))
        return (needed if self.epochs is None else self.epochs) * self._an_epoch(samples)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine down to 0."""
        warm = max(1, round(WARM_UP * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    def batch(self, step: int, samples: int) -> list[int]:
        """The samples of a step: the same in every process and after every interruption."""
        epoch, place = divmod(step, self._an_epoch(samples))
        order = np.random.default_rng([self.seed, epoch]).permutation(samples)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def _an_epoch(self, samples: int) -> int:
        return math.ceil(samples / self.batch_size)
