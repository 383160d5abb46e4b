"""A study of Optuna's: points are asked for in rounds, kept in a file if there is one, and never measured twice."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.errors import InputError
from austeer.compiler.staging import require_folder

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

ROUND = 8  # points measured together; a round is chosen knowing the rounds before it, and no part of itself
NAME, IDENTITY, RECORD = "austeer-compile", "identity", "record"


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, on a logarithmic scale if `log`; whole ones if both are."""

    low: float
    high: float
    log: bool = True


Dimension: TypeAlias = tuple[str | int | float, ...] | Range
Point: TypeAlias = dict[str, Any]
"""A value for each dimension."""


class Study:
    """Asks for points by TPE: `starts` first, then what it makes of the values that it was told.

    What it is told goes to `file`, if there is one, at once. Every round is chosen anew from `seed` and the complete
    rounds before it, so that a study that was interrupted goes on as if it had not been. `identity` says, part by
    part, what is searched; InputError for a file that holds the study of something else, or none.
    """

    def __init__(
        self,
        dimensions: Mapping[str, Dimension],
        starts: Sequence[Point],
        *,
        seed: int,
        file: Path | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.starts, self.seed = starts, seed
        self.distributions = {name: _distribution(dimension) for name, dimension in dimensions.items()}
        self.stored = _open(file, {**(identity or {}), "seed": str(seed)})

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was recorded of each point, in the order of asking."""
        return [trial.user_attrs[RECORD] for trial in self.stored.trials]

    @property
    def settled(self) -> list[dict[str, Any]]:
        """The records of complete rounds: what the choice of the present round may know."""
        return self.records[: len(self.stored.trials) // ROUND * ROUND]

    def ask(self, most: int) -> list[Point]:
        """The points of this round that are still to be measured: none once there are `most` in all."""
        told = self.stored.trials
        first = len(told) // ROUND * ROUND
        rounds = _in_memory()
        rounds.add_trials(told[:first])
        asked = [self._ask(rounds, number) for number in range(first, min(first + ROUND, most))]
        return asked[len(told) - first :]

    def tell(self, point: Point, value: float, record: Mapping[str, Any]) -> None:
        """The value (the higher the better) of the next point asked for, and what to record of it, as JSON values."""
        from optuna.trial import create_trial

        attributes = {RECORD: dict(record)}
        self.stored.add_trial(
            create_trial(value=value, params=point, distributions=self.distributions, user_attrs=attributes)
        )

    def _ask(self, rounds: "optuna.Study", number: int) -> Point:
        from optuna.samplers import TPESampler

        rounds.sampler = TPESampler(seed=_seed(self.seed, number), n_startup_trials=ROUND)
        if number < len(self.starts):
            rounds.enqueue_trial(self.starts[number])
        return rounds.ask(self.distributions).params


def _seed(seed: int, number: int) -> int:
    return random.Random(f"{seed} {number}").getrandbits(32)  # noqa: S311 - a seeded choice, no secret


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(dimension, Range):
        return CategoricalDistribution(dimension)
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _in_memory() -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # progress is ours to show
    return optuna.create_study(direction="maximize")


def _open(file: Path | None, identity: Mapping[str, str]) -> "optuna.Study":
    """The study in a file, which is made if there is none; without a file, one in memory."""
    if file is None:
        return _in_memory()
    begun = _is_journal(file)
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))
    if not begun:
        optuna.create_study(storage=storage, study_name=NAME, direction="maximize")
    try:
        study = optuna.load_study(storage=storage, study_name=NAME)
    except KeyError:
        raise _no_study(file) from None
    if IDENTITY not in study.user_attrs and not study.trials:
        study.set_user_attr(IDENTITY, dict(identity))
    _require_identity(file, study.user_attrs.get(IDENTITY, {}), identity)
    return study


def _require_identity(file: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    parts = [part for part in wanted if stored.get(part) != wanted[part]]
    if parts or set(stored) - set(wanted):
        raise InputError(
            f"{file}: this study was made with another {' and another '.join(parts) or 'version'}; "
            "give the study of this search, or a file that does not exist yet"
        )


def _is_journal(file: Path) -> bool:
    """Whether a study was begun in the file; a last line that was cut while it was written is taken off.

    InputError for a file that holds something else.
    """
    require_folder(file)
    if not file.exists():
        return False
    if not file.is_file():
        raise _no_study(file)
    *lines, torn = file.read_bytes().split(b"\n")
    if not all(_is_entry(line) for line in lines) or (torn and not lines):
        raise _no_study(file)
    if torn:
        with file.open("rb+") as journal:
            journal.truncate(sum(len(line) + 1 for line in lines))
    return bool(lines)


def _is_entry(line: bytes) -> bool:
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _no_study(file: Path) -> InputError:
    return InputError(f"{file}: this is no stored study; give the file of one, or one that does not exist yet")
