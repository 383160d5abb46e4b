"""The reference semantics of gates: what gated edits add to a block, by hooks."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.facts import ModelFacts
from austeer.compiler.gates import Gate, Gated
from austeer.compiler.hooked import Placed, first_of, widen, with_first
from austeer.compiler.live import activation_of, block_of, ffn_input, output_norm, port
from austeer.compiler.watch import seeing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Change: TypeAlias = "Callable[[Tensor], Tensor]"


def gate_block(model: "PreTrainedModel", facts: ModelFacts, layer: int, edits: Sequence[Gated]) -> Iterator[Any]:
    """Hooks that add the gated edits to the output of a block, computed in float32; their handles.

    Refused for a mixture of experts, which has no one FFN for a gate to read with.
    """
    if not edits:
        return
    terms = [_Term(edit, model, facts) for edit in edits]
    for term in terms:
        yield from term.hooks(model, facts)
    block = block_of(model, facts, layer)
    yield block.register_forward_hook(lambda _, __, output: _with_sum(terms, output))


@contextmanager
def watch_gated(
    model: "PreTrainedModel", facts: ModelFacts, edit: Gated, see: "Callable[[Tensor], None]"
) -> Generator[None]:
    """Within the context, `see` is shown what a gated edit would add to the output of its block, like it in shape.

    It is not added. Edits that the interpreter runs at that time have changed the activations before.
    """
    term = _Term(edit, model, facts)

    block = port(model, facts, edit.layer, "residual")
    with ExitStack() as hooks:
        for handle in (*term.hooks(model, facts), seeing(block, lambda output: see(term.added_to(output)))):
            hooks.callback(handle.remove)
        yield


def gate_value(gate: Gate, act: Change) -> Change:
    """g: FFN inputs [..., residual] → [..., 1], float32 or wider."""
    import torch

    w, delta = Placed(torch.tensor(gate.w)), gate.delta

    def value(h: "Tensor") -> "Tensor":
        h = widen(h)
        z = h @ w.on(h).to(h.dtype) + gate.b
        return ((act(z + delta) - act(z - delta)) / (2 * delta))[..., None]

    return value


class _Term:
    """One gated edit in one forward pass: first its gate is seen, and what it contributes, then both are used."""

    gate: Any = None
    contribution: Any = None

    def __init__(self, edit: Gated, model: "PreTrainedModel", facts: ModelFacts) -> None:
        self.edit = edit.edit
        self.value = gate_value(edit.gate, activation_of(facts))
        self.change = contribution(self.edit)
        self.place = port(model, facts, edit.layer, edit.site)
        self.norm: Any = output_norm(model, facts, edit.layer, edit.site)

    def hooks(self, model: "PreTrainedModel", facts: ModelFacts) -> Iterator[Any]:
        """What sees the gate and the contribution. Those at the block's own output are made there."""
        yield seeing(ffn_input(model, facts, self.edit.layer), self.see_gate)
        if self.edit.site == "residual":
            return
        module = self.place.module
        yield _after(module, self.see)
        if self.norm is not None:
            yield _after(self.norm, self.see_norm)

    def see_gate(self, h: "Tensor") -> None:
        """Takes in what the FFN reads."""
        self.gate = self.value(h)

    def see(self, inputs: "Tensor", output: "Tensor") -> None:
        """Takes in what the output projection reads and writes."""
        x = inputs if self.place.side == "input" else output
        added = self.change(widen(x))
        through = self.place.side == "input" and not isinstance(self.edit, Rank1)
        self.contribution = _projected(self.place.module, added, x.dtype) if through else added

    def see_norm(self, inputs: "Tensor", output: "Tensor") -> None:
        """Takes in the norm that stands between the projection and the stream."""
        more = widen(inputs) + self.contribution.reshape(inputs.shape)
        self.contribution = widen(self.norm.forward(more.to(inputs.dtype))) - widen(output)

    def added_to(self, x: "Tensor") -> "Tensor":
        """g(h) times the contribution, in the shape of the block's output `x`; forgets both."""
        found = self.change(widen(x)) if self.edit.site == "residual" else self.contribution
        gate, self.gate, self.contribution = self.gate, None, None
        # Some FFNs see all tokens of a batch in one row.
        return gate.to(x.device).reshape(*x.shape[:-1], 1) * found.to(x.device).reshape(x.shape)


def _with_sum(terms: Sequence[_Term], output: Any) -> Any:
    x = first_of(output)
    return with_first(output, (widen(x) + sum(term.added_to(x) for term in terms)).to(x.dtype))


def _after(module: Any, see: "Callable[[Tensor, Tensor], None]") -> Any:
    return module.register_forward_hook(lambda _, inputs, output: see(inputs[0], output))


def contribution(edit: Edit) -> Change:
    """What an edit adds to the activation of its site, or, of rank 1, to the output of the projection."""
    import torch

    if isinstance(edit, Shift):
        vector = Placed(torch.tensor(edit.vector))
        return lambda x: vector.on(x).expand_as(x)
    if isinstance(edit, Rank1):
        k, v = Placed(torch.tensor(edit.k)), Placed(edit.strength * torch.tensor(edit.v))
        return lambda x: (x @ k.on(x).to(x.dtype))[..., None] * v.on(x)
    assert isinstance(edit, Scale), edit
    units, gamma = Placed(torch.tensor(edit.units, dtype=torch.int64)), Placed(torch.tensor(edit.gamma))
    return lambda x: torch.zeros_like(x).index_copy(-1, units.on(x), x[..., units.on(x)] * gamma.on(x))


def _projected(module: Any, added: "Tensor", dtype: Any) -> "Tensor":
    """The linear part of a projection on what is added to its input.

    By the module's own forward, without hooks, as its weights may lie on another device until it runs.
    """
    import torch

    zero = torch.zeros_like(added[..., :1, :], dtype=dtype)
    return widen(module.forward(added.to(dtype))) - widen(module.forward(zero))
