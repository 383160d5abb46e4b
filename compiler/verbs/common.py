"""What several verbs share: the base model opened, the settings of a run, and writing a compiled checkpoint."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from austeer.compiler.card import RecoveryTable, read_card, render_card
from austeer.compiler.certificate import Certificate, certify
from austeer.compiler.errors import CheckFailed, Refused, UsageError
from austeer.compiler.gate_card import gates_record
from austeer.compiler.gate_check import SideCheck
from austeer.compiler.live import WIDENED, best_device, fits_in_float32, load_model, load_tokenizer
from austeer.compiler.manifest import FORMAT, MANIFEST, PROGRAM, render, tool_versions
from austeer.compiler.neutral import sample_neutral
from austeer.compiler.pairs import read_texts
from austeer.compiler.program import Program
from austeer.compiler.progress import bar
from austeer.compiler.staging import staged, write_file
from austeer.compiler.target import Target, target_named
from austeer.compiler.tokens import Chat, Tokens, encode_texts
from austeer.compiler.verbs.bases import Base, GgufBase
from austeer.compiler.verbs.forms import form_named, plan_approximated
from austeer.passes.approximation import Approximation
from austeer.targets.checkpoint import Writing
from austeer.targets.tables import TARGETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGET, FORM, GGUF_TARGET = "transformers", "checkpoint", "llama.cpp"
SAMPLED_TEXTS, SAMPLED_TOKENS = 16, 64


@dataclass(frozen=True)
class Settings:
    """How models are run. `max_length` in tokens (None: what the model allows, at most 2048)."""

    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int = 4096
    max_length: int | None = None
    seed: int = 0
    chat: Chat | None = None
    raw: bool = False  # no chat template, and no notice that one exists

    def length_for(self, config: dict[str, Any]) -> int:
        """The number of tokens after which texts are cut for this model."""
        limits = [config[key] for key in ("max_position_embeddings", "n_positions") if config.get(key)]
        return min([self.max_length or 2048, *limits])


def target_for(name: str | None, form: str) -> Target:
    """The target that is named, or that of the form: llama.cpp alone reads GGUF. UsageError for one that is none."""
    target = target_named(name or (GGUF_TARGET if form == "gguf" else TARGET), TARGETS)
    if form == "gguf" and target.name not in (GGUF_TARGET, "portable"):
        raise UsageError(f"{target.title} reads no GGUF; leave --target out, or choose another --form")
    return target


@dataclass(frozen=True)
class Compiled:
    """A program compiled into a base for a target, in a form: all that is decided before anything is written.

    `approximation`: which one, where the program has no exact lowering.
    """

    program: Program
    base: Base | GgufBase
    target: str
    form: str
    plan: Any  # as its form makes it, a Planned
    approximation: Approximation | None = None

    @staticmethod
    def of(
        program: Program,
        base: Base | GgufBase,
        target: str | None = None,
        form: str = FORM,
        approximation: Approximation | None = None,
    ) -> "Compiled":
        """Raises UsageError for an unknown target or form, Refused for what they cannot carry."""
        chosen, engine = form_named(form), target_for(target, form)
        if approximation is None:
            plan = chosen.plan(program, base.source, engine, base.fetched.id)
            return Compiled(program, base, engine.name, form, plan)
        if form != FORM or not isinstance(base, Base):
            raise Refused(f"an approximation is written as a {FORM}, not as {form}; compile it first, then convert it")
        plan = plan_approximated(program, base.layout, engine, approximation)
        return Compiled(program, base, engine.name, form, plan, approximation)

    @property
    def exact(self) -> bool:
        """Whether every edit is carried exactly."""
        return all(entry["exact"] for entry in self.plan.lowering)

    def write(self, folder: Path, writing: Writing) -> None:
        """Writes the form's files into an empty folder."""
        form_named(self.form).write(self.plan, folder, writing)

    def compare(self, out: Path) -> dict[str, str]:
        """For each file of `out`, "ok" or what is wrong with it."""
        return form_named(self.form).compare(self.plan, out)

    def load(self, out: Path, dtype: str, device: str) -> "PreTrainedModel":
        """What lies in `out` as a live model."""
        return form_named(self.form).load(self.plan, out, self.base.path, dtype, device)

    def certify(self, out: Path, texts: Sequence[Tokens], dtype: str, device: str) -> Certificate:
        """Measures what lies in `out` against the interpreter."""

        def load() -> "PreTrainedModel":
            return self.load(out, dtype, device)

        measured = certify(self.base.path, self.program, texts, load, dtype=dtype, device=device)
        return replace(measured, approximate=not self.exact)


