"""One benchmark's findings: a table for people, a JSON file for programs, and whether a limit is broken."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.samples import INTERVAL, Estimate

FOLDER = Path("build") / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One figure. `at_most` or `at_least` is its limit, if it has one."""

    what: str
    found: Estimate
    unit: str = "×"
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def broken(self) -> bool:
        """Whether the figure breaks its limit."""
        too_much = self.at_most is not None and self.found.value > self.at_most
        return too_much or (self.at_least is not None and self.found.value < self.at_least)

    @property
    def limit(self) -> str:
        """The limit as text."""
        if self.at_most is not None:
            return f"≤ {self.at_most:.4g} {self.unit}"
        return f"≥ {self.at_least:.4g} {self.unit}" if self.at_least is not None else "-"

    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        found = self.found
        verdict = ("broken" if self.broken else "held") if self.limit != "-" else ""
        spread = f"{found.low:.4g} to {found.high:.4g}"
        return self.what, f"{found.value:.4g} {self.unit}", spread, self.limit, verdict, self.note


@dataclass
class Report:
    """The findings of one benchmark, with how they were obtained."""

    name: str
    method: str
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    interval: str = INTERVAL

    @property
    def broken(self) -> bool:
        """Whether any limit is."""
        return any(row.broken for row in self.rows)

    def publish(self) -> None:
        """Prints the table and writes `build/benchmarks/<name>.json`."""
        self._show()
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self.name}.json").write_text(self.json() + "\n", "utf-8")

    def json(self) -> str:
        """Everything, as JSON."""
        rows = [{**asdict(row), "broken": row.broken} for row in self.rows]
        machine = {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()}
        plain = {"benchmark": self.name, "method": self.method, "machine": machine, "rows": rows, **self.details}
        return json.dumps(plain, indent=1, ensure_ascii=False)

    def _show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.name, caption=self.method, caption_justify="left", title_justify="left")
        for header in ("", "found", self.interval, "limit", "", "note"):
            table.add_column(header)
        for row in self.rows:
            table.add_row(*row.cells(), style="red" if row.broken else None)
        console = Console()
        # Into a file, a table as wide as it needs to be.
        Console(width=None if console.is_terminal else 200).print(table)
