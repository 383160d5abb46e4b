"""linear_neurons: scales of the residual stream → scaled rows of the block's FFN, and neurons for what they miss.

With m, the stream that the FFN reads, and f, what the FFN writes, a block ends in x = m + f, and (1 + γ) x is
(1 + γ) f + γ m. The first is an exact scale of rows. The second is what new neurons add: for silu, gelu and relu
act(z) - act(-z) = z, so that two of them are linear in their input. That input is n = N(m), normed, and c n, with
c the least squares slope of γ m on n, is all of γ m that a unit can have of itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from austeer.compiler.architectures import holds
from austeer.compiler.edits import Edit, Scale, Shift
from austeer.compiler.errors import Refused
from austeer.compiler.facts import ModelFacts
from austeer.compiler.form import ModelForm, widening
from austeer.compiler.forward import run_texts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import block_of, live_facts
from austeer.compiler.patch import Neurons, Patch
from austeer.compiler.program import Program
from austeer.compiler.progress import track
from austeer.compiler.stream import STREAMS
from austeer.compiler.target import Target, widens
from austeer.compiler.tokens import Tokens
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.passes.rescale import needs_rescaling

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "linear-neurons"
LINEAR_PAIRS = frozenset(
    ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu")
)
"""The activations whose odd part is linear: act(z) - act(-z) = z."""


@dataclass(frozen=True)
class LinearNeurons:
    """The neurons' slopes, unit by unit of the program's scales (none: 0), or why this is not legal."""

    refusal: str = ""
    fitted: tuple[float, ...] = ()
    name: str = NAME


def linear_neurons(program: Program, facts: ModelFacts, target: Target) -> LinearNeurons:
    """Whether this approximation is legal for a program, and why not."""
    try:
        _form(program, facts, target)
    except Refused as refused:
        return LinearNeurons(str(refused))
    return LinearNeurons()


def with_neurons(program: Program, facts: ModelFacts, target: Target, choice: LinearNeurons) -> tuple[ModelForm, Patch]:
    """The form and the patch of a program whose scales of the stream become scaled rows and appended neurons."""
    form = _form(program, facts, target)
    patch = fold(program, facts, form)
    scales = _scales(program, facts)
    touches = tuple(replace(touch, exact=touch.edit not in scales) for touch in patch.touches)
    return form, replace(patch, touches=touches, neurons=tuple(_neurons(scales, facts, choice)))


def fit_slopes(
    model: "PreTrainedModel", program: Program, choice: LinearNeurons, texts: Sequence[Tokens]
) -> LinearNeurons:
    """The choice with its slopes, from the model as the interpreter runs the program: γ <m, n> / |n|² of each unit."""
    facts = live_facts(model)
    scales = _scales(program, facts)
    fits = {edit.layer: _Fit() for edit in scales.values()}
    (norm,) = STREAMS[facts.architecture.model_type].ffn_in
    with interpret(model, program), ExitStack() as hooks:
        for layer, fit in fits.items():
            module = block_of(model, facts, layer).get_submodule(norm)
            hooks.callback(module.register_forward_hook(fit.see).remove)
        for text in track(texts, "Fitting neurons", len(texts)):
            run_texts(model, [text])
    slopes = [edit.gamma * fits[edit.layer].slopes(edit.units) for edit in scales.values()]
    return replace(choice, fitted=tuple(np.concatenate(slopes).tolist()))


class _Fit:
    """Running sums over the tokens that pass a norm, unit by unit."""

    across: Any = 0.0  # [residual]
    square: Any = 0.0

    def see(self, _: Any, inputs: "tuple[Tensor, ...]", output: "Tensor") -> None:
        """Takes in one pass through the norm."""
        m, n = (values.double().flatten(0, -2) for values in (inputs[0], output))
        self.across += (m * n).sum(0)
        self.square += n.square().sum(0)

    def slopes(self, units: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """0 for a unit that the norm mutes."""
        across, square = (sums.cpu().numpy()[list(units)] for sums in (self.across, self.square))
        return np.divide(across, square, out=np.zeros(len(units)), where=square > 0)


def _scales(program: Program, facts: ModelFacts) -> dict[int, Scale]:
    edits = enumerate(program.edits)
    return {number: edit for number, edit in edits if isinstance(edit, Scale) and needs_rescaling(edit, facts)}


def _form(program: Program, facts: ModelFacts, target: Target) -> ModelForm:
    """The form of the other edits, with FFN biases and room for the neurons; Refused where there is no such form."""
    scales = _scales(program, facts)
    layers = sorted({edit.layer for edit in scales.values()})
    reason = next(_reasons(layers, facts), None)
    if reason:
        raise Refused(reason)
    # A constant of 0 in those FFNs asks for exactly the biases that the neurons need.
    zero = np.zeros(facts.geometry.residual, np.float32)
    needs: list[Edit] = [Shift(layer, "ffn", zero) for layer in layers]
    others = (edit for number, edit in enumerate(program.edits) if number not in scales)
    try:
        form = legalize(Program(program.model, (*others, *needs)), facts, target)
    except Refused:
        form = None
    if form is None or any(form.routes.get((layer, "ffn_out")) != "bias" for layer in layers):
        raise Refused(f"{target} keeps no bias of the FFN in this model, and the neurons need one")
    if not widens(target, form.architecture.model_type):
        raise Refused(f"{target} has one width for the FFN of a {form.architecture.model_type}")
    count = max(2 * sum(len(edit.units) for edit in scales.values() if edit.layer == layer) for layer in layers)
    return replace(form, widened=widening(facts.geometry.neurons, count))


def _reasons(layers: Sequence[int], facts: ModelFacts) -> Iterator[str]:
    """What of the model itself stands against it."""
    entry = facts.architecture
    if facts.post_norm:
        yield "a norm stands after the FFN, so nothing that it adds is a multiple of the stream"
    if holds(STREAMS[entry.model_type].parallel, facts.config):
        yield "the FFN reads the stream before the attention of the block has written to it"
    for layer in layers:
        if facts.has_experts(layer):
            yield f"the FFN of layer {layer} is a mixture of experts"
    activation = entry.activation.of(facts.config)
    if activation not in LINEAR_PAIRS:
        yield f"two neurons with the activation {activation} are not linear"


def _neurons(scales: dict[int, Scale], facts: ModelFacts, choice: LinearNeurons) -> Iterator[Neurons]:
    """Two for each unit, those of a layer together."""
    units = [(edit.layer, number, unit) for number, edit in scales.items() for unit in edit.units]
    slopes = choice.fitted or (0.0,) * len(units)
    for layer in sorted({layer for layer, _, _ in units}):
        here = [(number, unit, slope) for (at, number, unit), slope in zip(units, slopes, strict=True) if at == layer]
        edits, own, factors = (np.repeat(column, 2) for column in zip(*here, strict=True))
        yield _pairs(layer, edits, own, factors, facts.geometry.residual)


def _pairs(layer: int, edits: Any, units: Any, slopes: Any, residual: int) -> Neurons:
    """act(h_i) and -act(-h_i), times the slope, into unit i; the other factor of a gated FFN is 1."""
    count = len(units)
    signs = np.tile([1.0, -1.0], count // 2)
    gate, down = np.zeros((count, residual), np.float32), np.zeros((residual, count), np.float32)
    gate[np.arange(count), units] = signs
    down[units, np.arange(count)] = signs * slopes
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    return Neurons(layer, gate, zeros, np.zeros_like(gate), ones, down, tuple(edits.tolist()), exact=False)
