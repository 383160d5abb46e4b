"""Whether an inference engine serves a compiled checkpoint as the interpreter would, from its log-probabilities."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.certificate import text_logits
from austeer.compiler.errors import CheckFailed
from austeer.compiler.interpreter import interpret
from austeer.compiler.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from austeer.compiler.program import Program

Scores: TypeAlias = "Sequence[NDArray[np.float32]]"  # of each text the log-probabilities [tokens, vocabulary]

FLOOR = -80.0  # anything less likely counts as this: in float32 such probabilities begin to vanish
EXACT = 1e-4  # of a float32 checkpoint, in log-probabilities


@dataclass(frozen=True)
class Distance:
    """Between two models' log-probabilities: the largest difference, and the mean KL in nats per token."""

    max_abs: float
    mean_kl: float


@dataclass(frozen=True)
class Expected:
    """What transformers says in float32: of the base alone, and of the base with the program's hooks."""

    texts: tuple[Tokens, ...]
    base: Scores
    program: Scores


@dataclass(frozen=True)
class EngineCheck:
    """One engine on one compiled checkpoint.

    `compiled` is the engine on the checkpoint against the interpreter, `edited` against the same engine on the
    base, `own` the engine on the base against transformers on the base, and `effect` the interpreter against the
    base. `stored` is the dtype of the checkpoint; engines compute in float32.
    """

    engine: str
    version: str | None
    stored: str
    tokens: int
    compiled: Distance
    edited: Distance
    own: Distance
    effect: Distance

    @property
    def failure(self) -> str | None:
        """What is wrong, in a sentence; None if the engine does what the program says."""
        figure, limit = self._figure, self._limit
        allowed = max(limit, 2 * figure(self.own))  # an engine need not be nearer to the program than to the base
        if figure(self.compiled) <= allowed < figure(self.effect):
            return None
        if figure(self.effect) <= limit:
            return f"{self.engine}: the program makes no difference to the base on these texts, so nothing is proven"
        if figure(self.edited) <= limit:
            return (
                f"{self.engine}: dropped in silence: it answers as it does on the unedited base, without an error; "
                "compile for a target that this engine honours, or serve with another engine"
            )
        if allowed > limit and figure(self.compiled) <= allowed:
            return (
                f"{self.engine}: it computes even the unedited base otherwise than transformers does, by "
                f"{figure(self.own):.3g}, as much as the program changes: it cannot be judged"
            )
        return (
            f"{self.engine}: wrong: it is {figure(self.compiled):.3g} from what the program says, more than "
            f"{allowed:.3g}, and {figure(self.edited):.3g} from its unedited base: edits are lost or changed"
        )

    @property
    def _limit(self) -> float:
        return EXACT if self.stored == "float32" else 1e-3 * self.effect.mean_kl + 1e-4

    def _figure(self, distance: Distance) -> float:
        """What the rule looks at; a nan must not pass."""
        found = distance.max_abs if self.stored == "float32" else distance.mean_kl
        return inf if isnan(found) else found

    def plain(self) -> dict[str, Any]:
        """As JSON values, with the verdict."""
        return {**asdict(self), "passed": self.failure is None, "failure": self.failure}


def expect(model: "PreTrainedModel", program: "Program", texts: Sequence[Tokens]) -> Expected:
    """Runs a live float32 base over the texts, without and with the program's hooks."""

    def scores() -> Scores:
        return tuple(text_logits(model, text).double().log_softmax(-1).float().numpy() for text in texts)

    base = scores()
    with interpret(model, program):
        return Expected(tuple(texts), base, scores())


def check(
    name: str, version: str | None, expected: Expected, base: Scores, compiled: Scores, *, stored: str
) -> EngineCheck:
    """Compares what an engine says of the base and of the compiled checkpoint with what is expected.

    Raises CheckFailed if it reports other tokens or another vocabulary than the base has.
    """
    for found in (*base, *compiled):
        if found.shape[1:] != expected.base[0].shape[1:]:
            raise CheckFailed(f"{name} reports {found.shape[-1]} tokens, the base has {expected.base[0].shape[-1]}")
    return EngineCheck(
        engine=name,
        version=version,
        stored=stored,
        tokens=sum(map(len, expected.texts)),
        compiled=distance(expected.program, compiled),
        edited=distance(base, compiled),
        own=distance(expected.base, base),
        effect=distance(expected.program, expected.base),
    )


def distance(reference: Scores, other: Scores) -> Distance:
    """Over all tokens of all texts; KL is D(reference ‖ other). A nan on either side makes both figures nan."""
    import numpy as np

    largest, total = 0.0, 0.0
    for one, two in zip(reference, other, strict=True):
        p, q = np.maximum(one, FLOOR, dtype=np.float64), np.maximum(two, FLOOR, dtype=np.float64)
        largest = float(np.maximum(largest, np.abs(p - q).max()))
        total += float((np.exp(p) * (p - q)).sum())
    return Distance(largest, total / sum(map(len, reference)))
