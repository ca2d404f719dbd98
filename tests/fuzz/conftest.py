"""How property tests run: many random inputs, and only errors of ours may come out.

They run in a process of their own, without the run-time type checks of the other tests,
so that they see what a user sees: `make fuzz`, or `tests/test_fuzz.py` with --runslow.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")),
    # The test suite tries the same examples each time; `make fuzz` looks for new ones.
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")
