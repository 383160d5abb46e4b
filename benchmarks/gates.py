"""Gates: tokens per second of the base, of the model compiled with gates, and of the base with the gates as hooks."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

from austeer.compiler.facts import read_facts
from austeer.compiler.interpreter import interpret
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.verbs.bases import open_base
from austeer.compiler.verbs.common import Compiled, write_compiled
from austeer.targets.engines.llama_cpp import ENGINE as LLAMA_CPP
from austeer.targets.llama_cpp import VARIABLE, convert
from benchmarks.checkpoints import EIGHT_B, Shape
from benchmarks.in_place import twin
from benchmarks.live_models import PROMPT, generated, random_llama
from benchmarks.llama_cpp import complete, server, write_tokenizer
from benchmarks.programs import gated
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import clock_for, estimate, ratio, seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Serve: TypeAlias = Callable[..., object]  # by `prompt` and `new_tokens`: how many tokens it reads, and makes
Open: TypeAlias = Callable[[], AbstractContextManager[Mapping[str, Serve]]]

LEAST_SPEED = 0.97
NEURONS = 256
VOCABULARY = 512
LEAST_ROUNDS = 3
BASE, PROGRAM, COMPILED = "base", "program.safetensors", "compiled"
CONVERTER = Path(".engines/llama.cpp")  # where `make test` puts it
METHOD = (
    "Random llamas in bfloat16, one thread, batch 1, greedy, in turns. The base has no biases; the program has a "
    "Scale and a Shift behind a gate in every layer, on {neurons} new neurons, and is compiled by build. Figures are "
    "tokens/s of processor time, as ratios within a round. The pages on which weights happen to lie are worth several "
    "percent, so every round loads all models anew, into memory of their own. A larger vocabulary would only bring "
    "the ratios nearer to 1."
)


@dataclass(frozen=True)
class Work:
    """What is asked of a model, and which of its tokens count."""

    name: str
    prompt: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Those that are made; where it is only one, those that are read."""
        return self.new_tokens if self.new_tokens > 1 else self.prompt


def run(
    shape: Shape = EIGHT_B,
    layers: int = 2,
    rounds: int = 15,
    *,
    new_tokens: int = 24,
    prompt: int = 128,
    budget: float = 180.0,
) -> Report:
    """Decoding and reading, in transformers and, where it is installed with its converter, in llama.cpp.

    After `budget` seconds an engine begins no new round, once there are three. Smaller shapes have no limit: of them
    the neurons, which are as many, are a larger part.
    """
    report = Report("gates", METHOD.format(neurons=NEURONS))
    report.details |= {"shape": vars(shape), "layers": layers}
    works = Work("decoding", PROMPT, new_tokens), Work("reading", prompt, 1)
    least = LEAST_SPEED if shape == EIGHT_B else None
    FOLDER.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=FOLDER, prefix="gates-") as scratch:
        for name, opened in _engines(Path(scratch), shape, layers, report):
            taken = _taken(opened, works, rounds, perf_counter() + budget)
            for work in works:
                _add_rows(report, f"{name}, {work.name}", work.tokens, taken[work], least)
    return report


def _engines(scratch: Path, shape: Shape, layers: int, report: Report) -> Iterator[tuple[str, Open]]:
    """Each engine here, when the files that it reads are written."""
    _write_base(scratch, shape, layers)
    _compile(scratch, COMPILED)
    yield "transformers", partial(_transformers, scratch)
    if missing := _no_llama_cpp():
        report.method += f" Without llama.cpp: {missing}"
        return
    write_tokenizer(scratch / BASE)
    convert(scratch / BASE, scratch / "base.gguf", "bf16")
    _compile(scratch, "gguf", "gguf")
    yield "llama.cpp", partial(_llama_cpp, scratch)


def _compile(scratch: Path, name: str, form: str = "checkpoint") -> None:
    """Without a certificate: random neurons fit nothing."""
    base, program = open_base(str(scratch / BASE)), Program.load(scratch / PROGRAM)
    write_compiled(Compiled.of(program, base, form=form), scratch / name)


def _write_base(scratch: Path, shape: Shape, layers: int) -> None:
    """The base, and the program."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {**shape.config(layers), "vocab_size": VOCABULARY}
    random_llama(sizes, "cpu", "bfloat16").save_pretrained(scratch / BASE)
    gated(read_facts(scratch / BASE).geometry, NEURONS).save(scratch / PROGRAM)


@contextmanager
def _transformers(scratch: Path) -> Iterator[Mapping[str, Serve]]:
    """The model with hooks is on the weights of the base."""
    base, compiled = (_loaded(scratch / name) for name in (BASE, COMPILED))
    with interpret(twin(base), Program.load(scratch / PROGRAM)) as hooked:
        models = {"base": base, "compiled": compiled, "hooks": hooked}
        yield {name: partial(generated, model) for name, model in models.items()}


def _loaded(folder: Path) -> "PreTrainedModel":
    """What transformers loads, which is a view of the file, in memory."""
    model = load_model(folder, device="cpu")
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def _no_llama_cpp() -> str | None:
    if CONVERTER.is_dir():
        os.environ.setdefault(VARIABLE, str(CONVERTER.resolve()))
    return LLAMA_CPP.missing()


@contextmanager
def _llama_cpp(scratch: Path) -> Iterator[Mapping[str, Serve]]:
    files = {"base": scratch / "base.gguf", "compiled": next((scratch / "gguf").glob("*.gguf"))}
    yield {name: partial(complete, server(file)) for name, file in files.items()}


def _taken(opened: Open, works: Sequence[Work], rounds: int, until: float) -> dict[Work, dict[str, list[float]]]:
    """By work and model, the seconds of each round."""
    taken: dict[Work, dict[str, list[float]]] = {work: {} for work in works}
    for number in range(rounds):
        if number >= LEAST_ROUNDS and perf_counter() > until:
            break
        for work, name, time in _round(opened, works, number):
            taken[work].setdefault(name, []).append(time)
    return taken


def _round(opened: Open, works: Sequence[Work], number: int) -> Iterator[tuple[Work, str, float]]:
    """Loads all models, and begins with another one than the round before."""
    with opened() as models:
        for serve in models.values():
            serve(prompt=PROMPT, new_tokens=2)  # the warm-up
        names, first = list(models), number % len(models)
        for work in works:
            for name in names[first:] + names[:first]:
                call = partial(models[name], prompt=work.prompt, new_tokens=work.new_tokens)
                yield work, name, seconds(call, clock_for("cpu"))


def _add_rows(report: Report, what: str, tokens: int, taken: dict[str, list[float]], least: float | None) -> None:
    """One row for each model but the base."""
    speed = {name: round(tokens / estimate(times).value, 2) for name, times in taken.items()}
    report.details[what] = {"tokens": tokens, "tokens_per_second": speed, "seconds": taken}
    for name in list(taken)[1:]:  # the first round begins with the base
        note = f"{speed[name]} and {speed['base']} tokens/s, {len(taken['base'])} rounds"
        limit = least if name == "compiled" else None
        report.rows.append(Row(f"{what}: {name} / base", ratio(taken["base"], taken[name]), at_least=limit, note=note))
