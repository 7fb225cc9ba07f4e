"""Weights that do not stay: a request turned into one whose weights stream from disk, and what that needs at least.

Knows bytes and pieces; rates are in cost.streaming. Must not know runners.
"""

from __future__ import annotations

import msgspec

from megalith.cost.memory import RESIDENCY
from megalith.cost.streaming import piece_bytes
from megalith.plan.request import ServeRequest, need_bytes
from megalith.policy.weight_window import lay_out, least_bytes, piece_limit
from megalith.tier.memory import HUGE_PAGE_BYTES

BATCHES = (1, 4, 16, 64)
"""Of which a plan of this kind speaks: a step reads the same bytes for all of them."""


def can_stream(request: ServeRequest) -> bool:
    """Whether there is a runner that streams these weights: the native one, for one device and no experts."""
    return request.profile.kind == "native" and request.devices == 1 and not request.spec.num_experts


def least_window(request: ServeRequest) -> ServeRequest:
    """The request with the smallest window."""
    sizes, _ = piece_bytes(request.weights, piece_limit(request.weights.total))
    return msgspec.structs.replace(request, window_bytes=least_bytes(sizes, HUGE_PAGE_BYTES))


def streaming(request: ServeRequest) -> ServeRequest | None:
    """The request with all that its limit leaves for weights as a window, or None where not even the smallest fits."""
    if not can_stream(request):
        return None
    sizes, head = piece_bytes(request.weights, piece_limit(request.weights.total))
    empty = msgspec.structs.replace(request, window_bytes=0)
    margin = 1 + RESIDENCY[request.profile.kind].margin
    left = int((request.limit_bytes - need_bytes(empty, empty.wanted_blocks())[1]) / margin) - HUGE_PAGE_BYTES
    if left < least_bytes(sizes, HUGE_PAGE_BYTES):
        return None
    layout = lay_out(sizes, head, left, HUGE_PAGE_BYTES)
    streamed = sum(sizes[piece] for piece in layout.streamed)
    return msgspec.structs.replace(empty, window_bytes=left if streamed else layout.num_bytes, stream_bytes=streamed)
