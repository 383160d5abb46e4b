"""A team: alone it does nothing; where one of several fails, the others end without a word.

That several processes do understand one another is tested in tests/test_accelerate.py.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from austeer.compiler.errors import CheckFailed, UsageError
from austeer.compiler.team import Team, gather_team


@dataclass(frozen=True)
class One(Team):
    """One of several processes. `told` is what was broadcast, `hears` what the first process broadcasts."""

    hears: list[Any] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)

    def _broadcast(self, value: Any) -> Any:
        self.told.append(value)
        return value if self.leads else self.hears.pop(0)


def fail() -> Any:
    raise UsageError("cannot be")


def test_a_process_alone_is_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = gather_team("spread")
    assert team == Team(rank=0, size=1, device="")
    assert team.leads
    assert team.share(lambda: None) is None
    assert team.share(lambda: [3]) == [3]
    assert team.total(0.1) == 0.1
    tensor = torch.ones(2)
    team.add(tensor)
    assert tensor.tolist() == [1, 1]
    with pytest.raises(UsageError, match="cannot be"):
        team.share(fail)


def test_the_first_process_tells_what_it_made() -> None:
    team = One(0, 2)
    assert team.share(lambda: "made") == "made"
    assert team.told == [True, "made"]


def test_the_others_take_what_it_made_and_make_nothing() -> None:
    team = One(1, 2, hears=[True, "made"])
    assert team.share(fail) == "made"


def test_where_the_first_process_fails_it_tells_and_raises() -> None:
    team = One(0, 2)
    with pytest.raises(UsageError, match="cannot be"):
        team.share(fail)
    assert team.told == [False]


def test_where_the_first_process_fails_the_others_end_well() -> None:
    done: list[int] = []
    with pytest.raises(SystemExit) as ended, One(1, 2, hears=[False]).first():
        done.append(1)
    assert (ended.value.code, done) == (None, [])


def test_an_error_of_another_process_is_its_own() -> None:
    with pytest.raises(UsageError, match="cannot be"), One(1, 2, hears=[True]).first():
        fail()


def test_an_error_that_all_have_met_is_raised_by_one() -> None:
    with pytest.raises(CheckFailed, match="nan"):
        Team(0, 2).stop(CheckFailed("nan"))
    with pytest.raises(SystemExit) as ended:
        Team(1, 2).stop(CheckFailed("nan"))
    assert ended.value.code is None
