"""Sites of a block, and the space of the vectors that live there."""

from collections.abc import Mapping
from typing import Literal, get_args

from austeer.compiler.errors import UsageError

SiteName = Literal["heads", "attn", "neurons", "ffn", "residual"]
Space = Literal["heads", "neurons", "residual"]

# In data-flow order within a block: edits at different sites apply in this order, whatever a file says.
SITES: tuple[SiteName, ...] = get_args(SiteName)

SPACE: Mapping[SiteName, Space] = {
    "heads": "heads",  # input of the attention output projection: all head outputs, concatenated
    "attn": "residual",  # output of the attention output projection, before any post-norm
    "neurons": "neurons",  # input of the FFN down projection
    "ffn": "residual",  # output of the FFN (MoE: of the whole FFN block), before any post-norm
    "residual": "residual",  # output of the block
}

# What the AUSteer paper and code call two of the sites.
ALIASES: Mapping[str, SiteName] = {"attention": "heads", "layer": "residual"}


def site_named(name: str) -> SiteName:
    """The site called `name`, aliases included; UsageError for any other word."""
    if name in SITES:
        return name
    if name in ALIASES:
        return ALIASES[name]
    raise UsageError(f"unknown site {name!r}: use one of {', '.join(SITES)} (attention = heads, layer = residual)")
