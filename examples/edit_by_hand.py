"""Write a program by hand, look at what it does with hooks, and bake it into a checkpoint.

Run: python examples/edit_by_hand.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from austeer.compiler import Program, Scale, interpret
from austeer.compiler.text import render
from austeer.compiler.verbs.build import build
from austeer.compiler.verbs.demo import MODEL  # the small model that ships with the project; any folder will do


def main() -> None:
    program = Program.of([Scale(layer=2, site="ffn", units=range(16), gamma=[2.0] * 16)], model=MODEL)
    print(render(program))

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    with torch.no_grad(), interpret(model, program):
        hooked = model(**inputs).logits

    with TemporaryDirectory() as folder:
        program.save(Path(folder) / "program.safetensors")
        report = build(str(MODEL), [Path(folder) / "program.safetensors"], Path(folder) / "compiled")
        print(f"rewrote {report.compiled.plan.nbytes} of {report.compiled.plan.output_bytes} bytes")
        compiled = AutoModelForCausalLM.from_pretrained(Path(folder) / "compiled").eval()
        with torch.no_grad():
            plain = compiled(**inputs).logits
    print(f"largest difference between hooks and weights: {(hooked - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
