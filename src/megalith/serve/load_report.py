"""From the records of a load run to its figures: latency percentiles, throughput, goodput, and what to distrust.

All figures are measured at the client. Pure arithmetic: no clock, no network, no terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S, format_duration, parse_duration_ns
from megalith.report.percentiles import Summary, summarize
from megalith.serve.load_run import RequestRecord

# An open-loop client that is this late at its 99th percentile measures itself.
_LATE_NS = 20_000_000


class Slo(msgspec.Struct, frozen=True):
    """Limits that one request must keep to count as good; None: no limit. `itl_ns` holds for its every gap."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None
    itl_ns: int | None = None
    e2e_ns: int | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """Whether a request was answered in full and within every limit; an answer without any text is not good."""
        if record.outcome != "ok" or record.ttft_ns is None:
            return False
        figures = (
            (self.ttft_ns, record.ttft_ns),
            (self.tpot_ns, record.tpot_ns),
            (self.itl_ns, max(record.itl_ns, default=None)),
            (self.e2e_ns, record.e2e_ns),
        )
        return all(limit is None or figure is None or figure <= limit for limit, figure in figures)


def parse_slo(text: str) -> Slo:
    """`ttft=200ms,tpot=50ms` (also itl, e2e). Raises ConfigError."""
    limits: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot", "itl", "e2e") or not value:
            raise ConfigError(f"{part!r} is no service level.", "Write ttft=200ms,tpot=50ms (also itl, e2e).")
        limits[f"{name}_ns"] = parse_duration_ns(value)
    return Slo(**limits)


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run. Latencies are of the requests that ended well; rates are over `duration_ns`.

    `duration_ns` runs from the start of the run (the first request is due at or after it) to the last response.
    """

    issued: int
    ok: int
    refused: int
    """Answered 429."""
    errors: int
    timeouts: int
    cancelled: int
    error_kinds: dict[str, int]
    duration_ns: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    ttft_ns: Summary | None
    itl_ns: Summary | None
    tpot_ns: Summary | None
    e2e_ns: Summary | None
    lateness_ns: Summary | None
    """Open loop: how long after it was due a request was sent."""
    request_rate: float
    """Requests that ended well, a second."""
    output_rate: float
    """Output tokens a second."""
    total_rate: float
    """Prompt and output tokens a second."""
    mean_in_flight: float
    slo: Slo | None
    good: int | None
    goodput: float | None
    """Requests within the service level, a second."""
    good_share: float | None
    """Of all issued."""
    pieces: int
    warnings: list[str]


def build_report(records: Sequence[RequestRecord], issued: int, slo: Slo | None) -> LoadReport:
    """The figures of `records`; `issued` may be larger when a run was cut off."""
    done = [record for record in records if record.outcome == "ok"]
    outcomes = Counter(record.outcome for record in records)
    duration_ns = max((record.end_ns for record in records), default=0)
    seconds = max(duration_ns, 1) / NS_PER_S
    outputs = sum(record.output_tokens for record in done)
    inputs = sum(record.input_tokens for record in done)
    good = None if slo is None else sum(slo.met_by(record) for record in records)
    lateness = summarize(record.sent_ns - record.due_ns for record in records)
    return LoadReport(
        issued=issued,
        ok=len(done),
        refused=outcomes["refused"],
        errors=outcomes["error"],
        timeouts=outcomes["timeout"],
        cancelled=outcomes["cancelled"] + max(0, issued - len(records)),
        error_kinds=dict(Counter(r.error for r in records if r.outcome in ("error", "refused")).most_common(5)),
        duration_ns=duration_ns,
        input_tokens=inputs,
        output_tokens=outputs,
        cached_tokens=sum(record.cached_tokens for record in done),
        ttft_ns=summarize(record.ttft_ns for record in done if record.ttft_ns is not None),
        itl_ns=summarize(gap for record in done for gap in record.itl_ns),
        tpot_ns=summarize(record.tpot_ns for record in done if record.tpot_ns is not None),
        e2e_ns=summarize(record.e2e_ns for record in done),
        lateness_ns=lateness,
        request_rate=len(done) / seconds,
        output_rate=outputs / seconds,
        total_rate=(inputs + outputs) / seconds,
        mean_in_flight=sum(record.end_ns - record.sent_ns for record in records) / max(duration_ns, 1),
        slo=slo,
        good=good,
        goodput=None if good is None else good / seconds,
        good_share=None if good is None or not issued else good / issued,
        pieces=sum(record.pieces for record in done),
        warnings=_warnings(done, lateness),
    )


def _warnings(done: Sequence[RequestRecord], lateness: Summary | None) -> list[str]:
    """What a reader of the figures must know, most serious first."""
    warnings = []
    if lateness is not None and lateness.p99 > _LATE_NS:
        warnings.append(
            f"The client sent its requests late (p99 {format_duration(lateness.p99)} after they were due): "
            "it, or the machine it shares with the server, was too busy. The latencies include that."
        )
    if not done:
        return warnings
    silent = sum(not record.usage_reported for record in done)
    if silent:
        warnings.append(f"{silent} of {len(done)} answers had no usage; their tokens are counted as pieces of text.")
    told = [record for record in done if record.usage_reported]
    impossible = sum(record.pieces > record.output_tokens for record in told)
    if impossible:
        warnings.append(
            f"{impossible} of {len(told)} answers came in more pieces than the tokens that the server reports: "
            "do not trust its usage."
        )
    pieces, tokens = sum(r.pieces for r in told), sum(r.output_tokens for r in told)
    if pieces < 0.98 * tokens:
        warnings.append(
            f"{tokens:,} tokens came in {pieces:,} pieces of text: an inter-token latency here is between pieces "
            "(several tokens sent together, or tokens without text of their own)."
        )
    short = sum(record.output_tokens < record.wanted_tokens for record in done)
    if short:
        warnings.append(f"{short} of {len(done)} answers are shorter than asked (the server may not know ignore_eos).")
    return warnings
