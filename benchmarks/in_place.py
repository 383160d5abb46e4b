"""A compiled twin of a live model: for models too large to be written and read again for a benchmark.

The numbers are the compiler's: the patch comes from the fold pass, and W' = (a⊙W + U Vᵀ)⊙s is computed in float32
and cast once, as in compiler/rewrite.py, but by torch, on the model's own device.
"""

from copy import deepcopy
from typing import TYPE_CHECKING

from austeer.compiler.live import live_facts, port
from austeer.compiler.patch import Affine
from austeer.compiler.program import Program
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.targets.tables import TARGETS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def twin(model: "PreTrainedModel") -> "PreTrainedModel":
    """A second model on the same weights, which are not copied."""
    return deepcopy(model, {id(weight): weight for weight in [*model.parameters(), *model.buffers()]})


def compiled_twin(model: "PreTrainedModel", program: Program) -> "PreTrainedModel":
    """A second model with what the program changes baked in, and the other weights shared."""
    from torch.nn import Parameter

    facts, result = live_facts(model), twin(model)
    for form in fold(program, facts, legalize(program, facts, TARGETS["transformers"])).operations:
        assert not form.adds_bias, "a twin has the shapes of its model"
        module = port(result, facts, form.layer, "attn" if form.role == "attn_out" else "ffn").module
        module.weight = Parameter(_rewritten(module.weight.detach(), form), requires_grad=False)
    return result


def _rewritten(weight: "Tensor", form: Affine) -> "Tensor":
    import torch

    def place(vector: object) -> "Tensor":
        return torch.tensor(vector, device=weight.device)

    wide = weight.float() * place(form.a)[:, None]
    for v, k in form.terms:
        wide += place(v)[:, None] * place(k)
    return (wide * place(form.s)).to(weight.dtype)
