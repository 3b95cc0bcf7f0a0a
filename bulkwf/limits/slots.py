"""What a run needs of its limits: a slot for each request, and feedback for each answer."""

from collections.abc import Callable
from typing import Protocol, Self

from bulkwf.attempt import Fault, Judgement, Reply, Slot
from bulkwf.model import RunState

__all__ = ["HeldSlot", "Limiter"]


class HeldSlot(Slot, Protocol):
    """Leave to send one request, held until the request has ended."""

    waited_for: RunState | None
    """What it waited for last; None if it did not wait."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    def unsent(self) -> None:
        """No byte of the request has left."""
        ...


class Limiter(Protocol):
    """Gives one run the slots for its requests to one target."""

    def slot(self, cost: int) -> HeldSlot:
        """A slot for a request that carries *cost* instances; 0 for a look-up. Entered when it is free."""
        ...

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        ...

    @property
    def on_wire(self) -> int:
        """How many requests hold a slot."""
        ...

    @property
    def waits_for(self) -> RunState | None:
        """What the next request waits for; None if it waits for nothing."""
        ...

    @property
    def bound_by(self) -> str:
        """The limit that last made a request wait, in words; empty if none had to wait."""
        ...

    @property
    def paused_until(self) -> float:
        """When the pause ends, in monotonic seconds; in the past if there is none."""
        ...

    @property
    def rate_factor(self) -> float:
        """The fraction of the rate that is used at present: 1.0 if no rate is reduced."""
        ...

    def capacity(self, cost: int, within_s: float = 0.0) -> int:
        """How many requests of *cost* instances could be sent in *within_s* seconds, those that wait included."""
        ...

    def feedback(self, judgement: Judgement, reply: Reply | Fault) -> float | None:
        """Process what an attempt's answer says about the limits. Called before the first await after the answer.

        Returns:
            Seconds until the pause ends that it orders; None if it orders none.
        """
        ...

    def pause(self) -> float:
        """Pause this run as after a 429 that names no time; returns the seconds until the pause ends."""
        ...

    def hold(self, seconds: float) -> float:
        """Pause this run for another reason than the rate; one probe follows. Returns the seconds until it ends."""
        ...

    def change_token(self, fingerprint: str) -> None:
        """Switch the run to another token, which has this *fingerprint*. May be called from any thread."""
        ...

    def stop(self) -> None:
        """End every wait for a slot with `Draining`, now and from now on."""
        ...

    def watch(self, changed: Callable[[], None]) -> None:
        """Call *changed* whenever `waiting` or `capacity` has changed, except by the passing of time."""
        ...

    def close(self) -> None:
        """The run has ended: stop. Its limits no longer hold for other runs."""
        ...