def measuring_texts(
    base: Base, texts: str | Path | None, settings: Settings
) -> tuple[Sequence[Tokens], tuple[str, ...]]:
    """The texts of a file of texts or pairs, or, without one, texts sampled from the base; and notes."""
    if texts is None:
        model = load_model(base.path, dtype=working_dtype(base, settings), device=settings.device)
        return sample_texts(base, model, settings.seed), ()
    return encode_texts(load_tokenizer(base.path), read_texts(texts), settings.length_for(base.checkpoint.config))


def sample_texts(base: Base, model: "PreTrainedModel", seed: int) -> Sequence[Tokens]:
    """16 texts of at most 64 tokens, sampled from the base."""
    return sample_neutral(model, load_tokenizer(base.path), SAMPLED_TEXTS, SAMPLED_TOKENS, seed)


def chat_notice(tokenizer: "PreTrainedTokenizerBase", settings: Settings) -> tuple[str, ...]:
    """Says so where a tokenizer has a chat template that the user neither asks for nor declines."""
    if tokenizer.chat_template and settings.chat is None and not settings.raw:
        return (
            "this looks like an instruct model: --chat puts the prompts into its chat template, --raw silences this",
        )
    return ()


def certificate_dtype(base: Base, settings: Settings) -> str:
    """float32, of the weights too if that fits in memory; but what the user names wins."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if _fits_in_float32(base, settings) else WIDENED


def working_dtype(base: Base, settings: Settings) -> str:
    """As stored, but on a CPU float32 if that fits in memory: few CPUs are quick in 16 bits."""
    on_cpu = (best_device() if settings.device == "auto" else settings.device).startswith("cpu")
    return "float32" if settings.dtype == "auto" and on_cpu and _fits_in_float32(base, settings) else settings.dtype


def _fits_in_float32(base: Base, settings: Settings) -> bool:
    values = sum(math.prod(tensor.shape) for tensor in base.checkpoint.tensors.values())
    return fits_in_float32(values, settings.device)


@dataclass(frozen=True)
class Measured:
    """What else is known of a compiled model before it appears: for the manifest, and for the card."""

    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sides: Mapping[str, SideCheck] = field(default_factory=dict[str, SideCheck])
    recovery: RecoveryTable = ()


def write_compiled(
    compiled: Compiled,
    out: Path,
    *,
    certify: Callable[[Path], Certificate] | None = None,
    measure: Callable[[Path], Measured] = lambda _: Measured(),
    extra: dict[str, Any] | None = None,
) -> Certificate | None:
    """Writes the compiled model at `out`, whole or not at all, and certifies it before it appears.

    `measure` says what else is to stand in card and manifest.
    Raises OutputError if `out` exists or cannot be written, CheckFailed, leaving nothing, if the certificate
    does not hold.
    """
    program, base, plan = compiled.program, compiled.base, compiled.plan
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "base": base.describe(),
        "program": {"file": PROGRAM, "sha256": program.sha256},
        "target": compiled.target,
        "form": compiled.form,
        "lowering": plan.lowering,
        "left_out": plan.left_out,
        **({"gates": gates} if (gates := gates_record(program)) else {}),
        **(extra or {}),
    }
    with staged(out, needed=plan.output_bytes) as folder:
        with bar("Writing", plan.output_bytes) as advance:
            writing = Writing(advance=advance)
            compiled.write(folder, writing)
        (folder / PROGRAM).parent.mkdir()
        program.save(folder / PROGRAM)
        certificate = certify(folder) if certify else None
        if certificate and not certificate.passed:
            raise CheckFailed(
                f"{out}: not written, for its certificate does not hold: {'; '.join(certificate.failures())}"
            )
        measured = measure(folder)
        manifest |= {
            **measured.record,
            "rounding": writing.rounding,
            "certificate": certificate.plain() if certificate else None,
            "versions": tool_versions(),
        }
        write_file(folder / MANIFEST, render(manifest))
        card = render_card(
            program,
            base.fetched.id,
            read_card(base.path),
            certificate,
            form=compiled.form,
            notes=plan.notes,
            sides=measured.sides,
            recovery=measured.recovery,
        )
        write_file(folder / "README.md", card)
    return certificate
