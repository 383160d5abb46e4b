"""Which engines serve a PEFT adapter beside the unedited base, and what they ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from austeer.compiler.errors import Refused


@dataclass(frozen=True)
class Engine:
    """How one engine serves an adapter; `version` is the one its rules were read from or tried on.

    `without`: architectures it has no LoRA for. `modules`: the only projections it has LoRA for, if not all.
    `ranks`: the values its --max-lora-rank takes, if not any. `partial`: whether a kind of projection may be
    adapted in some layers only; else it wants factors for all, and drops the kind in silence where it gets fewer.
    """

    name: str
    version: str
    usage: str
    without: tuple[str, ...] = ()
    modules: tuple[str, ...] | None = None
    ranks: tuple[int, ...] | None = None
    partial: bool = True

    def command(self, rank: int) -> str:
        """How it is served; OUT is the adapter, BASE the unedited model."""
        return self.usage.format(rank=self.fitting(rank))

    def require(self, architecture: str, names: Sequence[str], rank: int) -> None:
        """Refused, with the way out, unless the engine serves an adapter of this rank on these projections."""
        if architecture in self.without:
            raise Refused(f"{self.name} has no LoRA for {architecture}; use --form checkpoint")
        foreign = [name for name in names if self.modules is not None and name.rpartition(".")[2] not in self.modules]
        if foreign:
            only = ", ".join(self.modules or ())
            raise Refused(f"{self.name} has LoRA for {only} only, not for {foreign[0]}; use --form checkpoint")
        if self.fitting(rank) < rank:
            raise Refused(
                f"the adapter has rank {rank}, and {self.name} serves at most {self.fitting(rank)}; "
                "edit fewer units in any one layer, or use --form checkpoint"
            )

    def fitting(self, rank: int) -> int:
        """The smallest rank to ask the engine for that holds `rank`, or its largest if none does."""
        ranks = self.ranks or (rank,)
        return min((most for most in ranks if most >= rank), default=max(ranks))


COMMON = ("o_proj", "down_proj")

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("transformers", "5.23.0 and PEFT 0.21.2", "peft.PeftModel.from_pretrained(model, OUT)"),
        Engine(
            "vllm",
            "0.33.0",
            "vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules steered=OUT",
            without=("gpt2",),
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        ),
        Engine(
            "sglang",
            "0.5.23",
            "sglang.launch_server --model-path BASE --enable-lora --max-lora-rank {rank} --lora-paths steered=OUT",
            modules=COMMON,
        ),
        # Its converter transposes gpt2's matrices, which the factors are not.
        Engine(
            "llama.cpp",
            "ggml-org/llama.cpp@0c1e57098",
            "convert_lora_to_gguf.py --base BASE --outfile lora.gguf OUT; llama-server -m BASE.gguf --lora lora.gguf",
            without=("gpt2", "opt"),
        ),
        Engine(
            "tgi",
            "git db931fcf",
            "text-generation-launcher --model-id BASE --lora-adapters steered=OUT",
            modules=COMMON,
            partial=False,
        ),
    )
}


def engine_for(target: str) -> Engine:
    """The engine of a target; Refused, with the way out, where it loads no PEFT adapter beside the base."""
    if target not in ENGINES:
        raise Refused(
            f"target {target} does not serve a PEFT adapter beside the base; those that do are {', '.join(ENGINES)}. "
            "Use one of them, or --form checkpoint"
        )
    return ENGINES[target]
