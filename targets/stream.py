"""The rescaled residual stream on the tensors of a checkpoint."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from austeer.compiler.edits import Floats
from austeer.compiler.layout import OutputLayout
from austeer.compiler.patch import Affine, Patch
from austeer.compiler.rewrite import OVERFLOWING, Matrix, stored_vector
from austeer.compiler.stream import STREAMS
from austeer.compiler.tensors import TensorInfo
from austeer.targets.shards import Job


def stream_jobs(patch: Patch, output: OutputLayout) -> Iterator[Job]:
    """What happens to the weights that begin, read and norm the stream. CheckpointError where one is missing."""
    layout = output.base
    plus_one = STREAMS[layout.facts.architecture.model_type].plus_one
    for rescale in patch.stream:
        for tensor in layout.stream(rescale.layer, rescale.role):
            name = output.moved[tensor.name][0][0]
            if len(tensor.shape) == 1:
                yield Job(name, tensor, (), partial(_norm, tensor, rescale.factors, 1.0 if plus_one else 0.0))
            else:
                yield Job(name, tensor, (_columns(tensor, rescale.factors),))


def stream_lowering(patch: Patch, output: OutputLayout) -> Iterator[dict[str, Any]]:
    """The manifest's entries for them."""
    for rescale in patch.stream:
        for tensor in output.base.stream(rescale.layer, rescale.role):
            name, shape = output.moved[tensor.name][0]
            for edit, units in rescale.touches:
                axes = [*[None] * (len(shape) - 1), None if units is None else list(units)]
                yield {"edit": edit, "tensor": name, "slice": axes, "exact": rescale.exact}


@OVERFLOWING
def _norm(tensor: TensorInfo, factors: Floats, offset: float) -> Floats:
    """A norm's weight whose factor, offset + weight, is multiplied; untouched units keep every bit."""
    old = stored_vector(tensor)
    new = (offset + old.astype(np.float64)) * factors - offset
    return np.where(factors == 1, old, new.astype(np.float32))


def _columns(tensor: TensorInfo, factors: Floats) -> Matrix:
    rows, columns = tensor.shape
    form = replace(Affine.identity(0, "attn_out", rows, columns), s=factors)
    return Matrix(tensor, tensor.offset, (rows, columns), transposed=False, form=form)
