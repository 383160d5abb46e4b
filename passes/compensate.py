"""compensate: model, program and units of the stream → a factor for each norm that reads it, fitted to activations."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from austeer.compiler.edits import Floats
from austeer.compiler.forward import run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import block_of, live_facts
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.stream import STREAMS
from austeer.compiler.tokens import Tokens
from austeer.passes.rescale import Rescaling, reading_norms, units_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def compensate(
    model: "PreTrainedModel", program: Program, choices: Sequence[Rescaling], texts: Sequence[Tokens]
) -> list[Rescaling]:
    """The choices with their norms' factors: those with the least squared error of what the norms give.

    With y = N(x) of a norm N, and x as the interpreter runs the program, the compiled model has d·N(x / d), which
    the factor <y, d·N(x / d)> / |d·N(x / d)|² brings nearest to y.
    """
    fits = {choice.name: _fits(model, program, choice) for choice in choices}
    with interpret(model, program), ExitStack() as hooks:
        for fit in (fit for found in fits.values() for fit in found):
            hooks.callback(fit.norm.register_forward_hook(fit.see).remove)
        for text in track(texts, "Compensating the norms", len(texts)):
            run_texts(model, [text])
    return [replace(choice, fitted=tuple(fit.factor for fit in fits[choice.name])) for choice in choices]


@dataclass
class _Fit:
    """Running sums over the tokens that pass a norm."""

    norm: Any  # a live module
    d: Floats  # [residual]
    across: float = 0.0
    square: float = 0.0

    @property
    def factor(self) -> float:
        """1 where the units are those of the base, or where nothing passed."""
        return self.across / self.square if self.square else 1.0

    def see(self, _: Any, inputs: "tuple[Tensor, ...]", output: "Tensor") -> None:
        """Takes in one pass through the norm."""
        import torch

        if (self.d == 1).all():
            return
        bias = getattr(self.norm, "bias", None)
        d = torch.tensor(self.d, device=output.device)
        y, x = output.float(), inputs[0].float()
        z = self.norm.forward((x / d).to(inputs[0].dtype)).float()  # forward: the hooks are not to see this one
        if bias is not None:
            y, z = y - bias, z - bias
        self.across += float((y * z * d).sum(dtype=torch.float64))
        self.square += float((z * d).square().sum(dtype=torch.float64))


def _fits(model: "PreTrainedModel", program: Program, choice: Rescaling) -> list[_Fit]:
    facts = live_facts(model)
    stream, units = STREAMS[facts.architecture.model_type], units_of(choice, program, facts).astype("f4")
    found: list[_Fit] = []
    for before, role in reading_norms(facts):
        (name,) = stream.names(role)
        if role == "head_in":
            norm = model.get_submodule(facts.architecture.prefix + name)
        else:
            norm = block_of(model, facts, before).get_submodule(name)
        found.append(_Fit(norm, units[before]))
    return found
