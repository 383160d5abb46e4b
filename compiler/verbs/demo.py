"""demo: the whole job on the small model that ships with the project, with no network."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from austeer.compiler.certificate import greedy
from austeer.compiler.live import load_model, load_tokenizer
from austeer.compiler.verbs.common import Settings
from austeer.compiler.verbs.steer import Steering, steer
from austeer.compiler.verbs.verify import Verification, verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = Path(__file__).parents[1] / "demo_model"
PROMPTS = ("Once upon a time", "One day, Tom went to the", "The dog saw", "It was raining and Tom")
TOKENS = 40


@dataclass(frozen=True)
class Demo:
    """The steering, its verification, and greedy text of base and compiled model for some prompts."""

    steering: Steering
    verification: Verification
    texts: tuple[tuple[str, str], ...]

    @property
    def passed(self) -> bool:
        """Whether the verification passed."""
        return self.verification.passed

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.steering.plain(),
            "verification": self.verification.plain(),
            "texts": [{"base": base, "compiled": compiled} for base, compiled in self.texts],
        }


def demo(out: str | Path | None = None) -> Demo:
    """Steers, compiles and verifies the shipped model; the checkpoint is kept only where `out` says so."""
    settings = Settings(device="cpu")
    with _place(out) as folder:
        steering = steer(
            str(MODEL), MODEL / "pairs.jsonl", folder,
            neutral=MODEL / "neutral.txt", settings=settings,
        )  # fmt: skip
        verification = verify(folder, base=str(MODEL), texts=MODEL / "neutral.txt", settings=settings)
        tokenizer = load_tokenizer(MODEL)
        before, after = (_continuations(path, tokenizer) for path in (MODEL, folder))
    if out is None:
        steering = replace(steering, out=None)  # it was temporary
    return Demo(steering, verification, tuple(zip(before, after, strict=True)))


@contextmanager
def _place(out: str | Path | None) -> Generator[Path]:
    if out is not None:
        yield Path(out)
        return
    with TemporaryDirectory() as folder:
        yield Path(folder) / "steered"


def _continuations(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The most likely text after each prompt, up to the end of its story."""
    model = load_model(folder, dtype="float32", device="cpu")
    texts: list[str] = []
    for prompt in PROMPTS:
        ids = tuple(tokenizer(prompt)["input_ids"])
        made = greedy(model, ids, TOKENS)
        story = made[: made.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in made else made
        texts.append(str(tokenizer.decode([*ids, *story], skip_special_tokens=True)))
    return texts
