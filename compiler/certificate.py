"""The certificate: how far a compiled checkpoint is from the reference semantics, measured on texts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.errors import UsageError
from austeer.compiler.forward import computing_dtype, input_device
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import load_model
from austeer.compiler.progress import track
from austeer.compiler.tokens import Tokens, take_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from austeer.compiler.program import Program

REFERENCE = "the base model with hooks (the interpreter)"
COMPARED = 2**21  # logits of a block that are compared in double precision
LOGIT_BYTES = 2**29  # reference logits kept between the two models
APPROXIMATION_SHARE = 0.5  # of the way from the base to the reference, an approximation has to go at least half
GREEDY_TEXTS, GREEDY_PROMPT, GREEDY_TOKENS = 8, 16, 32


@dataclass(frozen=True)
class Certificate:
    """Compiled against reference over all tokens of the texts; `base_` is the unedited base against the reference.

    KL is D(reference ‖ other) in nats per token; top-1 agreement a fraction; `zeros` the fraction of the
    weights (all tensors of two dimensions or more) that are exactly zero. `dtype` is that of the measurement,
    `stored` that of the checkpoint. `approximate`: some lowering is, and a rule of its own holds.
    """

    reference: str
    dtype: str
    stored: str
    texts: int
    tokens: int
    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    max_abs_logit: float
    mean_kl: float
    top1_agreement: float
    greedy_equal: bool
    base_max_abs_logit_diff: float
    base_mean_kl: float
    base_top1_agreement: float
    zeros_before: float
    zeros_after: float
    edits: int
    approximate: bool = False

    def failures(self) -> list[str]:
        """What keeps the certificate from holding; empty if it holds."""
        return [text for holds, text in self._rule() if not holds]

    @property
    def passed(self) -> bool:
        """Whether the checkpoint does what the program says, by the rule for its stored dtype."""
        return not self.failures()

    def table(self) -> list[tuple[str, str, str]]:
        """The figures for people: (what, of the compiled model, of the unedited base)."""
        rows = (
            ("max abs logit difference", ".4g", self.max_abs_logit_diff, self.base_max_abs_logit_diff),
            ("mean KL from the reference, nats per token", ".4g", self.mean_kl, self.base_mean_kl),
            ("top-1 agreement", ".6f", self.top1_agreement, self.base_top1_agreement),
        )
        return [(what, format(ours, form), format(base, form)) for what, form, ours, base in rows]

    def _rule(self) -> list[tuple[bool, str]]:
        changed = (
            self.base_mean_kl > 0 or not self.edits,
            "the program makes no difference to the base on these texts, so equality proves nothing",
        )
        if self.approximate:
            limit = APPROXIMATION_SHARE * self.base_mean_kl
            found = f"mean KL is {self.mean_kl:.3g} nats, more than {limit:.3g}, half that of the unedited base"
            return [changed, (self.mean_kl <= limit, found)]
        if self.stored == "float32":
            limit = max(1e-4, 1e-5 * self.max_abs_logit)
            found = f"max |Δlogit| is {self.max_abs_logit_diff:.3g}, more than {limit:.3g}"
            top1 = f"top-1 agreement is {self.top1_agreement:.4%}, not 100%"
            return [changed, (self.max_abs_logit_diff <= limit, found), (self.top1_agreement == 1, top1)]
        limit = 1e-3 * self.base_mean_kl + 1e-4
        return [
            changed,
            (self.mean_kl <= limit, f"mean KL is {self.mean_kl:.3g} nats, more than {limit:.3g}"),
        ]

    def plain(self) -> dict[str, Any]:
        """As JSON values, with the verdict."""
        return {**asdict(self), "passed": self.passed}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> "Certificate":
        """The inverse of `plain`; KeyError if a field is missing."""
        values = {"approximate": False, **values}  # written before there were approximations
        return Certificate(**{field.name: values[field.name] for field in fields(Certificate)})


@dataclass(frozen=True)
class Reference:
    """What the base and the interpreter say about the texts; kept while the compiled model takes their place."""

    texts: tuple[Tokens, ...]
    logits: tuple["Tensor", ...]  # per text [tokens, vocabulary], float32 on the CPU
    greedy: tuple[Tokens, ...]
    base: "Comparison"
    zeros: float
    edits: int


@dataclass
class Comparison:
    """Running sums over tokens of one model's logits against the reference's."""

    tokens: int = 0
    kl: float = 0.0
    agreeing: int = 0
    max_diff: float = 0.0
    sum_diff: float = 0.0
    max_logit: float = 0.0

    def add(self, reference: "Tensor", other: "Tensor") -> None:
        """Takes in one text; both [tokens, vocabulary]. Doubles are made of a few tokens at a time."""
        step = max(1, COMPARED // reference.shape[-1])
        for ours, theirs in zip(reference.split(step), other.split(step), strict=True):
            self._add(ours, theirs)

    def _add(self, reference: "Tensor", other: "Tensor") -> None:
        difference = (reference - other).abs()
        log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
        self.tokens += len(reference)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.agreeing += int((reference.argmax(-1) == other.argmax(-1)).sum())
        # max() forgets a nan, and a model that computes nan must not pass.
        self.max_diff = max(self.max_diff, float(difference.nan_to_num(nan=float("inf")).max()))
        self.sum_diff += float(difference.mean(-1).double().sum())
        self.max_logit = max(self.max_logit, float(reference.abs().max()))


def certify(
    base: Path,
    program: "Program",
    texts: Sequence[Tokens],
    load_compiled: "Callable[[], PreTrainedModel]",
    *,
    dtype: str,
    device: str,
) -> Certificate:
    """Measures a compiled model against `base` + `program` on token sequences; one model in memory at a time.

    `texts` beyond what the logits budget (512 MB) holds are left out; at least one is measured. `dtype` as `load_model`
    takes it; the certificate names the one that was computed in.
    """
    model = load_model(base, dtype=dtype, device=device)
    reference = observe(model, program, texts)
    del model
    return compare(load_compiled(), reference, stored=stored_dtype(base))


def observe(model: "PreTrainedModel", program: "Program", texts: Sequence[Tokens]) -> Reference:
    """Runs the base and the interpreter over the texts; UsageError if there are none."""
    if not texts:
        raise UsageError("there is nothing to measure on: none of the texts has a token")
    texts = take_tokens(texts, max(1, LOGIT_BYTES // (4 * model.config.vocab_size)))
    comparison, kept = Comparison(), list["Tensor"]()
    for text in track(texts, "reference"):
        plain = text_logits(model, text)
        with interpret(model, program):
            kept.append(text_logits(model, text))
        comparison.add(kept[-1], plain)
    with interpret(model, program):
        made = _continuations(model, texts)
    return Reference(tuple(texts), tuple(kept), made, comparison, _zeros(model), len(program.edits))


def compare(model: "PreTrainedModel", reference: Reference, *, stored: str) -> Certificate:
    """Runs the compiled model over the same texts."""
    found = Comparison()
    for text, expected in zip(track(reference.texts, "compiled"), reference.logits, strict=True):
        found.add(expected, text_logits(model, text))
    base, tokens = reference.base, found.tokens
    return Certificate(
        reference=REFERENCE,
        dtype=str(computing_dtype(model)).removeprefix("torch."),
        stored=stored,
        texts=len(reference.texts),
        tokens=tokens,
        max_abs_logit_diff=found.max_diff,
        mean_abs_logit_diff=found.sum_diff / tokens,
        max_abs_logit=found.max_logit,
        mean_kl=found.kl / tokens,
        top1_agreement=found.agreeing / tokens,
        greedy_equal=_continuations(model, reference.texts) == reference.greedy,
        base_max_abs_logit_diff=base.max_diff,
        base_mean_kl=base.kl / tokens,
        base_top1_agreement=base.agreeing / tokens,
        zeros_before=reference.zeros,
        zeros_after=_zeros(model),
        edits=reference.edits,
    )


def stored_dtype(folder: Path) -> str:
    """The narrowest dtype that the weights of a checkpoint are stored in: float32, float16 or bfloat16."""
    from austeer.compiler.checkpoint import Checkpoint

    found = {tensor.dtype for tensor in Checkpoint.open(folder).tensors.values()}
    return next((name for dtype, name in (("BF16", "bfloat16"), ("F16", "float16")) if dtype in found), "float32")


def text_logits(model: "PreTrainedModel", text: Tokens) -> "Tensor":
    """What a live model says of one text: logits [tokens, vocabulary], float32 on the CPU."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([text], device=input_device(model))
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def greedy(model: "PreTrainedModel", prompt: Tokens, count: int) -> Tokens:
    """The `count` most likely tokens after a prompt, one after the other, with a KV cache."""
    return _greedy(model, [prompt], count)[0]


