"""Serving with transformers: tokens per second of the base, of the compiled model, and of the base with hooks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from austeer.compiler.interpreter import interpret
from austeer.compiler.live import live_facts
from austeer.compiler.program import Program
from benchmarks.checkpoints import EIGHT_B, Shape
from benchmarks.in_place import compiled_twin, twin
from benchmarks.live_models import generated, prompt_for, random_llama
from benchmarks.operators import operators
from benchmarks.programs import mixed
from benchmarks.report import Report, Row
from benchmarks.samples import clock_for, estimate, interleaved, ratio, seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Models = Mapping[str, "PreTrainedModel"]

LEAST_SPEED = 0.97
SMALL = Shape(512, 1408, 8, 4).config(layers=8)
LLAMA_8B = EIGHT_B.config(layers=32)
METHOD = (
    "Greedy decoding with generate, batch 1, a fixed number of new tokens, in turns. The program has three Scales of "
    "ten units in every layer, at heads, neurons and ffn. Compiled: {compiled}. Figures are tokens/s, as ratios "
    "within a round. On the CPU: processor time of one thread."
)
ON_DISK = "written by build and loaded again"
IN_PLACE = "the fold's patch applied to the weights of the live model, so no file is written"


def run(device: str = "cpu", rounds: int = 15, new_tokens: int = 64, budget: float = 420.0) -> Report:
    """Base, compiled and hooks, eager; on an accelerator also through torch.compile with a static cache.

    After `budget` seconds nothing new is begun.
    """
    import torch

    until = perf_counter() + budget
    small = device == "cpu"
    report = Report("serving", METHOD.format(compiled=ON_DISK if small else IN_PLACE))
    with _small() if small else _large(device) as models:
        report.details |= {
            "device": device,
            "threads": torch.get_num_threads(),
            "new_tokens": new_tokens,
            **_compared(models),
        }
        _measure("eager", models, partial(generated, new_tokens=new_tokens), rounds, until, report)
        if not small:
            _graphs(models, new_tokens, rounds, until, report)
    return report


@contextmanager
def _small() -> Iterator[Models]:
    """A small float32 llama on the CPU, compiled by way of the disk."""
    from transformers.utils import logging

    from austeer.compiler.live import load_model
    from austeer.compiler.verbs.build import build

    logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        base, source, out = (Path(scratch, name) for name in ("base", "program.safetensors", "out"))
        random_llama(SMALL, "cpu", "float32").save_pretrained(base)
        model = load_model(base, device="cpu")
        program = _program(model)
        program.save(source)
        build(str(base), [source], out)
        with interpret(load_model(base, device="cpu"), program) as hooked:
            yield {"base": model, "compiled": load_model(out, device="cpu"), "hooks": hooked}


@contextmanager
def _large(device: str) -> Iterator[Models]:
    """An 8B llama in bfloat16, compiled in memory; the three share the weights that no edit touches."""
    base = random_llama(LLAMA_8B, device, "bfloat16")
    program = _program(base)
    with interpret(twin(base), program) as hooked:
        yield {"base": base, "compiled": compiled_twin(base, program), "hooks": hooked}


def _program(model: "PreTrainedModel") -> Program:
    geometry = live_facts(model).geometry
    return mixed(geometry, 3 * geometry.layers)


def _compared(models: Models) -> dict[str, Any]:
    """Whether the others ask the hardware for the same operators as the base does."""
    asked = {name: operators(model, prompt_for(model)) for name, model in models.items()}
    same = {name: found == asked["base"] for name, found in asked.items() if name != "base"}
    return {"operators": {name: len(found) for name, found in asked.items()}, "same_operators_as_base": same}


def _measure(
    mode: str,
    models: Models,
    generate: Callable[["PreTrainedModel"], list[int]],
    rounds: int,
    until: float,
    report: Report,
) -> None:
    """Adds one row for each model but the base."""
    made = {name: generate(model) for name, model in models.items()}  # the warm-up
    length = max(map(len, made.values()))
    clock = clock_for(models["base"].device.type)
    measures = {name: partial(seconds, partial(generate, model), clock) for name, model in models.items()}
    taken = interleaved(measures, rounds, until)
    speed = {name: round(length / estimate(times).value, 2) for name, times in taken.items()}
    report.details[mode] = {
        "rounds": len(taken["base"]),
        "tokens_per_second": speed,
        "tokens_until_it_leaves_the_base": {name: _agreeing(tokens, made["base"]) for name, tokens in made.items()},
        "seconds": taken,
    }
    for name in models:
        if name != "base":
            note = f"{speed[name]} and {speed['base']} tokens/s, {len(taken['base'])} rounds"
            least = LEAST_SPEED if name == "compiled" else None
            found = ratio(taken["base"], taken[name])
            report.rows.append(Row(f"{mode}: {name} / base", found, at_least=least, note=note))


def _graphs(models: Models, new_tokens: int, rounds: int, until: float, report: Report) -> None:
    """The same through torch.compile with CUDA graphs, for each model that it takes before time is over."""
    from torch._dynamo import config as dynamo
    from transformers import CompileConfig

    # Else dynamo gives the model with hooks the graph of the one without, and the hooks are silently lost.
    dynamo.skip_nnmodule_hook_guards = False
    options = {"cache_implementation": "static", "compile_config": CompileConfig(mode="reduce-overhead")}
    generate = partial(generated, new_tokens=new_tokens, **options)
    ready: dict[str, PreTrainedModel] = {}
    report.details["compilation"] = found = {}
    for name, model in models.items():
        if perf_counter() > until:
            found[name] = "left out: no time was left"
            continue
        found[name] = _compilation(partial(generate, model))
        if "failed" not in found[name]:
            ready[name] = model
    if ready.keys() > {"base"}:
        _measure("CUDA graphs", ready, generate, rounds, until, report)


def _compilation(warm_up: Callable[[], object]) -> dict[str, Any]:
    """Runs a model until nothing compiles any more, and what torch.compile says about it."""
    from torch._dynamo.utils import counters

    counters.clear()
    try:
        # The first call compiles, the second records the CUDA graphs.
        times = [seconds(warm_up) for _ in range(3)]
    except RuntimeError as error:
        return {"failed": str(error).partition("\n")[0]}
    breaks = {str(reason).partition("\n")[0]: times for reason, times in counters["graph_break"].items()}
    kept = {key: value for key, value in counters["inductor"].items() if "cudagraph" in key}
    return {"seconds": times, "stats": dict(counters["stats"]), "graph_breaks": breaks, "cudagraphs": kept}


def _agreeing(first: list[int], second: list[int]) -> int:
    """How many tokens two texts have in common before they part."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((number for number, (one, other) in pairs if one != other), len(first))
