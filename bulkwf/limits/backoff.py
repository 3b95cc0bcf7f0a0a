"""The wait before a retry. Pure."""

from bulkwf.options import RetryPolicy

__all__ = ["backoff_s"]


def backoff_s(policy: RetryPolicy, streak: int, random: float) -> float:
    """Full jitter: *random* (0 to 1) times `base_s` · 2ⁿ, at most `max_wait_s`; n is *streak* - 1."""
    return random * min(policy.max_wait_s, policy.base_s * 2.0 ** min(streak - 1, 60))
