"""Remove a share of the heads and of the FFN neurons of a Llama with torch-pruning: `restore` takes the result.

Needs an environment with torch-pruning and transformers; a folder is all that passes on:

    python examples/prune_with_torch_pruning.py MODEL PRUNED --share 0.25
    austeer-compile restore PRUNED --dense MODEL --data FILE -o RESTORED
"""

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch_pruning as tp
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--share", type=float, default=0.25, help="of heads and neurons to remove (default: 0.25)")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    prune_neurons(model, given.share)
    prune_heads(model, given.share)
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)
    config = model.config
    print(f"left in each layer: {config.num_attention_heads} heads, {config.intermediate_size} neurons")


def prune_neurons(model: nn.Module, share: float) -> None:
    """Takes the neurons of least norm, as many in every layer, with all that depends on them."""
    warnings.filterwarnings("ignore", "Unwrapped parameters")  # those of the norms, which no neuron touches
    graph = tp.DependencyGraph().build_dependency(
        model,
        {"input_ids": torch.arange(8)[None], "use_cache": False},
        forward_fn=lambda model, inputs: model(**inputs),
        output_transform=lambda output: output.logits,
    )
    importance = tp.importance.GroupMagnitudeImportance()
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        scores = importance(graph.get_pruning_group(up, tp.prune_linear_out_channels, list(range(up.out_features))))
        least = scores.argsort()[: round(share * len(scores))].tolist()
        graph.get_pruning_group(up, tp.prune_linear_out_channels, least).prune()
    model.config.intermediate_size = model.model.layers[0].mlp.up_proj.out_features


def prune_heads(model: nn.Module, share: float) -> None:
    """Takes the heads that the output projection weighs least, with the keys and values they share: whole groups.

    At least `share` of them, and as many more as it takes for their number to divide the hidden size, or transformers
    refuses the model. By hand: torch-pruning's graph does not come to an end on the attention of grouped heads.
    """
    config = model.config
    groups, width = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    together = config.num_attention_heads // groups  # heads that share keys and values
    left = next(n for n in range(int((1 - share) * groups), 0, -1) if config.hidden_size % (n * together) == 0)
    for attention in (layer.self_attn for layer in model.model.layers):
        norms = attention.o_proj.weight.detach().float().norm(dim=0).view(groups, -1).norm(dim=1)
        least = norms.argsort()[: groups - left].tolist()
        for linear in (attention.k_proj, attention.v_proj):
            tp.prune_linear_out_channels(linear, units(least, width))
        tp.prune_linear_out_channels(attention.q_proj, units(least, together * width))
        tp.prune_linear_in_channels(attention.o_proj, units(least, together * width))
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = left * together, left, width


def units(blocks: Iterable[int], width: int) -> list[int]:
    """The numbers of all units of some blocks."""
    return [block * width + offset for block in blocks for offset in range(width)]


if __name__ == "__main__":
    main()