def _continuations(model: "PreTrainedModel", texts: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Of the first texts' beginnings, those of one length together: most of a step's work may be widening weights."""
    prompts = [text[:GREEDY_PROMPT] for text in texts[:GREEDY_TEXTS]]
    made = dict[Tokens, Tokens]()
    for length in {len(prompt) for prompt in prompts}:
        alike = [prompt for prompt in prompts if len(prompt) == length]
        made |= zip(alike, _greedy(model, alike, GREEDY_TOKENS), strict=True)
    return tuple(made[prompt] for prompt in prompts)


def _greedy(model: "PreTrainedModel", prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Of prompts of one length."""
    import torch

    tokens, cache, made = torch.tensor(prompts, device=input_device(model)), None, list["Tensor"]()
    with torch.inference_mode():
        while len(made) < count:
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1).to(tokens.device)
            made.append(tokens)
    rows: list[list[int]] = torch.cat(made, dim=1).tolist()
    return [tuple(row) for row in rows]


def _zeros(model: "PreTrainedModel") -> float:
    # An adapter stands beside the weights and is none of them.
    named = ((name, weight) for name, weight in model.named_parameters() if "lora_" not in name)
    weights = [weight for _, weight in named if weight.dim() >= 2]
    values = sum(weight.numel() for weight in weights)
    return (values - sum(int(weight.count_nonzero()) for weight in weights)) / values
