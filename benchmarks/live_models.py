"""Random llamas in memory, and what is asked of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 16


def random_llama(sizes: Mapping[str, Any], device: str, dtype: str) -> "PreTrainedModel":
    """A llama of these sizes with the weights that transformers begins a training with."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    # No token ends a text: what is generated is as long as asked.
    config = LlamaConfig(**{**sizes, "dtype": dtype}, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def prune_half(model: "PreTrainedModel") -> None:
    """Zeroes the smaller half of every row of the linear maps of the blocks."""
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.ndim > 1:
            size = weight.abs().float()
            weight[size <= size.kthvalue(weight.shape[1] // 2, dim=1, keepdim=True).values] = 0


def prompt_for(model: "PreTrainedModel", tokens: int = PROMPT) -> Any:
    """Token ids [1, tokens]."""
    import torch

    return torch.arange(1, tokens + 1, device=model.device)[None]


def generated(model: "PreTrainedModel", *, prompt: int = PROMPT, new_tokens: int, **options: Any) -> list[int]:
    """The new tokens. Their way to the CPU waits until the device is done."""
    import torch

    ids = prompt_for(model, prompt)
    made: Any = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    return made[0, prompt:].tolist()
