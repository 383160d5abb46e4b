"""Restoring: of the held-out loss that pruning cost, the share that is back, beside what else could be done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from austeer.compiler.facts import read_facts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.program import Program
from austeer.compiler.response_loss import summed_loss
from austeer.compiler.responses import Response, encode_responses, read_samples
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.restore import COMPONENTS, restore
from austeer.compiler.verbs.task import TopHeads
from austeer.passes.schedule import Schedule
from benchmarks.baselines import flap, lora, mean_compensation
from benchmarks.prunings import prunings_of
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DATA = {
    "stories260K": "tinystories_text.jsonl",
    "babyllama-105": "tinystories_text.jsonl",
    "imdb-llama-7m": "imdb_text.jsonl",
    "imdb-gpt2-2.6m": "imdb_text.jsonl",
}
FIT, HELD_OUT, TOKENS = slice(100), slice(100, 200), 256
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # LoRA's
CURVE = (5, 10, 20)
HALF, ALL = "restored, half of the heads", "restored, all heads"  # half is the default
LEAST = {("stories260K", "magnitude 50 %", HALF): 25.0, ("stories260K", "magnitude 50 %", ALL): 32.0}
INTERVAL = "95% bootstrap interval over the texts"
METHOD = (
    "Found: of the held-out loss that pruning cost, the share that is back. Rows 1 to {fit} of {data} to fit to, the "
    "next {held} held out, {tokens} tokens each, float32. FLAP's bias: after every output projection what its removed "
    "weights gave on average, all at once. Mean compensation: the bias that gives each the dense model's mean output, "
    "one after the other. LoRA: PEFT's, on the attention's output projections, of the rank that trains about as many "
    "parameters as restoring all heads does, by the same loss, steps, batches and schedule; on all rows, of which "
    "restoring holds out a fifth; its learning rate is the best of {rates} on the held-out rows themselves. Untrained: "
    "the lost components of all heads alone."
)


@dataclass(frozen=True)
class Case:
    """One pruned model, the one it was, and the texts: the file to fit to, and both parts as tokens."""

    pruning: str
    pruner: str
    dense: Path
    pruned: Path
    data: Path
    fit: tuple[Response, ...]
    held_out: tuple[Response, ...]
    epochs: int | None

    @property
    def heads(self) -> int:
        """Those of all layers of the pruned model."""
        facts = read_facts(self.pruned)
        return facts.geometry.layers * facts.geometry.heads // facts.head_dim

    @property
    def parameters(self) -> int:
        """How many restoring all heads trains: for each a magnitude for every component, and a free vector."""
        width = read_facts(self.pruned).head_dim
        return self.heads * (min(COMPONENTS, width) + width)

    def judge(self, model: "PreTrainedModel") -> list[float]:
        """The loss of each held-out text, summed over its tokens."""
        return [float(summed_loss(model, [response])) for response in self.held_out]

    def judge_folder(self, folder: Path) -> list[float]:
        """That of the model in a folder."""
        return self.judge(load_model(folder, dtype="float32", device="cpu"))


@dataclass(frozen=True)
class Outcome:
    """What one method came to: the losses of the held-out texts, and what is to be said of it."""

    name: str
    losses: list[float]
    note: str = ""


def run(
    models: Path | None,
    data: Path | None,
    python: Path | None,
    *,
    only: Sequence[str] = (),
    epochs: int | None = None,
    curve: bool = False,
) -> Iterator[Report]:
    """A report for each model that is there. `python`: see `Pruning.apply`."""
    there = [name for name in only or DATA if models and data and (models / name).is_dir()]
    if not (models and data and there):
        yield Report(
            "restore", "Not run: no real models. Give --models, their folder, and --data, that of their texts."
        )
        return
    if not find_spec("peft"):
        yield Report("restore", "Not run: LoRA needs PEFT. It comes with the extra `engines`.")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in there:
        sizes = {"fit": FIT.stop, "held": HELD_OUT.stop - HELD_OUT.start, "tokens": TOKENS}
        report = Report(f"restore-{name}", METHOD.format(data=DATA[name], rates=RATES, **sizes), interval=INTERVAL)
        with TemporaryDirectory(dir=FOLDER, prefix="restore-") as scratch:
            for case in _cases(Path(scratch), models / name, data / DATA[name], python, epochs):
                _measure(report, case, curve=curve)
        yield report


def _cases(scratch: Path, model: Path, data: Path, python: Path | None, epochs: int | None) -> Iterator[Case]:
    """Each pruning of a model, when it is made."""
    rows, tokenizer, parts = data.read_text("utf-8").splitlines(), load_tokenizer(model), []
    for name, part in (("fit", FIT), ("held-out", HELD_OUT)):
        (scratch / name).write_text("\n".join(rows[part]) + "\n", "utf-8")
        parts.append(encode_responses(tokenizer, read_samples(scratch / name), TOKENS)[0])
    for number, pruning in enumerate(prunings_of(read_facts(model))):
        pruned = scratch / f"pruned-{number}"
        pruner = pruning.apply(model, pruned, scratch / "fit", python)
        yield Case(pruning.name, pruner, model, pruned, scratch / "fit", parts[0], parts[1], epochs)


def _measure(report: Report, case: Case, *, curve: bool) -> None:
    """Adds the rows of one pruned model."""
    tokens = sum(response.scored for response in case.held_out)
    dense, pruned = case.judge_folder(case.dense), case.judge_folder(case.pruned)
    found = {"dense": sum(dense) / tokens, "pruned": sum(pruned) / tokens}
    note = f"dense {found['dense']:.3f}, pruned {found['pruned']:.3f} nats a token; by {case.pruner}"
    report.rows.append(Row(f"{case.pruning}: nothing", Estimate(0, 0, 0), "%", note=note))
    for outcome in _outcomes(case, curve=curve):
        found[outcome.name] = sum(outcome.losses) / tokens
        note = f"{found[outcome.name]:.3f} nats a token{outcome.note}"
        least = LEAST.get((case.dense.name, case.pruning, outcome.name))
        share = recovered(dense, pruned, outcome.losses)
        report.rows.append(Row(f"{case.pruning}: {outcome.name}", share, "%", at_least=least, note=note))
    report.details[case.pruning] = {"pruner": case.pruner, "nats_per_token": found}


def _outcomes(case: Case, *, curve: bool) -> Iterator[Outcome]:
    yield _biased(case, "FLAP's bias", flap(case.dense, case.pruned, case.fit))
    yield _biased(case, "mean compensation", mean_compensation(case.dense, case.pruned, case.fit))
    yield _lora(case)
    yield _restored(case, "restored, untrained", "all", 0)
    for count in CURVE:
        if curve and count < case.heads and count != case.heads // 2:
            yield _restored(case, f"restored, {count} heads", count, case.epochs)
    yield _restored(case, HALF, None, case.epochs)
    yield _restored(case, ALL, "all", case.epochs)


def _biased(case: Case, name: str, program: Program) -> Outcome:
    with interpret(load_model(case.pruned, dtype="float32", device="cpu"), program) as model:
        return Outcome(name, case.judge(model))


def _lora(case: Case) -> Outcome:
    """With the learning rate that is best on the held-out texts."""
    tried: list[tuple[list[float], int, float]] = []
    for rate in RATES:
        learned = lora(case.pruned, case.fit, Schedule(rate, case.epochs), case.parameters)
        tried.append((case.judge(learned.model), learned.parameters, rate))
    losses, parameters, rate = min(tried, key=lambda one: sum(one[0]))
    return Outcome("LoRA", losses, f", {parameters} parameters, lr {rate}")


def _restored(case: Case, name: str, top_heads: TopHeads, epochs: int | None) -> Outcome:
    with TemporaryDirectory(dir=FOLDER, prefix="restored-") as scratch:
        out, settings = Path(scratch) / "out", Settings(device="cpu", dtype="float32", max_length=TOKENS)
        done = restore(
            str(case.pruned),
            case.data,
            out,
            dense=str(case.dense),
            top_heads=top_heads,
            epochs=epochs,
            settings=settings,
        )
        assert done
        note = f", {done.restored.trained.best.numel()} parameters" if epochs != 0 else ""
        return Outcome(name, case.judge_folder(out), note)


def recovered(dense: Sequence[float], pruned: Sequence[float], found: Sequence[float]) -> Estimate:
    """The share of the lost loss that is back, in percent, with its interval over the texts."""
    lost, back = np.subtract(pruned, dense), np.subtract(pruned, found)
    drawn = np.random.default_rng(0).choice(len(lost), (2000, len(lost)))
    low, high = np.percentile(back[drawn].sum(1) / lost[drawn].sum(1), (2.5, 97.5))
    return Estimate(*(float(100 * share) for share in (back.sum() / lost.sum(), low, high)))
