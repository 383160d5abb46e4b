"""Pictures as files: equal figures give equal bytes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from austeer.compiler.errors import UsageError
from austeer.compiler.staging import require_place, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
SIZE = (7.0, 4.5)  # inches


def require_picture(file: Path) -> None:
    """UsageError for a name that says no format, OutputError if the file exists or has nowhere to be."""
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--picture writes {' and '.join(SUFFIXES)} files, not {file.name}")
    require_place(file)


def write_picture(draw: "Callable[[Axes], None]", file: Path) -> None:
    """Writes what `draw` puts on the axes it is given, whole or not at all."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "austeer-compile", "svg.fonttype": "none"}):
        figure = Figure(figsize=SIZE, layout="constrained")  # no pyplot: no display, and nothing to close
        draw(figure.subplots())
        write_atomically(file, _bytes(figure, file.suffix.lower().lstrip(".")))


def _bytes(figure: "Figure", form: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()
