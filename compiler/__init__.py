"""The languages of the compiler, and the machine that carries them to a checkpoint.

    from austeer.compiler import Program, Scale, Shift, Rank1

Names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from austeer.compiler.edits import Edit, Rank1, Scale, Shift
    from austeer.compiler.errors import (
        AusteerError,
        CheckFailed,
        CheckpointError,
        InputError,
        OutputError,
        PairsError,
        ProgramError,
        Refused,
        SpaceError,
        UsageError,
    )
    from austeer.compiler.gates import Fitted, Gate, Gated, Origin
    from austeer.compiler.interpreter import interpret
    from austeer.compiler.program import Program

__all__ = [
    "AusteerError",
    "CheckFailed",
    "CheckpointError",
    "Edit",
    "Fitted",
    "Gate",
    "Gated",
    "InputError",
    "Origin",
    "OutputError",
    "PairsError",
    "Program",
    "ProgramError",
    "Rank1",
    "Refused",
    "Scale",
    "Shift",
    "SpaceError",
    "UsageError",
    "interpret",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("errors", "edits", "gates", "program", "interpreter"):  # in order of cost
            home = import_module(f"{__name__}.{module}")
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
