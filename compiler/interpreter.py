"""The reference semantics: a program run on a live model with hooks.

Every pass, certificate and benchmark is measured against this file.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.gates import Gated
from austeer.compiler.gating import contribution, gate_block
from austeer.compiler.hooked import Placed, first_of, widen, with_first
from austeer.compiler.live import live_facts, port
from austeer.compiler.sites import SITES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from austeer.compiler.program import Program

Change: TypeAlias = "Callable[[Tensor], Tensor]"


@contextmanager
def interpret(model: "PreTrainedModel", program: "Program") -> Generator["PreTrainedModel"]:
    """Within the context, `model` does what `program` says; afterwards it is as before.

    Any dtype, batch, padding side, KV cache, device or device_map: each edit is computed in float32 (or wider)
    on the activation's own device and rounded once to its dtype. Edits at one site apply in program order,
    sites in data-flow order. Raises ProgramError if the program does not fit the model.
    """
    facts = live_facts(model)
    program.require_fit(facts.geometry)
    with ExitStack() as hooks:
        for layer in sorted({edit.layer for edit in program.edits}):
            here = [edit for edit in program.edits if edit.layer == layer]
            for site in SITES:
                edits = [edit for edit in here if edit.site == site and not isinstance(edit, Gated)]
                if edits:
                    for handle in _hook(port(model, facts, layer, site), edits):
                        hooks.callback(handle.remove)
            # After those above, whose changes the gated edits read.
            gated = [edit for edit in here if isinstance(edit, Gated)]
            for handle in gate_block(model, facts, layer, gated):
                hooks.callback(handle.remove)
        yield model


def _hook(place: Any, edits: list[Edit]) -> Iterator[Any]:
    changes = [_change(edit) for edit in edits if not isinstance(edit, Rank1)]
    if changes and place.side == "input":
        yield place.module.register_forward_pre_hook(lambda _, args: (_apply(changes, args[0]), *args[1:]))
    elif changes:
        yield place.module.register_forward_hook(
            lambda _, __, output: with_first(output, _apply(changes, first_of(output)))
        )
    # A forward hook sees the inputs that the pre-hook above has changed: what the projection receives.
    for edit in edits:
        if isinstance(edit, Rank1):
            yield place.module.register_forward_hook(_rank1(edit))


def _apply(changes: list[Change], x: "Tensor") -> "Tensor":
    wide = widen(x)
    for change in changes:
        wide = change(wide)
    return wide.to(x.dtype)


def _change(edit: Edit) -> Change:
    import torch

    if isinstance(edit, Shift):
        vector = Placed(torch.tensor(edit.vector))
        return lambda x: x + vector.on(x)
    assert isinstance(edit, Scale), edit
    units, factors = Placed(torch.tensor(edit.units, dtype=torch.int64)), Placed(1 + torch.tensor(edit.gamma))
    return lambda x: x.index_copy(-1, units.on(x), x[..., units.on(x)] * factors.on(x))


def _rank1(edit: Rank1) -> Callable[..., "Tensor"]:
    added = contribution(edit)

    def hook(_: Any, inputs: tuple["Tensor", ...], output: "Tensor") -> "Tensor":
        return (widen(output) + added(widen(inputs[0]))).to(output.dtype)

    return hook
