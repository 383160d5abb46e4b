"""What all engines have in common: a request, an answer, and the one place where they are asked."""

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.errors import CheckFailed, UsageError
from austeer.compiler.tokens import Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Scores: TypeAlias = "NDArray[np.float32]"  # log-probabilities [tokens, vocabulary]: row i is of the token after i


@dataclass(frozen=True)
class Request:
    """Texts for the model in `folder` (Hugging Face layout), and how many tokens each is to be continued by.

    `adapter` is a folder with a PEFT adapter to put on the model, for the engines that serve adapters; `gguf` a
    file to load in the model's place, for the engine that reads those. `code` lets the folder's own code run.
    """

    folder: Path
    texts: tuple[Tokens, ...]
    count: int = 0
    adapter: Path | None = None
    gguf: Path | None = None
    code: bool = False


@dataclass(frozen=True)
class Answer:
    """For each text the log-probabilities at all its tokens, float32, and its most likely continuation."""

    scores: tuple[Scores, ...]
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True)
class Engine:
    """An inference engine on the CPU in float32: `run` converts the folder to what it loads, and asks it.

    `packages` are the distributions it needs, the engine's own first; `more` says what else is missing, if
    anything; `install` is how to get it.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    run: Callable[[Request], Answer]
    more: Callable[[], str | None] = lambda: None
    adapters: bool = False
    gguf: bool = False
    code: bool = False

    def missing(self) -> str | None:
        """Why the engine cannot run here, with the way out; None if it can."""
        absent = [name for name in self.packages if _version(name) is None]
        if absent:
            return f"{', '.join(absent)} is not installed: {self.install}"
        return self.more()

    def version(self) -> str | None:
        """Of the engine's own distribution, where that lies in this environment."""
        return _version(self.packages[0]) if self.packages else None

    def ask(self, request: Request) -> Answer:
        """The engine's answer.

        Raises UsageError if the engine is not here or does not read this form, CheckFailed, with the engine's own
        words, if it refuses the model.
        """
        reason = self.missing()
        if reason:
            raise UsageError(f"engine {self.name} cannot run here: {reason}")
        if request.adapter and not self.adapters:
            raise UsageError(f"engine {self.name} serves no adapters; merge this one, or use another engine")
        if request.gguf and not self.gguf:
            raise UsageError(f"engine {self.name} reads no GGUF; llama.cpp does")
        if request.code and not self.code:
            raise UsageError(f"engine {self.name} runs no model code; transformers and vllm do")
        try:
            with _quiet():
                return self.run(request)
        except UsageError:
            raise
        except Exception as error:  # engines refuse with whatever they like
            said = str(error).strip() or type(error).__name__
            raise CheckFailed(f"engine {self.name} does not run {request.adapter or request.folder}: {said}") from error


def answer(
    request: Request, score: Callable[[Tokens], Scores], follow: Callable[[Tokens, int], Tokens] | None = None
) -> Answer:
    """Asks text by text; without `follow`, continuations come from the scores of ever longer texts."""

    def grow(text: Tokens, count: int) -> Tokens:
        made = text
        while len(made) < len(text) + count:
            made = (*made, int(score(made)[-1].argmax()))
        return made[len(text) :]

    texts, count = request.texts, request.count
    continuations = tuple((follow or grow)(text, count) for text in texts) if count else ()
    return Answer(tuple(score(text) for text in texts), continuations)


def log_softmax(logits: Any) -> Scores:
    """Log-probabilities of logits [tokens, vocabulary], computed in float64."""
    import numpy as np

    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet() -> Generator[None]:
    """Converters print, and warn of their own affairs; stdout belongs to the report."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
