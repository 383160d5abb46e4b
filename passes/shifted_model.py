"""A model with constants at its heads that gradients reach: what head shifts are trained on."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from austeer.compiler.activation_memory import all_affordable
from austeer.compiler.hooked import widen
from austeer.compiler.live import live_facts, port
from austeer.compiler.response_loss import packs, recomputing, summed_loss
from austeer.compiler.responses import Response
from austeer.compiler.team import Team
from austeer.passes.head_shifts import HeadShifts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class ShiftedModel:
    """Runs the model with the compensation at its heads, on this process's share of a batch."""

    def __init__(self, model: "PreTrainedModel", shifts: HeadShifts, batch_tokens: int, team: Team) -> None:
        self.model, self.shifts, self.batch_tokens, self.team = model, shifts, batch_tokens, team
        self.facts = live_facts(model)
        self.added: Mapping[int, Tensor] = {}
        self.suspects: list[Response] = []  # those of this process's last pass with which the loss became no number

    @contextmanager
    def shifting(self) -> Generator[None]:
        """Within the context every chosen head's output is compensated."""
        with ExitStack() as hooks:
            for layer in self.shifts.layers:
                place = port(self.model, self.facts, layer, "heads").module
                hooks.callback(place.register_forward_pre_hook(self._hook(layer)).remove)
            yield

    def loss(self, responses: Sequence[Response], trained: "Tensor") -> float:
        """Nats per own token, of all processes together."""
        import torch

        with torch.no_grad():
            self._compensate(trained)
            return self._mean(responses, lambda part: summed_loss(self.model, part))

    def backward(self, batch: Sequence[Response], trained: "Tensor") -> float:
        """The same, and its gradient added to that of what is trained."""
        tokens = _own(batch)

        def learn(part: Sequence[Response]) -> "Tensor":
            with self._sparing(part):
                self._compensate(trained)
                loss: Any = summed_loss(self.model, part, learning=True)
                (loss / tokens).backward()
            return loss.detach()

        mean = self._mean(batch, learn)
        assert trained.grad is not None
        self.team.add(trained.grad)
        return mean

    def _mean(self, responses: Sequence[Response], summed: "Callable[[Sequence[Response]], Tensor]") -> float:
        """The mean per own token of what every process sums over its share, `batch_tokens` at a time."""
        total, self.suspects = 0.0, []
        for part in packs(responses[self.team.rank :: self.team.size], self.batch_tokens):
            loss = float(summed(part))
            total += loss
            self.suspects += [] if math.isfinite(loss) else part
        return self.team.total(total) / _own(responses)

    def _compensate(self, trained: "Tensor") -> None:
        self.added = self.shifts.by_layer(self.shifts.compensation(trained), self.facts.geometry.heads)

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_: Any, args: tuple["Tensor", ...]) -> tuple["Tensor", ...]:
            x = args[0]
            return (widen(x) + self.added[layer].to(x.device)).to(x.dtype), *args[1:]

        return hook

    def _sparing(self, part: Sequence[Response]) -> AbstractContextManager[None]:
        """Blocks run again, instead of keeping activations for gradients, where these are too many."""
        tokens = len(part) * max(len(response.text) for response in part)
        return nullcontext() if all_affordable(self.model, tokens) else recomputing(self.model)


def _own(responses: Sequence[Response]) -> int:
    return sum(response.scored for response in responses)
