"""Time and chance, as arguments."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["UNKNOWN_BOOT", "Boot", "Clock"]


class Boot(NamedTuple):
    """One boot of one machine, and how a file counts its time.

    The system's clock can be set at any moment, the boot clock can't. So all times that one boot writes into a file are
    counted on the boot clock: they keep their distance to each other, whatever the system's clock is set to.

    Attributes:
        id: Names the boot. Empty where the system has no name for it: there, times are those of the system's clock.
        at: Unix time at which the boot clock was zero, by the system's clock when this boot first wrote to the file.
    """

    id: str
    at: float

    def shift_s(self, other: "Boot") -> float:
        """What to add to a time that a file counts by *other*, to have it as this one counts; 0 between two boots."""
        return self.at - other.at if self.id and self.id == other.id else 0.0

    def going_on(self, stored: "Boot") -> "Boot":
        """How this boot counts time in a file that *stored* has written last: on as it did, or anew."""
        return stored if self.id and self.id == stored.id else self


UNKNOWN_BOOT = Boot("", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Time and chance, as arguments.

    Attributes:
        now: Monotonic seconds; the event loop's timers must follow it.
        wall: Unix time in seconds: the system's, or counted on the boot clock (see `counted_by`).
        sleep: Sleep so many seconds of `now`.
        random: A random number from 0 to 1.
        boot_id: Names this boot; empty where the system has no name for it.
        uptime: Seconds since the boot, suspended ones included; never set. Only where there is a `boot_id`.
        system: The system's Unix time where `wall` is counted on the boot clock; else None.
        shared: `now` is the clock of the process: runs that use it share their limits.
    """

    now: Callable[[], float]
    wall: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    random: Callable[[], float]
    boot_id: str = ""
    uptime: Callable[[], float] = lambda: 0.0
    system: Callable[[], float] | None = None
    shared: bool = False

    def boot(self) -> Boot:
        """This boot, by what `wall` says now."""
        return Boot(self.boot_id, self.wall() - self.uptime()) if self.boot_id else UNKNOWN_BOOT

    def counted_by(self, boot: Boot) -> "Clock":
        """This clock, its `wall` as a file counts the times of *boot*, which must be this one or unknown."""
        if not boot.id:
            return self
        return replace(self, wall=lambda: boot.at + self.uptime(), system=self.wall)

    def latest(self) -> float:
        """The later of the two Unix times, for what must not look younger than it is.

        The boot clock of a virtual machine stands still while the machine is frozen.
        """
        return self.wall() if self.system is None else max(self.wall(), self.system())
