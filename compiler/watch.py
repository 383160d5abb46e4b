"""Seeing a live model's activations as they pass, without keeping or changing them."""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from austeer.compiler.hooked import first_of
from austeer.compiler.live import Port, live_facts, port
from austeer.compiler.sites import SiteName

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

See: TypeAlias = "Callable[[Tensor], None]"


def ports(model: "PreTrainedModel", site: SiteName) -> tuple[dict[int, Port], tuple[str, ...]]:
    """(where the activation of `site` passes in each layer that has the site, a note on layers that have not)."""
    facts = live_facts(model)
    layers = range(facts.geometry.layers)
    without = [layer for layer in layers if site == "neurons" and facts.has_experts(layer)]
    note = f"layers {', '.join(map(str, without))} are mixtures of experts without a `neurons` site: left out"
    return {layer: port(model, facts, layer, site) for layer in layers if layer not in without}, (note,) * bool(without)


@contextmanager
def watching(watched: Iterable[tuple[Port, See]]) -> Generator[None]:
    """Within the context, each function is shown every activation that passes its port."""
    with ExitStack() as hooks:
        for place, see in watched:
            hooks.callback(seeing(place, see).remove)
        yield


def seeing(place: Port, see: See) -> Any:
    """The hook that shows a function every activation that passes a port."""
    if place.side == "input":
        return place.module.register_forward_pre_hook(lambda _, args: see(args[0]))

    return place.module.register_forward_hook(lambda _, __, output: see(first_of(output)))
