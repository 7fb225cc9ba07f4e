"""AttentionSpec: which devices hold the KV cache of a pool and compute its attention, and how they are reached.

    4xh20                             four H20 beside the devices of the pool, two batches in rotation
    4xh20/batches=3/link=25e9         three batches on two model replicas, over 25 GB/s
    1xinstcsd/batches=1               one computational storage drive
    1xinstcsd/batches=1/at=home       the control: KV lies there, attention is computed on the devices of the pool

Knows words and numbers; must not know devices.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError

NETWORK_BYTES_PER_S = 45.7e9
"""Of the model devices of an instance, each way. Source: Lamina (arXiv:2405.01814v2): 91.4 % of 400 Gb/s RoCE without
the host on the path; 35.5e9 with NCCL."""
NETWORK_TRIP_S = 33.0e-6
"""There and back. Source: as above; 66.6e-6 with NCCL."""
_SHORT = {"link": "link_bytes_per_s", "trip": "trip_s", "rate": "bytes_per_s", "delta": "accuracy_delta"}
_HINT = "Write it like 4xh20, 2xh20/batches=3/link=25e9, or 1xinstcsd/batches=1."


class AttentionSpec(Config, kw_only=True):
    """Devices for attention of one instance. A model replica is the devices of the pool's tensor parallel group."""

    device: str
    """A device or a drive of the catalogue."""
    count: int
    batches: int = 2
    """In rotation, on one model replica fewer; 1 is one batch on one replica, without overlap."""
    early: bool = True
    """q goes first, and attention over the old keys begins before the new key and value are there."""
    at: Literal["there", "home"] = "there"
    """Where attention is computed. `home`: on the model devices; KV crosses the link for every token."""
    link_bytes_per_s: float | None = None
    """Between the model devices of an instance and all of these, each way; None: see NETWORK_BYTES_PER_S, or what the
    drives have."""
    trip_s: float | None = None
    """There and back, without bytes; None: see NETWORK_TRIP_S, or what the drive has."""
    bytes_per_s: float | None = None
    """Reached by one device reading KV, in place of the catalogue's: a declared assumption."""
    keep: int = 1
    """SparF keeps 1 / keep of the channels of a query and of the tokens. Above 1 answers change."""
    run: int = 1
    """Tokens that are kept come in runs of so many neighbours; 1: at random, which touches the most pages."""
    accuracy_delta: float | None = None
    """Measured change of accuracy by `keep`, as a share (-0.01). Without one `keep` is refused."""
    unmeasured: bool = False
    """Take `keep` although nobody measured what it costs."""

    def __post_init__(self) -> None:
        for name, low, high in (("count", 1, 1024), ("batches", 1, 16), ("keep", 1, 64), ("run", 1, 4096)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} of {getattr(self, name)} for attention cannot be.", f"Give {low} to {high}.")
        for name in ("link_bytes_per_s", "bytes_per_s"):
            value = getattr(self, name)
            if value is not None and not 1e6 <= value <= 1e15:
                raise ConfigError(f"{name} of {value:g} for attention cannot be.", "Give 1e6 to 1e15.")
        if self.trip_s is not None and not 0.0 <= self.trip_s <= 1.0:
            raise ConfigError(f"A round trip of {self.trip_s:g} s cannot be.", "Give 0 to 1.")
        if self.at == "home" and self.keep > 1:
            raise ConfigError("keep is what a drive does; with at=home it computes nothing.", "Leave one of them out.")

    @property
    def replicas(self) -> int:
        """Copies of the weights, each on a tensor parallel group."""
        return max(1, self.batches - 1)

    def check_quality(self) -> None:
        """Raise ConfigError where answers change and nobody measured by how much."""
        if self.keep > 1 and self.accuracy_delta is None and not self.unmeasured:
            raise ConfigError(
                f"keep={self.keep} reads a part of the KV cache only, so answers change, and no accuracy was measured.",
                "Give what you measured (delta=-0.01), or say unmeasured=true to go on without.",
            )


def parse_attention(text: str) -> AttentionSpec:
    """An AttentionSpec from one of the forms above. Raises ConfigError."""
    first, *options = text.split("/")
    match = re.fullmatch(r"(\d+)x([\w.-]+)", first)
    if match is None:
        raise ConfigError(f"{first!r} in {text!r} are no devices for attention.", _HINT)
    table: dict[str, Any] = {"count": int(match[1]), "device": match[2]}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option!r} in {text!r} is no option.", _HINT)
        table[_SHORT.get(key, key)] = _value(value)
    return convert(table, AttentionSpec, f"attention {text!r}")


def _value(text: str) -> int | float | bool | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "on": True, "false": False, "off": False}.get(text, text)
