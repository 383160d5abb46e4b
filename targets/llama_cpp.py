"""llama.cpp: its own converter from Hugging Face checkpoints to GGUF, found and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from austeer.compiler.errors import OutputError, Refused, UsageError

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "AUSTEER_LLAMA_CPP"

_LAST_LINES = 12
_HOW_TO_GET = (
    "Get it with `git clone --depth 1 https://github.com/ggml-org/llama.cpp`, or out of the sdist of llama-cpp-python "
    "(`pip download --no-deps --no-binary :all: llama-cpp-python`; it lies there in vendor/llama.cpp), and set "
    f"{VARIABLE} to the folder that holds {SCRIPT}"
)


def find_converter() -> Path:
    """The converter's script: in the folder that AUSTEER_LLAMA_CPP names, else on PATH.

    Raises UsageError if the variable leads nowhere, Refused, with the way to get it, if there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        script = Path(named).expanduser() / SCRIPT
        if not script.is_file():
            raise UsageError(f"{VARIABLE} is {named}, but there is no {SCRIPT} in it. {_HOW_TO_GET}")
        return script.resolve()
    found = shutil.which(SCRIPT)
    if found is None:
        raise Refused(f"GGUF is written by llama.cpp's own converter, and there is no {SCRIPT} on PATH. {_HOW_TO_GET}")
    return Path(found).resolve()


def convert(folder: Path, out: Path, outtype: str = "f32") -> None:
    """Writes the checkpoint in `folder` as the GGUF file `out`, its matrices as f32, f16 or bf16.

    The converter runs in a process of its own, with this Python and its packages, and takes the model's name from
    the name of `folder`. Raises OutputError, with the end of what the converter said, if it fails; `out` is then not
    there. Raises as `find_converter` does.
    """
    command = [sys.executable, str(find_converter()), str(folder), "--outtype", outtype, "--outfile", str(out)]
    try:
        # Bytes of its own only: no shell, and every argument is a path or one of three words.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    if done.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:])
        raise OutputError(
            f"llama.cpp's converter failed on {folder} with exit code {done.returncode}. It needs its own packages "
            f"(`pip install gguf sentencepiece`) and a tokenizer it knows. It said:\n{said}"
        )
