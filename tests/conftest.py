"""What every test shares: property tests draw the same examples on every run.

A run that is green here is green in continuous integration. To look for new counterexamples, ask for random draws:
`HYPOTHESIS_PROFILE=search pytest tests/policy` (slow, worth an hour now and then); a find becomes an `@example`.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeat", derandomize=True)
settings.register_profile("search", derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
