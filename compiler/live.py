"""Live transformers models: loading one, and where its sites are."""

import gc
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from austeer.compiler.errors import CheckpointError, UsageError
from austeer.compiler.facts import ModelFacts, facts_of
from austeer.compiler.sites import SiteName
from austeer.compiler.widened import compute_in_float32

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDENED = "widened"  # a dtype to load in, beside those of torch


class Port(NamedTuple):
    """A place of a live model where an activation passes: the input or the output of a module.

    The activation is [batch, tokens, width], or flattened to [batch·tokens, width] (OPT's FFN).
    """

    module: "nn.Module"
    side: Literal["input", "output"]


def live_facts(model: "PreTrainedModel") -> ModelFacts:
    """The facts of a live model, from its own configuration, named after its folder: paths are nobody's business."""
    return facts_of(Path(model.config.name_or_path or "").name or "the model", model.config.to_dict())


def block_of(model: "PreTrainedModel", facts: ModelFacts, layer: int) -> "nn.Module":
    """The module of one block."""
    entry = facts.architecture
    return model.get_submodule((entry.prefix + entry.block.format(layer=layer)).rstrip("."))


def port(model: "PreTrainedModel", facts: ModelFacts, layer: int, site: SiteName) -> Port:
    """Where the activation of a site passes.

    In a mixture-of-experts layer `ffn` is the output of the whole FFN block, and `neurons` does not exist.
    """
    block, entry = block_of(model, facts, layer), facts.architecture
    if site == "residual":
        return Port(block, "output")
    if site in ("heads", "attn"):
        return Port(block.get_submodule(entry.attn_out.name), "input" if site == "heads" else "output")
    if entry.experts is not None and facts.has_experts(layer):
        if site == "neurons":
            raise CheckpointError(f"layer {layer} is a mixture of experts: it has no single `neurons` site")
        return Port(block.get_submodule(entry.experts.module), "output")
    return Port(block.get_submodule(entry.ffn_out.name), "input" if site == "neurons" else "output")


def ffn_input(model: "PreTrainedModel", facts: ModelFacts, layer: int) -> Port:
    """Where the input of the FFN passes, which is what a gate reads. Refused for a mixture of experts."""
    return Port(block_of(model, facts, layer).get_submodule(facts.ffn_in(layer).name), "input")


def output_norm(model: "PreTrainedModel", facts: ModelFacts, layer: int, site: SiteName) -> "nn.Module | None":
    """The norm that what is written at a site passes on its way into the residual stream; None if there is none."""
    name = facts.output_norm(site)
    return block_of(model, facts, layer).get_submodule(name) if name else None


def weight_of(projection: "nn.Module", *, transposed: bool) -> "Tensor":
    """The weight, float32 [residual, inputs]; where accelerate holds it elsewhere, read through what it does."""
    import torch

    weight: Any = projection.weight
    if not weight.is_meta:
        return (weight.T if transposed else weight).float()
    inputs = torch.eye(weight.shape[0 if transposed else 1], dtype=weight.dtype)
    return (projection(inputs) - projection(torch.zeros_like(inputs[:1]))).float().T


def activation_of(facts: ModelFacts) -> "Callable[[Tensor], Tensor]":
    """The activation function of the FFNs."""
    from transformers.activations import ACT2FN

    return ACT2FN[facts.architecture.activation.of(facts.config)]


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    may_miss: Collection[str] = (),
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The model in `folder`, for inference only; no network, and no code from the folder unless it is trusted.

    `dtype`: "auto" (as stored), a torch name such as "float32", or WIDENED (as stored, but computing in float32).
    `device`: "auto" (the accelerator if there is one, else the CPU), a torch device, or "spread" (over all
    accelerators, by accelerate's device_map).
    `may_miss`: endings of the names of weights that may be absent, for transformers makes them zero.
    Raises CheckpointError where transformers refuses the files or a weight is missing or left unused.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype == WIDENED:
        gc.collect()  # an earlier one that nobody needs: its modules and what is around their forwards are in cycles
    place = _device(device)
    placement = {"device_map": "auto"} if device == "spread" else {}
    running = {"experts_implementation": "eager"} if dtype == WIDENED else {}
    torch_dtype = "auto" if dtype in ("auto", WIDENED) else getattr(torch, dtype)
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **placement,
                **running,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load this model: {error}") from error
    model, report = loaded
    _require_complete(folder, report, tuple(may_miss))
    if device != "spread":
        model.to(place)
    if dtype == WIDENED:
        compute_in_float32(model)
    return model.eval().requires_grad_(False)


@contextmanager
def without_bars() -> Generator[None]:
    """Within the context transformers shows no progress bars of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`; CheckpointError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def best_device() -> str:
    """The torch device to use where the user names none."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _device(name: str) -> str:
    """A torch device that is there, or "spread"; UsageError otherwise."""
    import torch

    if name in ("auto", "spread"):
        return best_device() if name == "auto" else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an assertion is how torch says that it has no CUDA
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def fits_in_float32(values: int, device: str) -> bool:
    """Whether `values` weights in float32, and room to work, fit in the memory of the device."""
    free = _free_memory(_device(device))
    return free is None or 4 * values * 1.2 + 2**30 <= free


def _free_memory(device: str) -> int | None:
    """Bytes, or None where the system does not tell."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if device == "spread":
        return sum(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def _require_complete(folder: Path, report: dict[str, Any], may_miss: tuple[str, ...]) -> None:
    for state, consequence in (("missing_keys", "would be random"), ("unexpected_keys", "would be ignored")):
        names = sorted(name for name in report.get(state) or () if not name.endswith(may_miss))
        if names:
            raise CheckpointError(
                f"{folder}: {len(names)} weights {consequence} when transformers loads this model, the first is "
                f"{names[0]}; the files do not fit config.json"
            )
