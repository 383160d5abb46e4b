"""The check of a compiled checkpoint after loading, in the engines that are to serve it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from austeer.compiler.certificate import stored_dtype
from austeer.compiler.engine_check import EngineCheck, Expected, check, expect
from austeer.compiler.errors import CheckFailed
from austeer.compiler.live import load_model
from austeer.compiler.program import Program
from austeer.compiler.tokens import Tokens, take_tokens
from austeer.targets.engines.engine import Engine, Request
from austeer.targets.modeling import require_own_code

TOKENS = 256  # llama.cpp is asked for each of them anew


def check_engines(
    engines: Sequence[Engine],
    base: Path,
    out: Path,
    program: Program,
    texts: Sequence[Tokens],
    *,
    form: str = "checkpoint",
) -> tuple[tuple[EngineCheck, ...], tuple[str, ...]]:
    """(what each engine does, what is wrong): every engine on the base and on `out`, against the interpreter.

    `form` is that of `out`. All of it in float32 on the CPU, on the first 256 tokens. UsageError for an engine that
    does not read the form, CheckpointError for model code that is not ours.
    """
    if not engines:
        return (), ()
    texts = take_tokens(texts, TOKENS)
    expected = expect(load_model(base, dtype="float32", device="cpu"), program, texts)
    plain = Request(base, expected.texts)
    edited = of_form(plain, out, form)
    found = [_check(engine, expected, plain, edited) for engine in engines]
    checks = tuple(one for one in found if isinstance(one, EngineCheck))
    problems = [one.failure if isinstance(one, EngineCheck) else one for one in found]
    return checks, tuple(problem for problem in problems if problem)


def of_form(base: Request, out: Path, form: str) -> Request:
    """The request of the base, to `out`; CheckpointError if `out` brings code that is not ours."""
    if form == "lora":
        return replace(base, adapter=out)
    if form == "gguf":
        return replace(base, gguf=next(out.glob("*.gguf")))
    if form == "model-code":
        require_own_code(out)
    return replace(base, folder=out, code=form == "model-code")


def _check(engine: Engine, expected: Expected, base: Request, edited: Request) -> EngineCheck | str:
    """The comparison, or why the engine answers nothing that could be compared."""
    try:
        plain, compiled = engine.ask(base).scores, engine.ask(edited).scores
        stored = stored_dtype(base.folder)
        return check(engine.name, engine.version(), expected, plain, compiled, stored=stored)
    except CheckFailed as error:
        return str(error)
