"""Restoring: of the held-out loss that pruning cost, the share that is back, beside what else could be done."""

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from austeer.compiler.facts import ModelFacts, read_facts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.response_loss import summed_loss
from austeer.compiler.responses import Response, encode_responses, read_samples
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.restore import restore
from austeer.compiler.verbs.task import TopHeads
from austeer.passes.train_shifts import Schedule
from benchmarks.baselines import lora, mean_compensation
from benchmarks.pruners import magnitude, structured, two_of_four, wanda
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = Path("examples")
FIT, HELD_OUT, TOKENS = slice(0, 100), slice(100, 200), 256
COMPONENTS, BATCH = 10, 8
RATES = (3e-3, 1e-2, 3e-2)  # for LoRA
CURVE: tuple[TopHeads, ...] = (5, 10, 20)
DATA = {
    "stories260K": "tinystories_text.jsonl",
    "babyllama-105": "tinystories_text.jsonl",
    "imdb-llama-7m": "imdb_text.jsonl",
    "imdb-gpt2-2.6m": "imdb_text.jsonl",
}
LEAST = {("stories260K", "magnitude 50 %", "all"): 32.0, ("stories260K", "magnitude 50 %", None): 25.0}
INTERVAL = "95% bootstrap interval over the texts"
METHOD = (
    "Rows 1 to 100 of {data} to fit to, 101 to 200 held out, {tokens} tokens each, float32. Found: the share of the "
    "held-out loss that pruning cost which is back. Mean compensation: a bias after every output projection that "
    "restores the dense model's mean output there, one after the other (FLAP's, for pruning of any kind). LoRA: by "
    "PEFT, on the attention's output projections, with the least rank that trains about as many parameters as all "
    "heads do, on all 100 rows (restoring holds 20 of them out itself), with the same steps, batches and schedule; its "
    "learning rate is the best of {rates} on the held-out rows themselves. Untrained: the lost components alone."
)


