"""Gates from texts: a linear probe on the FFN input of each layer, open on `when` texts and closed on `unless` texts.

The probe is a logistic regression on standardised activations, one sample a token. Its log-odds, less a threshold, are
scaled to z, what the step of a gate is taken of: g(h) = [act(z + delta) - act(z - delta)] / 2 delta.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from austeer.compiler.errors import CheckFailed, Refused, UsageError
from austeer.compiler.gates import Gate
from austeer.compiler.gating import gate_value
from austeer.compiler.live import activation_of, live_facts
from austeer.compiler.openness import Openness
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens
from austeer.passes.gate_texts import GateText, split_texts
from austeer.passes.gate_tokens import Counts, TokenSample, sample_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DELTA = 8.0
REACH = 4.0  # the largest |z| of the calibration tokens, in units of delta: more is sharper, and coarser in 16 bits
AUC_BOUND = 0.75  # of two normal distributions: of which one is 95% below a threshold, and the other 75%
CLOSED = 0.95  # measured at equal effect: Youden's point, about 0.8 to 0.9, leaves more drift; 0.98 asks more strength
PENALTIES = (0.01, 0.1, 1.0)  # the regression's C, chosen by cross-validation
STORED = ("bfloat16", "float16")

Matrix: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Rounding:
    """What storing a gate in 16 bits does to it: |g as stored - g| over the calibration tokens."""

    largest: float
    mean: float


@dataclass(frozen=True, eq=False)
class FittedGate:
    """A gate, and how well it does on tokens of texts that it was not fitted to.

    `threshold` is where it is half open, in log-odds of the probe; `reach` the least and the largest z of all
    calibration tokens.
    `constant_residual` is the root mean square of u·h - 1 on held-out tokens, u the gate's constant direction.
    """

    gate: Gate
    auc: float
    when: Openness
    unless: Openness
    threshold: float
    reach: tuple[float, float]
    rounding: Mapping[str, Rounding]
    constant_residual: float


@dataclass(frozen=True, eq=False)
class GateFit:
    """The gates of the layers that tell the texts apart, the held-out AUC of every layer tried, and on what.

    `gates[layer]` has one for each share of closed tokens that was asked for.
    """

    gates: Mapping[int, tuple[FittedGate, ...]]
    auc: Mapping[int, float]
    texts: tuple[GateText, ...]
    when: Counts
    unless: Counts
    notes: tuple[str, ...] = ()


def fit_gates(
    model: "PreTrainedModel",
    layers: Collection[int],
    when: Sequence[Tokens],
    unless: Sequence[Tokens],
    *,
    seed: int,
    batch_tokens: int,
    closed: Sequence[float] = (CLOSED,),
    in_weights: bool = True,
) -> GateFit:
    """A gate for each of `layers` whose held-out AUC is at least AUC_BOUND, from one pass over the texts.

    A fifth of the texts of either side is held out. Each token is a sample of its text's side; what a text shares
    with the other side (BOS, a chat template) counts as `unless`, and nowhere where gates are judged. The threshold
    is the smallest that leaves a share `closed` of the fitted `unless` tokens on the closed side. Memory: up to
    2 GB of activations, a random sample where the texts have more. `in_weights`: gates are to become neurons.
    Raises PairsError for texts that cannot be split, Refused where the model can host no gate, CheckFailed where no
    layer separates the texts.
    """
    if not all(0.5 <= share < 1 for share in closed):
        raise UsageError(f"the share of closed tokens must be from 0.5 to below 1, got {closed}")
    usable, notes = _hosts(model, layers, in_weights=in_weights)
    texts, left_out = split_texts(when, unless, seed)
    sample, inputs = sample_tokens(model, usable, texts, seed=seed, batch_tokens=batch_tokens)
    act = activation_of(live_facts(model))
    gates, auc = dict[int, tuple[FittedGate, ...]](), dict[int, float]()
    for layer in track(usable, "Fitting gates", len(usable)):
        h = inputs.pop(layer)
        probe = _probe(h, sample)
        auc[layer] = probe.auc
        if probe.auc >= AUC_BOUND:
            gates[layer] = tuple(_gate(h, sample, probe, share, act) for share in closed)
    if not gates:
        raise CheckFailed(_no_layer(auc))
    return GateFit(gates, auc, texts, sample.when, sample.unless, (*left_out, *notes))


@dataclass(frozen=True, eq=False)
class _Probe:
    """The log-odds w·h + b that a token is wanted, their values at all tokens, and their AUC where they are judged."""

    w: Matrix
    b: float
    scores: Matrix
    auc: float


def _hosts(model: "PreTrainedModel", layers: Collection[int], *, in_weights: bool) -> tuple[list[int], tuple[str, ...]]:
    """(the layers that a gate can be put in, a note on the others)."""
    facts = live_facts(model)
    name = facts.geometry.name
    if in_weights and facts.post_norm:
        raise Refused(
            f"{name}: {facts.architecture.model_type} norms what its FFNs write, which no gate of neurons passes "
            "unchanged: use --form model-code, or steer without --adaptive"
        )
    usable = [layer for layer in sorted(layers) if not facts.has_experts(layer)]
    if not usable:
        raise Refused(
            f"{name}: every layer asked for is a mixture of experts, which has no one FFN for a gate: "
            "steer without --adaptive"
        )
    left = [layer for layer in sorted(layers) if layer not in usable]
    note = f"layers {', '.join(map(str, left))} are mixtures of experts, which host no gate: left out"
    return usable, (note,) * bool(left)


def _no_layer(auc: Mapping[int, float]) -> str:
    table = ", ".join(f"layer {layer} {value:.2f}" for layer, value in auc.items())
    return (
        f"no layer tells the two kinds of text apart: held-out AUC by token is {table}, and a gate needs "
        f"{AUC_BOUND}. Give more texts, texts that differ from their beginning on, or steer without --adaptive"
    )


def _probe(h: Matrix, sample: TokenSample) -> _Probe:
    """The probe of one layer, from FFN inputs h [tokens, residual]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=10_000))
    folds = PredefinedSplit(sample.parts[sample.fitted])
    grid = {"logisticregression__C": PENALTIES}
    search: Any = GridSearchCV(steps, grid, scoring="roc_auc", cv=folds)
    search.fit(h[sample.fitted].astype(np.float64), sample.wanted[sample.fitted])
    scaler, regression = search.best_estimator_
    w = regression.coef_[0] / scaler.scale_
    b = float(regression.intercept_[0] - w @ scaler.mean_)
    scores, judged = h @ w + b, sample.judged
    return _Probe(w, b, scores, float(roc_auc_score(sample.wanted[judged], scores[judged])))


