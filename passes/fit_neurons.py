"""fit_neurons: samples of a function of the FFN's input → neurons that compute it, as nearly as so many can.

They start as copies of the base's own neurons, those that vary most with the wanted outputs, each with a random
share of the gate in its gate row; what they write is the least squares solution. Adam then moves all of it. In the
units of the samples (root mean square 1 of each input) one learning rate does for every model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.facts import ModelFacts
from austeer.compiler.gates import Fitted
from austeer.compiler.live import block_of, weight_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

STEPS = 1000
BATCH = 1024  # tokens a step
RATE = 0.1  # of Adam, over the root of the residual width
START_TOKENS = 8192  # what the closed form looks at
SHARE = 0.3  # of the gate in a neuron's gate row, over what is there: the standard deviation
RIDGE = 1e-4  # of the mean square of a neuron

Parts: TypeAlias = "dict[str, Tensor]"
"""Neurons by the names of `Fitted`; `up` is missing in an FFN without a gate, biases in one without them."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What neurons are given, and what they are to add: float32 [tokens, residual] and [tokens, outputs]."""

    h: "Tensor"
    y: "Tensor"

    @property
    def spread(self) -> float:
        """The standard deviation of y, all outputs together."""
        return float((self.y - self.y.mean(0)).square().sum(1).mean().sqrt())


@dataclass(frozen=True, eq=False)
class Start:
    """What the fit begins with: the base's own neurons, and the gate's w, float32 [residual], and b."""

    own: Parts
    w: "Tensor"
    b: float
    act: "Callable[[Tensor], Tensor]"


def own_neurons(model: "PreTrainedModel", facts: ModelFacts, layer: int) -> Parts:
    """The rows, and any biases, with which the FFN of a layer reads: float32 [neurons, residual] and [neurons]."""
    import torch

    block, entry = block_of(model, facts, layer), facts.architecture
    names = [linear.name for linear in entry.inputs if not linear.of_attention]
    modules: list[Any] = [block.get_submodule(name) for name in names]
    rows = torch.cat([weight_of(module, transposed=entry.transposed) for module in modules])
    parts: Parts = dict(zip(("gate", "up"), rows.detach().split(facts.geometry.neurons), strict=False))
    if getattr(modules[0], "bias", None) is None:
        return parts
    biases = torch.cat([module.bias for module in modules]).detach().float().split(facts.geometry.neurons)
    return parts | dict(zip(("gate_bias", "up_bias"), biases, strict=False))


def fit_neurons(samples: Samples, start: Start, count: int, seed: int) -> Parts:
    """`count` neurons, `down` as [outputs, count]. They have the parts, biases for one, that the base's own have.

    Minimises the mean square error. Deterministic by seed on one machine.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    units = samples.h.square().mean(0).sqrt().clamp(min=1e-6)
    parts = _copies(samples, start, count, generator)
    parts = _scaled(parts, units, 1 / samples.spread)
    _descend(parts, samples, units, start, generator)
    return _scaled(parts, 1 / units, samples.spread)


def r2(samples: Samples, parts: Parts, act: "Callable[[Tensor], Tensor]") -> float:
    """1 - Σ|y - ŷ|² / Σ|y - mean y|², over all tokens and outputs."""
    blocks = zip(samples.h.split(START_TOKENS), samples.y.split(START_TOKENS), strict=True)
    error = sum(float((outputs(parts, h, act) - y).square().sum()) for h, y in blocks)
    return 1 - error / (len(samples.y) * samples.spread**2)


def outputs(parts: Parts, h: "Tensor", act: "Callable[[Tensor], Tensor]") -> "Tensor":
    """What neurons add: [tokens, residual] → [tokens, outputs]."""
    return _activations(parts, h, act) @ parts["down"].T


def as_fitted(parts: Parts, residual: int, columns: "Tensor") -> Fitted:
    """The neurons in a program: zero in the parts that they do not have, and outside the `columns` that they write."""
    gate = parts["gate"]
    down = gate.new_zeros(residual, len(gate)).index_copy(0, columns.to(gate.device), parts["down"])
    nothing = {"gate_bias": gate.new_zeros(len(gate)), "up": gate * 0, "up_bias": gate.new_zeros(len(gate))}
    return Fitted(**{**nothing, **parts, "down": down})


def _copies(samples: Samples, start: Start, count: int, generator: "torch.Generator") -> Parts:
    import torch

    h, y = (values[_drawn(samples, START_TOKENS, generator)] for values in (samples.h, samples.y))
    order = _ranked(_activations(start.own, h, start.act), y)
    chosen = order[torch.arange(count, device=order.device) % len(order)]
    parts = {name: part[chosen] for name, part in start.own.items()}
    share = SHARE * torch.randn(count, generator=generator).to(h.device)
    share *= (h @ parts["gate"].T).std(0) / (h @ start.w).std()
    parts["gate"] = parts["gate"] + share[:, None] * start.w
    if "gate_bias" in parts:
        parts["gate_bias"] = parts["gate_bias"] + share * start.b
    return {**parts, "down": _least_squares(_activations(parts, h, start.act), y)}


def _ranked(activations: "Tensor", y: "Tensor") -> "Tensor":
    """Neurons by the share of y that each explains alone."""
    centred = activations - activations.mean(0)
    shares = (centred.T @ (y - y.mean(0))).norm(dim=1) / centred.norm(dim=0).clamp(min=1e-12)
    return shares.argsort(descending=True, stable=True)


def _least_squares(activations: "Tensor", y: "Tensor") -> "Tensor":
    import torch

    square = activations.T @ activations
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square, activations.T @ y).T


def _scaled(parts: Parts, inputs: "Tensor", output: float) -> Parts:
    scales = {"gate": inputs, "up": inputs, "down": output}
    return {name: part * scales.get(name, 1) for name, part in parts.items()}


def _descend(parts: Parts, samples: Samples, units: "Tensor", start: Start, generator: "torch.Generator") -> None:
    """Changes the parts, which are in the samples' units, in place."""
    import torch

    trained, rate, size = list(parts.values()), RATE / samples.h.shape[1] ** 0.5, samples.spread
    optimizer = torch.optim.Adam([part.requires_grad_() for part in trained], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        drawn = _drawn(samples, BATCH, generator)
        error = outputs(parts, samples.h[drawn] / units, start.act) - samples.y[drawn] / size
        optimizer.zero_grad()
        error.square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
    for part in trained:
        part.requires_grad_(False)


def _drawn(samples: Samples, count: int, generator: "torch.Generator") -> "Tensor":
    import torch

    return torch.randint(len(samples.h), (count,), generator=generator).to(samples.h.device)


def _activations(parts: Parts, h: "Tensor", act: "Callable[[Tensor], Tensor]") -> "Tensor":
    found = act(_affine(parts, "gate", h))
    return found * _affine(parts, "up", h) if "up" in parts else found


def _affine(parts: Parts, name: str, h: "Tensor") -> "Tensor":
    linear = h @ parts[name].T
    return linear + parts[f"{name}_bias"] if f"{name}_bias" in parts else linear
