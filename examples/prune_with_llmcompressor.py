"""Prune the linear maps of a Llama with llmcompressor, by Wanda or SparseGPT: `restore` takes the result.

Needs an environment with llmcompressor, which holds transformers back; a folder is all that passes on:

    python examples/prune_with_llmcompressor.py MODEL PRUNED --data FILE --pattern 2:4
    austeer-compile restore PRUNED --dense MODEL --data FILE -o RESTORED
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset, disable_progress_bars
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a Llama")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help='rows of {"text"}: the calibration texts')
    parser.add_argument("--method", choices=METHODS, default="wanda")
    parser.add_argument("--pattern", default="0:0", help="such as 2:4 (default: none)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros (default: 0.5)")
    parser.add_argument("--tokens", type=int, default=256, help="of each text (default: 256)")
    given = parser.parse_args()
    disable_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = [json.loads(line)["text"] for line in given.data.read_text("utf-8").splitlines()]
    rows = [dict(tokenizer(text, truncation=True, max_length=given.tokens)) for text in texts]
    # The head is ignored by a regular expression only: its plain name is not heeded.
    recipe = METHODS[given.method](sparsity=given.sparsity, mask_structure=given.pattern, ignore=["re:.*lm_head"])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=[recipe],
        num_calibration_samples=len(rows),
        max_seq_length=given.tokens,
    )
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    zeros = [float((weight == 0).float().mean()) for name, weight in model.named_parameters() if "_proj" in name]
    print(f"zeros in the linear maps: {min(zeros):.1%} to {max(zeros):.1%}")


if __name__ == "__main__":
    main()