@dataclass(frozen=True)
class Pruner:
    """One way to prune: our plain one, and the example that does it with someone else's, in their environment."""

    name: str
    plain: Callable[[Path, Path, Sequence[str]], None]
    package: str = ""
    options: tuple[str, ...] = ()
    needs_data: bool = False

    @property
    def script(self) -> Path:
        """The example."""
        return EXAMPLES / f"prune_with_{self.package.replace('-', '_')}.py"

    def prune(self, model: Path, out: Path, data: Path, pythons: Mapping[str, Path]) -> str:
        """Writes the pruned model; returns whose pruner it was. The examples are for Llamas."""
        python = pythons.get(self.package) if read_facts(model).architecture.model_type == "llama" else None
        if python is None:
            self.plain(model, out, [sample.response for sample in read_samples(data)])
            return "benchmarks/pruners.py"
        calibration = ("--data", str(data)) if self.needs_data else ()
        command = [str(python), str(self.script), str(model), str(out), *calibration, *self.options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return self.package


CUT = "structured 25 %, cut"
PRUNERS = (
    Pruner("magnitude 50 %", lambda model, out, _: magnitude(model, out)),
    Pruner("Wanda 50 %", wanda, "llmcompressor", needs_data=True),
    Pruner("2:4 by Wanda", two_of_four, "llmcompressor", ("--pattern", "2:4"), needs_data=True),
    Pruner("structured 25 %, in shape", lambda model, out, _: structured(model, out, in_shape=True)),
    Pruner(CUT, lambda model, out, _: structured(model, out), "torch-pruning"),
)


@dataclass(frozen=True)
class Case:
    """One pruned model, what it was, and the data: a file, and as tokens to fit to and held out."""

    dense: Path
    pruned: Path
    data: Path
    fit: tuple[Response, ...]
    held: tuple[Response, ...]
    epochs: int | None

    @property
    def facts(self) -> ModelFacts:
        """Of the pruned model."""
        return read_facts(self.pruned)

    def judge(self, model: "PreTrainedModel") -> list[float]:
        """The loss of each held-out text, summed over its tokens."""
        return [float(summed_loss(model, [response])) for response in self.held]

    def loss(self, folder: Path) -> list[float]:
        """That of the model in a folder, in float32."""
        return self.judge(load_model(folder, dtype="float32", device="cpu"))

    def parameters(self) -> int:
        """How many restoring all heads trains: a magnitude for each component, and a free vector."""
        facts = self.facts
        heads = facts.geometry.layers * facts.geometry.heads // facts.head_dim
        return heads * (min(COMPONENTS, facts.head_dim) + facts.head_dim)


@dataclass(frozen=True)
class Outcome:
    """What one method came to: the summed losses, and what is to be said of it."""

    losses: list[float]
    note: str = ""
    top_heads: TopHeads | str = ""


def run(
    models: Path | None,
    data: Path | None,
    pythons: Mapping[str, Path],
    *,
    only: Sequence[str] = (),
    epochs: int | None = None,
    curve: bool = False,
) -> Iterator[Report]:
    """A report for each model that is there."""
    there = [name for name in only or DATA if models and data and (models / name).is_dir()]
    if not (models and data and there):
        yield Report(
            "restore", "Not run: no real models. Give their folder as --models and that of the texts as --data"
        )
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in there:
        report = Report(
            f"restore-{name}", METHOD.format(data=DATA[name], tokens=TOKENS, rates=RATES), interval=INTERVAL
        )
        with TemporaryDirectory(dir=FOLDER, prefix="restore-") as scratch:
            for pruner, case, whose in _cases(Path(scratch), models / name, data / DATA[name], pythons, epochs):
                _measure(report, pruner, case, whose, curve=curve)
        yield report


def _cases(
    scratch: Path, model: Path, data: Path, pythons: Mapping[str, Path], epochs: int | None
) -> Iterator[tuple[str, Case, str]]:
    """Each pruning of a model: its name, the case, and whose pruner it was."""
    lines = data.read_text("utf-8").splitlines()
    rows = scratch / "fit.jsonl"
    rows.write_text("\n".join(lines[FIT]) + "\n", "utf-8")
    held = scratch / "held-out.jsonl"
    held.write_text("\n".join(lines[HELD_OUT]) + "\n", "utf-8")
    tokenizer = load_tokenizer(model)
    fit, out = (encode_responses(tokenizer, read_samples(part), TOKENS)[0] for part in (rows, held))
    for number, pruner in enumerate(PRUNERS):
        if pruner.name == CUT and "head_dim" not in read_facts(model).config:
            continue  # such a config.json cannot say that there are fewer heads
        pruned = scratch / f"pruned-{number}"
        yield pruner.name, Case(model, pruned, rows, fit, out, epochs), pruner.prune(model, pruned, rows, pythons)


def _measure(report: Report, pruning: str, case: Case, whose: str, *, curve: bool) -> None:
    """Adds the rows of one pruned model."""
    tokens = sum(response.scored for response in case.held)
    dense, pruned = case.loss(case.dense), case.loss(case.pruned)
    found: dict[str, float] = {"dense": sum(dense) / tokens, "pruned": sum(pruned) / tokens}
    note = f"dense {found['dense']:.3f}, pruned {found['pruned']:.3f} nats a token; by {whose}"
    report.rows.append(Row(f"{pruning}: nothing", Estimate(0, 0, 0), "%", note=note))
    for name, outcome in _outcomes(case, curve=curve):
        found[name] = sum(outcome.losses) / tokens
        least = LEAST.get((case.dense.name, pruning, outcome.top_heads))  # pyright: ignore[reportArgumentType]
        note = f"{found[name]:.3f} nats a token{outcome.note}"
        row = Row(f"{pruning}: {name}", recovered(dense, pruned, outcome.losses), "%", at_least=least, note=note)
        report.rows.append(row)
    report.details[pruning] = {"pruner": whose, "nats_per_token": found, "parameters": case.parameters()}


def _outcomes(case: Case, *, curve: bool) -> Iterator[tuple[str, Outcome]]:
    yield "mean compensation", _compensated(case)
    yield "LoRA", _lora(case)
    yield "restored, untrained", _restored(case, "all", 0)
    facts = case.facts
    heads = facts.geometry.layers * facts.geometry.heads // facts.head_dim
    chosen: tuple[TopHeads, ...] = tuple(k for k in CURVE if isinstance(k, int) and k < heads) if curve else ()
    for top_heads in (*chosen, None, "all"):
        what = {None: "the default's heads", "all": f"all {heads} heads"}.get(top_heads, f"{top_heads} heads")
        yield f"restored, {what}", _restored(case, top_heads, case.epochs)


def _compensated(case: Case) -> Outcome:
    program = mean_compensation(case.dense, case.pruned, case.fit)
    model = load_model(case.pruned, dtype="float32", device="cpu")
    with interpret(model, program):
        return Outcome(case.judge(model))


def _lora(case: Case) -> Outcome:
    """The best of the learning rates, by the held-out texts."""
    facts = case.facts
    a_rank = facts.geometry.layers * (facts.geometry.heads + facts.geometry.residual)
    rank = max(1, round(case.parameters() / a_rank))
    tried: dict[float, list[float]] = {}
    for rate in RATES:
        schedule = Schedule(rate, case.epochs, BATCH)
        _, tried[rate] = lora(case.pruned, case.fit, schedule, rank, case.judge)
    best = min(tried, key=lambda rate: sum(tried[rate]))
    return Outcome(tried[best], f", {rank * a_rank} parameters, lr {best}")


def _restored(case: Case, top_heads: TopHeads, epochs: int | None) -> Outcome:
    with TemporaryDirectory(dir=FOLDER, prefix="restored-") as scratch:
        out, settings = Path(scratch) / "out", Settings(device="cpu", dtype="float32", max_length=TOKENS)
        restore(
            str(case.pruned),
            case.data,
            out,
            dense=str(case.dense),
            top_heads=top_heads,
            epochs=epochs,
            settings=settings,
        )
        return Outcome(case.loss(out), f", {case.parameters()} parameters" if top_heads == "all" else "", top_heads)


def recovered(dense: Sequence[float], pruned: Sequence[float], found: Sequence[float]) -> Estimate:
    """The share of the lost loss that is back, in percent, with its interval over the texts."""
    d, p, f = (np.asarray(losses) for losses in (dense, pruned, found))
    drawn = np.random.default_rng(0).choice(len(d), (2000, len(d)))

    def share(
        rows: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
        return 100 * (p[rows] - f[rows]).sum(-1) / (p[rows] - d[rows]).sum(-1)

    low, high = np.percentile(share(drawn), (2.5, 97.5))
    return Estimate(float(share(np.arange(len(d)))), float(low), float(high))
