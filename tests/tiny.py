"""Tiny random models of every architecture, written to disk, and random programs that are legal for them.

What is legal is stated here a second time, so that a product that refuses everything cannot pass.
"""

import atexit
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from austeer.compiler import Edit, Program, Rank1, Scale, Shift
from austeer.compiler.certificate import Certificate, certify
from austeer.compiler.facts import read_facts
from austeer.compiler.layout import Layout
from austeer.compiler.live import load_model
from austeer.passes.fold import fold
from austeer.passes.legalize import legalize
from austeer.targets import checkpoint
from austeer.targets.tables import TARGETS

logging.disable_progress_bar()

VOCABULARY = 61


@dataclass(frozen=True)
class Tiny:
    """What a tiny model is like. `biases` and `tied` do nothing where the architecture has no such flag."""

    architecture: str
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    residual: int = 20  # a multiple of heads (with experts, of 4 too); gpt2, gpt_neox and opt: heads times head_dim
    neurons: int = 28
    experts: int = 3
    biases: bool = True
    tied: bool = False
    post_norm: bool = False  # opt only: do_layer_norm_before=False
    dense: tuple[int, ...] = (1,)  # layers without experts: qwen3_moe only
    vocabulary: int = VOCABULARY
    spread: float = 0.3  # of the weights of blocks
    embedding: float = 1.0  # spread of the embeddings: large enough to count beside what the blocks add
    dtype: str = "float32"
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        return {**CONFIGS[self.architecture](self), "tie_word_embeddings": self.tied}

    def in_memory(self) -> Any:
        """The model with random weights, all of them different from what any default would be."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            config = AutoConfig.for_model(self.architecture, **self.config)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                fresh = torch.randn_like(parameter)
                # Norms stay near 1.
                widths = {1: 0.2, 2: self.embedding if "embed" in name or "wte" in name else self.spread}
                width = widths.get(parameter.ndim, self.spread)
                parameter.data = width * fresh + (parameter.data if parameter.ndim == 1 else 0)
        return model.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def save(self, folder: Path) -> Any:
        """Writes the model as transformers does, in one file; returns it."""
        model = self.in_memory()
        model.save_pretrained(folder)
        return model

    def has_experts(self, layer: int) -> bool:
        return self.architecture == "mixtral" or (self.architecture == "qwen3_moe" and layer not in self.dense)

    def legal(self, kind: type[Edit], layer: int, site: str) -> bool:
        """Whether an edit has an exact lowering in transformers; from design section 4, not from the product."""
        if site == "neurons" and self.has_experts(layer):
            return False
        if kind is Rank1:
            return site in ("heads", "neurons")
        if kind is Scale:
            return site != "residual" or self.post_norm
        if self.architecture in ("gemma2", "gemma3_text", "olmo2"):
            return site not in ("neurons", "ffn")  # a norm of what varies stands after it
        return self.architecture != "mixtral"

    def native(self, kind: type[Edit], layer: int, site: str) -> bool:
        """Whether an edit has an exact fold into the weights that the model has; from design section 4 too."""
        if site == "residual":
            norms = self.architecture in ("gemma2", "gemma3_text", "olmo2") or self.post_norm
            return kind is Shift and not norms and "ffn" in self._constants() and not self.has_experts(layer)
        if kind is Rank1 and site not in ("heads", "neurons"):
            return False
        at_ffn = site in ("neurons", "ffn")
        if at_ffn and self.has_experts(layer):
            return kind is Scale and site == "ffn"
        return kind is not Shift or ("ffn" if at_ffn else "attn") in self._constants()

    def _constants(self) -> tuple[str, ...]:
        """The output projections with a bias."""
        if self.architecture == "gpt2":
            return ("attn", "ffn")
        if self.architecture == "gpt_neox":
            return ("attn", "ffn") if self.biases else ("ffn",)
        if self.architecture in ("mistral", "mixtral", "qwen2", "phi3") or not self.biases:
            return ()
        return ("attn", "ffn") if self.architecture in ("llama", "smollm3", "opt") else ("attn",)


def _decoder(tiny: Tiny) -> dict[str, Any]:
    return {
        "vocab_size": tiny.vocabulary,
        "hidden_size": tiny.residual,
        "intermediate_size": tiny.neurons,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _decoder_with(**more: Any) -> Callable[[Tiny], dict[str, Any]]:
    return lambda tiny: {**_decoder(tiny), **more}


def _with_attention_bias(tiny: Tiny) -> dict[str, Any]:
    return {**_decoder(tiny), "attention_bias": tiny.biases}


def _llama(tiny: Tiny) -> dict[str, Any]:
    return {**_with_attention_bias(tiny), "mlp_bias": tiny.biases}


def _smollm3(tiny: Tiny) -> dict[str, Any]:
    return {**_llama(tiny), "no_rope_layers": ([1, 0] * tiny.layers)[: tiny.layers], "use_sliding_window": False}


def _qwen3_moe(tiny: Tiny) -> dict[str, Any]:
    experts = {
        "num_experts": tiny.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": _by_four(tiny.neurons // 2),
    }
    return {**_with_attention_bias(tiny), **experts, "mlp_only_layers": list(tiny.dense), "norm_topk_prob": True}


def _mixtral(tiny: Tiny) -> dict[str, Any]:
    experts = {"num_local_experts": tiny.experts, "num_experts_per_tok": 2}
    return {**_decoder(tiny), **experts, "intermediate_size": _by_four(tiny.neurons)}


def _by_four(size: int) -> int:
    """Rounded up: torch's grouped matrix product wants rows of whole 16 bytes."""
    return -(-size // 4) * 4


def _gpt2(tiny: Tiny) -> dict[str, Any]:
    return {
        "vocab_size": tiny.vocabulary,
        "n_embd": tiny.heads * tiny.head_dim,
        "n_layer": tiny.layers,
        "n_head": tiny.heads,
        "n_inner": tiny.neurons,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _gpt_neox(tiny: Tiny) -> dict[str, Any]:
    config = {**_decoder(tiny), "hidden_size": tiny.heads * tiny.head_dim, "attention_bias": tiny.biases}
    return {key: value for key, value in config.items() if key not in ("num_key_value_heads", "head_dim")}


def _opt(tiny: Tiny) -> dict[str, Any]:
    return {
        "vocab_size": tiny.vocabulary,
        "hidden_size": tiny.heads * tiny.head_dim,
        "ffn_dim": tiny.neurons,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": tiny.heads * tiny.head_dim,
        "enable_bias": tiny.biases,
        "do_layer_norm_before": not tiny.post_norm,
    }


CONFIGS: Mapping[str, Callable[[Tiny], dict[str, Any]]] = {
    "llama": _llama,
    "smollm3": _smollm3,
    "mistral": _decoder_with(sliding_window=None),
    "qwen2": _decoder,
    "qwen3": _with_attention_bias,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gemma2": _with_attention_bias,
    "gemma3_text": _with_attention_bias,
    "phi3": _decoder,
    "olmo2": _with_attention_bias,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}

# Every architecture, and what else deserves a look at every turn.
VARIANTS: Mapping[str, Tiny] = {
    **{name: Tiny(name) for name in CONFIGS},
    **{f"{name}-tied": Tiny(name, biases=False, tied=True, kv_heads=4) for name in ("llama", "gpt2", "gemma2")},
    **{f"{name}-unbiased": Tiny(name, biases=False) for name in ("llama", "gpt_neox", "opt", "qwen3")},
    "qwen3_moe-sparse": Tiny("qwen3_moe", dense=(), biases=False),
    "opt-post": Tiny("opt", post_norm=True),
}


@cache
def on_disk(tiny: Tiny) -> Path:
    """The folder of a model, in one file. Shared by all tests of a session: do not change it."""
    folder = scratch() / "model"
    tiny.save(folder)
    return folder


def scratch() -> Path:
    """A new empty folder, which lasts as long as the process; for what pytest's tmp_path does not reach."""
    return Path(mkdtemp(dir=_root()))


@cache
def _root() -> Path:
    root = Path(mkdtemp(prefix="austeer-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length], the special ones left out."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path) -> Any:
    """The model in a folder in float32, as any user of transformers would load it; complete or not at all."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(input_ids=ids, **more).logits


# ---- other layouts on disk of the same model ------------------------------------------


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a one-file model whose dictionary of tensors went through `change`."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "model.safetensors":
            tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}


def bare(tiny: Tiny, folder: Path) -> Path:
    """The model with names as saved from the bare decoder; the head's own tensor, if any, stays."""
    prefix = PREFIXES.get(tiny.architecture, "model.")
    return rewritten(
        on_disk(tiny), folder, lambda tensors: {name.removeprefix(prefix): tensors[name] for name in tensors}
    )


def fused(tiny: Tiny, folder: Path) -> Path:
    """A mixture of experts as transformers 5 holds it: one tensor of three dimensions for all experts of a layer."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        live = tiny.in_memory().state_dict()
        experts = {name: tensor for name, tensor in live.items() if ".mlp.experts." in name and tensor.ndim == 3}
        assert experts
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in kept.items()}
        return {**renamed, **experts}

    return rewritten(on_disk(tiny), folder, change)


def sharded(tiny: Tiny, folder: Path, shards: int = 3) -> Path:
    """The model in several files with an index; the tensors of a layer are torn apart."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        places: dict[str, str] = {}
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensors[key].contiguous() for key in sorted(tensors)[number::shards]}
            save_file(part, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return {}

    rewritten(on_disk(tiny), folder, change)
    (folder / "model.safetensors").unlink()
    return folder


# ---- programs --------------------------------------------------------------------------


def programs_edits(tiny: Tiny, folder: Path, seed: int, *, share: float = 1.0) -> list[Edit]:
    """Random legal edits in random order: every kind at every site of every layer, or a `share` of those."""
    rng = np.random.default_rng(seed)
    edits = list(_every_edit(tiny, folder, rng))
    rng.shuffle(edits)  # pyright: ignore[reportArgumentType]
    return edits[: max(1, round(share * len(edits)))]


def program(tiny: Tiny, folder: Path | None = None, seed: int = 0, *, share: float = 1.0) -> Program:
    """A random legal program for a model; see `programs_edits`."""
    folder = folder or on_disk(tiny)
    return Program.of(programs_edits(tiny, folder, seed, share=share), model=folder)


def _every_edit(tiny: Tiny, folder: Path, rng: np.random.Generator) -> Iterator[Edit]:
    geometry = read_facts(folder).geometry
    widths = {"heads": geometry.heads, "neurons": geometry.neurons}
    for layer in range(tiny.layers):
        for site in ("heads", "attn", "neurons", "ffn", "residual"):
            width = widths.get(site, geometry.residual)
            if tiny.legal(Scale, layer, site):
                for units in np.array_split(rng.permutation(width)[:6], 2):
                    yield Scale(layer, site, units.tolist(), rng.normal(size=len(units)))
            if tiny.legal(Shift, layer, site):
                yield from (Shift(layer, site, 0.3 * rng.normal(size=width)) for _ in range(2))
            if tiny.legal(Rank1, layer, site):
                yield from (_rank1(layer, site, width, geometry.residual, rng) for _ in range(2))


def in_place(tiny: Tiny, folder: Path, seed: int = 0) -> Program:
    """A random program of edits that fold into the weights that the model has, and so go into every engine."""
    edits = programs_edits(tiny, folder, seed)
    return Program.of([edit for edit in edits if tiny.native(type(edit), edit.layer, edit.site)], model=folder)


def _rank1(layer: int, site: Any, inputs: int, outputs: int, rng: np.random.Generator) -> Rank1:
    k, v = rng.normal(size=inputs), rng.normal(size=outputs)
    return Rank1(layer, site, k * (rng.random(inputs) < 0.5), v, 0.1)


def planned_checkpoint(program: Program, layout: Layout, target: str = "llama.cpp") -> checkpoint.Plan:
    """What the form `checkpoint` would write for a target."""
    form = legalize(program, layout.facts, TARGETS[target])
    return checkpoint.plan(fold(program, layout.facts, form), layout, form)


def certified(
    base: Path, out: Path, program: Program, texts: Sequence[Sequence[int]], dtype: str = "float32"
) -> Certificate:
    """The certificate of a checkpoint on the CPU."""

    def load_compiled() -> Any:
        return load_model(out, dtype=dtype, device="cpu")

    return certify(base, program, [tuple(text) for text in texts], load_compiled, dtype=dtype, device="cpu")


def stored(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, from all its files."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def with_dtype(variants: Sequence[str], dtype: str) -> list[Tiny]:
    return [replace(VARIANTS[name], dtype=dtype) for name in variants]
