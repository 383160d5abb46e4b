"""What restoring leaves of a pruned model, and what it adds: every zero, told from the files, and some parameters."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from austeer.compiler.certificate import Certificate
from austeer.compiler.checkpoint import Checkpoint
from austeer.compiler.errors import CheckFailed
from austeer.compiler.facts import facts_of
from austeer.compiler.layout import Layout, OutputLayout
from austeer.compiler.pruning import Pruning
from austeer.compiler.sparsity import TensorSparsity, kept_zeros
from austeer.compiler.verbs.bases import Base
from austeer.compiler.verbs.common import Compiled
from austeer.targets.checkpoint import Plan
from austeer.targets.gguf import GgufPlan
from austeer.targets.model_code import CodePlan


@dataclass(frozen=True)
class Zeros:
    """A weight matrix of the pruned model, and what became of it; None where that is not known."""

    before: TensorSparsity
    after: TensorSparsity | None = None


@dataclass(frozen=True)
class Baked:
    """What was written: how many parameters more than the pruned model has, the zeros of both, the certificate."""

    added: int
    zeros: tuple[Zeros, ...]
    certificate: Certificate


def zeros_of(compiled: Compiled, pruning: Pruning, folder: Path) -> Iterator[Zeros]:
    """The zeros of every matrix, before and after, if `folder` holds a checkpoint that lacks none.

    The forms gguf and model-code copy the matrices as they are, and `verify` compares them with the base. Raises
    CheckFailed where a zero is gone.
    """
    if not (isinstance(compiled.plan, Plan) and isinstance(compiled.base, Base)):
        return map(Zeros, pruning.pruned)
    written, before = Checkpoint.open(folder), compiled.base.layout
    after = Layout(written, facts_of(folder.name, written.config), before.prefix)
    moved = OutputLayout(before, compiled.plan.form).moved
    kept = kept_zeros(before.checkpoint, after, moved)
    if kept.filled:
        name, count = kept.filled[0]
        raise CheckFailed(f"{name}: {count} values that pruning made zero would not be zero any more; report this")
    found = {tensor.name: tensor for tensor in kept.after}
    return (Zeros(one, _joined(one, [found[name] for name, _ in moved[one.name]])) for one in pruning.pruned)


def zeros_record(zeros: Iterable[Zeros]) -> list[dict[str, Any]]:
    """As JSON values."""
    return [
        {**one.before.plain(), "zeros_after": one.after.zeros, "pattern_after": one.after.pattern}
        if one.after
        else one.before.plain()
        for one in zeros
    ]


def parameters_added(plan: Any, layout: Layout) -> int:
    """How many parameters the output of a plan, in whatever form, has more than the model that it is made from."""
    if isinstance(plan, CodePlan):
        return sum(vector.size for vector in plan.vectors.values())
    form = plan.checkpoint.form if isinstance(plan, GgufPlan) else plan.form
    return sum(math.prod(tensor.shape) for tensor in OutputLayout(layout, form).added.values())


def _joined(matrix: TensorSparsity, parts: Sequence[TensorSparsity]) -> TensorSparsity:
    """A matrix as the output holds it: a fused one may be several there."""
    patterns = {part.pattern for part in parts}
    pattern = patterns.pop() if len(patterns) == 1 else ""
    return replace(matrix, zeros=sum(part.zeros for part in parts), pattern=pattern)
