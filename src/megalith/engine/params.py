"""SamplingParams: how one request wants its tokens chosen and when it wants to stop. Data only."""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config
from megalith.base.errors import RequestError

MAX_LOGPROBS = 20
GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]


class Grammar(Config):
    """A constraint on the text. `definition` is the JSON schema (as JSON text), regular expression or Lark grammar."""

    kind: GrammarKind
    definition: str = ""


class SamplingParams(Config):
    """Sampling of one request; the defaults are OpenAI's, except that `max_tokens` None means up to the context limit.

    Order of operations on the float32 logits of a row: logit bias, repetition penalty (over prompt and output, as in
    CTRL, arXiv:1909.05858), presence and frequency penalties (over the output), grammar mask, temperature, top-k,
    top-p, min-p, then one draw. Temperature 0 is greedy: the arg-max after penalties and mask, lowest id on a tie.
    Log probabilities are of the raw logits (before all of that).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: the engine picks one. The same seed gives the same tokens whatever the batch."""
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. 0: of the chosen token. n: also the n most likely, at most MAX_LOGPROBS."""
    prompt_logprobs: bool = False
    """Log probability of every prompt token but the first (for `echo`)."""
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Check ranges. Raises RequestError naming the parameter."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (off) or a positive count"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            ("logit_bias", all(-100.0 <= v <= 100.0 for v in self.logit_bias.values()), "within -100 and 100"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 non-empty strings"),
        )
        for name, good, rule in checks:
            if not good:
                raise RequestError(f"{name} is {getattr(self, name)!r} but must be {rule}.", param=name)
