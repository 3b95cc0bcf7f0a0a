"""How long all sending pauses after a 429. Pure."""

__all__ = ["pause_s"]


def pause_s(pauses: int, ordered_s: float | None) -> float:
    """Length of a pause of all sending after a 429, in seconds.

    Args:
        pauses: Pauses in a row, this one included.
        ordered_s: What `Retry-After` says, in seconds. It is never shortened. None if there is no such header.
    """
    doubled = 2.0 ** min(pauses - 1, 5)
    if ordered_s is not None:
        return max(ordered_s, doubled)  # repeated `Retry-After: 0` does not allow a request at once
    return min(300.0, 10.0 * doubled)