def _gate(h: Matrix, sample: TokenSample, probe: _Probe, closed: float, act: Callable[..., "Tensor"]) -> FittedGate:
    closing = sample.fitted & ~sample.wanted & ~sample.shared
    threshold = float(np.quantile(probe.scores[closing], closed, method="higher"))
    factor = REACH * DELTA / float(np.abs(probe.scores - threshold).max())
    constant, judged = _constant(h[sample.fitted]), sample.judged
    gate = Gate(factor * probe.w, factor * (probe.b - threshold), DELTA, constant)
    z, g = h @ gate.w + gate.b, _values(gate, h, act)
    return FittedGate(
        gate,
        probe.auc,
        Openness.of(g[judged & sample.wanted]),
        Openness.of(g[judged & ~sample.wanted]),
        threshold,
        (float(z.min()), float(z.max())),
        {dtype: _rounding(gate, h, g, act, dtype) for dtype in STORED},
        float(np.sqrt(np.square(h[judged] @ constant - 1).mean())),
    )


def _constant(h: Matrix) -> Matrix:
    """u with u·h near 1, by least squares with a ridge as large as the noise of activations in bfloat16."""
    square = h.T.astype(np.float64) @ h
    ridge = 1e-6 * np.trace(square) / len(square)
    return np.linalg.solve(square + ridge * np.eye(len(square)), h.sum(0, dtype=np.float64))


def _values(gate: Gate, h: Matrix, act: Callable[..., "Tensor"]) -> Matrix:
    import torch

    return gate_value(gate, act)(torch.from_numpy(h))[:, 0].numpy()


def _rounding(gate: Gate, h: Matrix, g: Matrix, act: Callable[..., "Tensor"], dtype: str) -> Rounding:
    """As a 16-bit FFN computes it: weights, input, and what passes between its parts are rounded, sums are not."""
    import torch

    def stored(values: "Tensor") -> "Tensor":
        return values.to(getattr(torch, dtype)).float()

    product = stored(torch.from_numpy(h)) @ stored(torch.tensor(gate.w))
    biases = (stored(torch.tensor(gate.b + shift)) for shift in (gate.delta, -gate.delta))
    opening, closing = (stored(act(stored(product + bias))) for bias in biases)
    found = (opening - closing) / (2 * gate.delta)
    error = np.abs(found.numpy() - g)
    return Rounding(float(error.max()), float(error.mean()))
