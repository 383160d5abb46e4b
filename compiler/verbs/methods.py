"""The methods by which steer finds edits, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from austeer.compiler.edits import Edit, Rank1, Scale, Shift
from austeer.compiler.errors import UsageError
from austeer.compiler.facts import ModelFacts
from austeer.compiler.sites import SITES, SPACE, SiteName
from austeer.compiler.tokens import PairTokens
from austeer.passes.components import Ranking
from austeer.passes.localize import localize
from austeer.passes.steer2edit import WRITES, steer2edit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """What is ranked, at which of its sites (the default ones where none is named), and what edits it.

    Several sites are ranked and edited `together`, or each for itself, and the search chooses one of them. `rank`
    takes a model, pairs, the sites of one ranking and the tokens of a batch; `count` says how many components a site
    has in one layer; `probe` is an edit that does nothing, for asking whether a place can be edited. Without a `rank`
    it edits every layer (Fusion Steering): by how much in which segment is all that is searched.
    """

    name: str
    components: str
    sites: tuple[SiteName, ...]
    default: tuple[SiteName, ...]
    together: bool
    rank: "Callable[[PreTrainedModel, Sequence[PairTokens], Sequence[SiteName], int], Ranking] | None"
    count: Callable[[ModelFacts, SiteName], int]
    probe: Callable[[int, SiteName], Edit]


_METHODS = (
    Method(
        name="austeer",
        components="units",
        sites=SITES,
        default=("ffn",),
        together=False,
        rank=lambda model, pairs, sites, tokens: localize(model, pairs, sites[0], batch_tokens=tokens),
        count=lambda facts, site: facts.geometry.width(SPACE[site]),
        probe=lambda layer, site: Scale(layer, site, (0,), (0.0,)),
    ),
    Method(
        name="steer2edit",
        components="heads and neurons",
        sites=tuple(WRITES),
        default=tuple(WRITES),
        together=True,
        rank=lambda model, pairs, sites, tokens: steer2edit(model, pairs, sites, batch_tokens=tokens),
        count=lambda facts, site: facts.geometry.width(SPACE[site]) // (facts.head_dim if site == "heads" else 1),
        probe=lambda layer, site: Rank1(layer, site, (), (), 0.0),
    ),
    Method(
        name="fusion",
        components="layers",
        sites=("residual",),
        default=("residual",),
        together=True,
        rank=None,
        count=lambda _facts, _site: 1,
        probe=lambda layer, site: Shift(layer, site, ()),
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _METHODS}


def method_named(name: str) -> Method:
    """The method called `name`; UsageError for any other word."""
    if name in METHODS:
        return METHODS[name]
    raise UsageError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
