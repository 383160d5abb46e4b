"""A base and what a program makes of it, in transformers and in llama.cpp: tokens per second, in turns."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

from austeer.compiler.facts import Geometry, read_facts
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
from benchmarks.report import FOLDER, Report, Row
from benchmarks.samples import clock_for, estimate, ratio, seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Serve: TypeAlias = Callable[..., object]  # by `prompt` and `new_tokens`: how many tokens it reads, and makes
Open: TypeAlias = Callable[[], AbstractContextManager[Mapping[str, Serve]]]

LEAST_SPEED = 0.97
VOCABULARY = 512
LEAST_ROUNDS = 3
CONVERTER = Path(".engines/llama.cpp")  # where `make test` puts it
METHOD = (
    "Random llamas in bfloat16, one thread, batch 1, greedy, in turns. {what} Figures are tokens/s of processor time, "
    "as ratios within a round. The pages on which weights happen to lie are worth several percent, so every round "
    "loads all models anew, into memory of their own. A larger vocabulary would only bring the ratios nearer to 1."
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


@dataclass(frozen=True)
class Trial:
    """A base and its program: what both are called, and whether the base is measured with the program as hooks too.

    `write(folder, sizes)` writes the base, a llama of these sizes, and gives the program.
    """

    name: str
    what: str
    write: Callable[[Path, Mapping[str, object]], Program]
    base: str = "base"
    compiled: str = "compiled"
    hooks: bool = False

    def run(
        self,
        shape: Shape = EIGHT_B,
        layers: int = 2,
        rounds: int = 15,
        *,
        new_tokens: int = 24,
        prompt: int = 128,
        budget: float = 180.0,
    ) -> Report:
        """Decoding and reading, in transformers and, where it is installed with its converter, in llama.cpp.

        After `budget` seconds an engine begins no new round, once there are three. Smaller shapes have no limit: of
        them what the program adds is a larger part.
        """
        report = Report(self.name, METHOD.format(what=self.what))
        report.details |= {"shape": vars(shape), "layers": layers}
        works = Work("decoding", PROMPT, new_tokens), Work("reading", prompt, 1)
        limits = {self.compiled: LEAST_SPEED} if shape == EIGHT_B else {}
        FOLDER.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=FOLDER, prefix=f"{self.name}-") as scratch:
            for name, opened in self.engines(Path(scratch), {**shape.config(layers), "vocab_size": VOCABULARY}, report):
                taken = turns(opened, works, rounds, perf_counter() + budget)
                for work in works:
                    _add_rows(report, f"{name}, {work.name}", work.tokens, taken[work], limits)
        return report

    def engines(self, scratch: Path, sizes: Mapping[str, object], report: Report) -> Iterator[tuple[str, Open]]:
        """Each engine here, when the files that it reads are written."""
        base = scratch / self.base
        program = self.write(base, sizes)
        folders = {self.base: base, self.compiled: _compile(program, base, scratch / self.compiled)}
        yield "transformers", partial(_transformers, folders, program if self.hooks else None)
        if missing := no_llama_cpp():
            report.method += f" Without llama.cpp: {missing}"
            return
        write_tokenizer(base)
        convert(base, scratch / "base.gguf", "bf16")
        made = _compile(program, base, scratch / "gguf", "gguf")
        files = {self.base: scratch / "base.gguf", self.compiled: next(made.glob("*.gguf"))}
        yield "llama.cpp", partial(_llama_cpp, files)


def write_llama(
    folder: Path, sizes: Mapping[str, object], change: Callable[["PreTrainedModel"], None] = lambda _: None
) -> Geometry:
    """Writes a random llama without biases, changed if need be."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = random_llama(sizes, "cpu", "bfloat16")
    change(model)
    model.save_pretrained(folder)
    return read_facts(folder).geometry


def _compile(program: Program, base: Path, out: Path, form: str = "checkpoint") -> Path:
    """Without a certificate: the programs are random."""
    write_compiled(Compiled.of(program, open_base(str(base)), form=form), out)
    return out


@contextmanager
def _transformers(folders: Mapping[str, Path], hooks: Program | None) -> Iterator[Mapping[str, Serve]]:
    """The model with hooks is on the weights of the first, which is the base."""
    models = {name: _loaded(folder) for name, folder in folders.items()}
    serves = {name: partial(generated, model) for name, model in models.items()}
    if hooks is None:
        yield serves
        return
    with interpret(twin(next(iter(models.values()))), hooks) as hooked:
        yield {**serves, "hooks": partial(generated, hooked)}


def _loaded(folder: Path) -> "PreTrainedModel":
    """What transformers loads, which is a view of the file, in memory."""
    model = load_model(folder, device="cpu")
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


def no_llama_cpp() -> str | None:
    """Why llama.cpp, or its converter, is not here."""
    if CONVERTER.is_dir():
        os.environ.setdefault(VARIABLE, str(CONVERTER.resolve()))
    return LLAMA_CPP.missing()


@contextmanager
def _llama_cpp(files: Mapping[str, Path]) -> Iterator[Mapping[str, Serve]]:
    yield {name: partial(complete, server(file)) for name, file in files.items()}


def turns(opened: Open, works: Sequence[Work], rounds: int, until: float) -> dict[Work, dict[str, list[float]]]:
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


def _add_rows(
    report: Report, what: str, tokens: int, taken: dict[str, list[float]], limits: Mapping[str, float]
) -> None:
    """One row for each model but the base."""
    speed = {name: round(tokens / estimate(times).value, 2) for name, times in taken.items()}
    report.details[what] = {"tokens": tokens, "tokens_per_second": speed, "seconds": taken}
    base, *others = taken  # the first round begins with the base
    for name in others:
        note = f"{speed[name]} and {speed[base]} tokens/s, {len(taken[base])} rounds"
        found = ratio(taken[base], taken[name])
        report.rows.append(Row(f"{what}: {name} / {base}", found, at_least=limits.get(name), note=note))
