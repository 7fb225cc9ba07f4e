"""How long a batch has the model devices, the link and the attention devices in one layer, by bytes and rates.

    down, up  a layer and request: q + k + v, o: (2 + 2 / G) * e * d bytes, whatever the context
    attend    KV bytes of the batch / (devices * bytes/s), or its multiply-adds where they take longer
    model     all of a step of the CostModel but attention, cut into q | k, v | output and FFN by their weights

G: queries of a KV head, e: bytes of a value, d: width. KV is cut by heads over the devices; where there are more
devices than KV heads, by requests. Knows rates and shapes; must not know schedules.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost import parameters as counting
from megalith.cost.attention_elsewhere import SliceTimes
from megalith.cost.compute import CostModel, StepShape
from megalith.cost.memory import RESIDENCY
from megalith.cost.profile import from_device
from megalith.cost.timer import PS_PER_NS
from megalith.cost.timer_phases import memory_slowdown
from megalith.specs import catalog
from megalith.specs.attention import NETWORK_BYTES_PER_S, NETWORK_TRIP_S, AttentionSpec
from megalith.specs.drives import drives
from megalith.specs.model import ModelSpec

VALUE_BYTES = 2
"""Of q, k, v and o on the link: bf16."""
KERNELS = 6
"""Of a layer in `Rates.op_ns` (profile.from_device): q, k and v; attention; output; three of the FFN."""


class AttentionDevices(NamedTuple):
    """The attention side of one instance."""

    spec: AttentionSpec
    memory_bytes: int
    """Of one device, less what its runner takes."""
    kv_byte_ns: float
    """One device reading one byte."""
    pair_mac_ns: float
    """One multiply-add of attention on one device."""
    op_ns: float
    link_bytes_per_s: float
    """Each way."""
    trip_ns: float
    page_bytes: int
    """0 where single rows can be read."""
    price_per_hour_usd: float | None
    """Of one."""
    idle_w: float
    busy_w: float
    """While it reads at its full rate."""
    source: str

    @property
    def label(self) -> str:
        """In words, for reports."""
        where = "attention on" if self.spec.at == "there" else "KV on"
        link = f"{self.link_bytes_per_s / 1e9:.3g} GB/s, {self.trip_ns / 1e3:.3g} us there and back"
        kept = f", SparF 1/{self.spec.keep}, which changes answers" if self.spec.keep > 1 else ""
        return f"{where} {self.spec.count}x{self.spec.device} over {link}, {self.spec.batches} batches{kept}"


def attention_devices(spec: AttentionSpec) -> AttentionDevices:
    """The devices of a spec by the catalogue. Raises ConfigError with the nearest names, or for what cannot compute."""
    drive = drives().get(spec.device)
    if drive is not None:
        if spec.at == "there" and not drive.computes:
            raise ConfigError(
                f"{spec.device} computes nothing, so attention cannot run on it.",
                "Say at=home, or take one that does: " + ", ".join(n for n, one in drives().items() if one.computes),
            )
        rate = spec.bytes_per_s or drive.bytes_per_s
        pair = 2.0 * NS_PER_S / drive.flops_per_s if drive.flops_per_s else 0.0
        link = spec.link_bytes_per_s or min(drive.link_bytes_per_s, rate) * spec.count
        trip = drive.trip_s if spec.trip_s is None else spec.trip_s
        return AttentionDevices(
            spec, drive.memory_bytes, NS_PER_S / rate, pair, 0.0, link, trip * NS_PER_S, drive.page_bytes,
            drive.price_per_hour_usd, drive.idle_w, drive.tdp_w, drive.source,
        )  # fmt: skip
    if catalog.find_device(spec.device) is None:
        near = catalog.nearest(spec.device, catalog.index_names(catalog.devices()))
        raise ConfigError(
            f"There is no device or drive {spec.device!r} for attention.",
            f"Devices: {', '.join(near) or ', '.join(catalog.devices())}; drives: {', '.join(drives())}.",
        )
    profile = from_device(catalog.device(spec.device))
    byte_ns = NS_PER_S / spec.bytes_per_s if spec.bytes_per_s else profile.rates.kv_byte_ns
    power = profile.power
    idle, peak = (0.0, 0.0) if power is None else (power.idle_w, power.peak_w)
    busy = idle + (peak - idle) * (power.memory_share if power is not None else 0.0)
    link = spec.link_bytes_per_s or NETWORK_BYTES_PER_S
    trip = NETWORK_TRIP_S if spec.trip_s is None else spec.trip_s
    return AttentionDevices(
        spec, profile.memory_bytes - RESIDENCY[profile.kind].base_bytes, byte_ns, profile.rates.pair_mac_ns,
        profile.rates.op_ns / KERNELS, link, trip * NS_PER_S, 0, profile.price_per_hour_usd, idle, busy, profile.source,
    )  # fmt: skip


def at_lower_clock(devices: AttentionDevices, fraction: float) -> AttentionDevices:
    """The same at a fraction of the clock; drives have none to lower."""
    if devices.page_bytes or fraction == 1.0:
        return devices
    return devices._replace(
        kv_byte_ns=devices.kv_byte_ns * memory_slowdown(fraction), pair_mac_ns=devices.pair_mac_ns / fraction
    )


def down_bytes(spec: ModelSpec) -> tuple[int, int]:
    """(q, k and v) of one request and layer."""
    width = VALUE_BYTES * spec.head_dim
    return width * spec.num_heads, 2 * width * spec.num_kv_heads


def crossing_bytes(spec: ModelSpec) -> int:
    """All that crosses the link for a token of a request: (2 + 2 / G) * e * d in every layer."""
    query, pair = down_bytes(spec)
    return spec.num_layers * (2 * query + pair)


def kept_share(devices: AttentionDevices, spec: ModelSpec) -> float:
    """Of the KV bytes, what SparF reads: columns of K that match the largest parts of q, then pages of K and V rows.

    Columns lie one after the other (K is stored a second time by channel). Rows are read by the page: of a page with
    n runs of neighbours 1 - (1 - 1 / keep)^n is touched where runs are chosen at random.
    """
    keep = devices.spec.keep
    if keep == 1:
        return 1.0
    rows = max(1.0, devices.page_bytes / (VALUE_BYTES * spec.head_dim))
    runs = max(1.0, rows / devices.spec.run)
    return 0.5 / keep + 1.0 - math.pow(1.0 - 1.0 / keep, runs)


def held_share(devices: AttentionDevices) -> float:
    """Bytes that a token takes there, over its KV bytes: with SparF K lies there twice."""
    return 1.5 if devices.spec.keep > 1 else 1.0


def largest_share(spec: ModelSpec, rows: int, count: int) -> float:
    """Of a batch's KV, what the busiest of `count` devices reads: by head, or by request where heads are too few."""
    if count <= spec.num_kv_heads:
        return -(-spec.num_kv_heads // count) / spec.num_kv_heads
    return -(-rows // count) / rows


def slice_times(cost: CostModel, devices: AttentionDevices, rows: int, mean_context: int, factor: float) -> SliceTimes:
    """Durations of a batch of `rows` requests with so many tokens behind each of them, in the mean."""
    spec, chosen = cost.spec, devices.spec
    layers, ops = spec.num_layers, cost.profile.rates.op_ns
    without = cost.step(StepShape(rows, 0, rows, 0, 0, 0)).duration_ns
    rates = cost.profile.rates
    host_ns = rates.step_ns + rows * rates.sequence_ns
    layer_ns = (without - host_ns) / layers - ops
    head_ns = cost.step(StepShape(rows, rows, rows, 0, 0, 0)).duration_ns - without
    weights = counting.layer_macs(spec) / layers
    width = spec.hidden * spec.head_dim
    query, pair = width * spec.num_heads / weights, 2 * width * spec.num_kv_heads / weights
    kernel = ops / KERNELS
    early = chosen.early and chosen.at == "there"
    keys = rows * counting.seen_tokens(spec, mean_context + 1) / layers
    query_bytes, pair_bytes = down_bytes(spec)
    link_ns = NS_PER_S / devices.link_bytes_per_s
    kv_bytes = keys * cost.kv_layer_token_bytes
    if chosen.at == "home":
        reading = kv_bytes * devices.kv_byte_ns / chosen.count
        up_ns = max(kv_bytes * link_ns, reading)
        share = max(1, -(-spec.num_kv_heads // cost.devices)) / spec.num_kv_heads
        attend_ns = kernel + kv_bytes * rates.kv_byte_ns * share
    else:
        share = largest_share(spec, rows, chosen.count)
        up_ns = rows * query_bytes * link_ns
        macs = keys * cost.pair_macs * devices.pair_mac_ns
        attend_ns = devices.op_ns + share * max(
            kv_bytes * devices.kv_byte_ns * kept_share(devices, spec), macs * kept_share(devices, spec)
        )
    carry_ns = rows * spec.hidden * VALUE_BYTES * link_ns if chosen.replicas > 1 else 0.0
    nanoseconds = {
        "query_ps": layer_ns * query + kernel, "pair_ps": layer_ns * pair + kernel * early,
        "output_ps": layer_ns * (1.0 - query - pair) + kernel * (KERNELS - 2), "attend_ps": attend_ns,
        "merge_ps": devices.op_ns if early else 0.0,
        "down_query_ps": rows * query_bytes * link_ns, "down_pair_ps": rows * pair_bytes * link_ns,
        "up_ps": up_ns, "flight_ps": devices.trip_ns / 2.0, "carry_ps": carry_ns, "head_ps": head_ns,
        "host_ps": host_ns,
    }  # fmt: skip
    return SliceTimes(**{name: math.ceil(value * factor * PS_PER_NS) for name, value in nanoseconds.items()})
