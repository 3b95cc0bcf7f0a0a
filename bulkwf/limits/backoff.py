"""The wait before a retry. Pure."""

from bulkwf.options import RetryPolicy

__all__ = ["backoff_s"]


def backoff_s(policy: RetryPolicy, streak: int, draw: float) -> float:
    """Full jitter: *draw* times `base_s` · 2ⁿ, where n counts the retries from 0, and at most `max_wait_s`."""
    return draw * min(policy.max_wait_s, policy.base_s * 2.0 ** min(streak - 1, 60))
