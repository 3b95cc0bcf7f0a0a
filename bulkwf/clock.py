"""Time and random numbers, as arguments."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["UNKNOWN_BOOT", "Boot", "Clock"]


class Boot(NamedTuple):
    """One boot of one machine, and how a file counts its times.

    The system's clock can be set at any moment; the boot clock can't. So all times that one boot writes to a file are
    counted on the boot clock: the differences between them are right, even if the system's clock is set.

    Attributes:
        id: Identifies the boot. Empty if the system does not: then times are those of the system's clock.
        at: Unix time at which the boot clock was zero, by the system's clock when this boot first wrote to the file.
    """

    id: str
    at: float

    def shift_s(self, other: "Boot") -> float:
        """Seconds to add to a time that is counted by *other*, to count it by this one; 0 if they are two boots."""
        return self.at - other.at if self.id and self.id == other.id else 0.0

    def going_on(self, stored: "Boot") -> "Boot":
        """How to count this boot's times in a file that *stored* wrote last: as *stored*, if it is the same boot."""
        return stored if self.id and self.id == stored.id else self


UNKNOWN_BOOT = Boot("", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Time and random numbers, as arguments.

    Attributes:
        now: Monotonic seconds; the event loop's timers must follow it.
        wall: Unix time in seconds: the system's, or counted on the boot clock (see `counted_by`).
        sleep: Sleeps for a number of seconds, as `now` counts them.
        random: Gives a random number from 0 to 1.
        boot_id: Identifies this boot; empty if the system does not.
        uptime: Seconds since the boot, including time in suspension. Valid only if there is a `boot_id`.
        system: The system's Unix time, if `wall` is counted on the boot clock; else None.
        shared: `now` is the clock of the process, so that the runs that use it share their limits.
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
        """This boot, with `wall` as the system's clock."""
        return Boot(self.boot_id, self.wall() - self.uptime()) if self.boot_id else UNKNOWN_BOOT

    def counted_by(self, boot: Boot) -> "Clock":
        """This clock, with `wall` counted by *boot*, which must be this boot or unknown."""
        if not boot.id:
            return self
        return replace(self, wall=lambda: boot.at + self.uptime(), system=self.wall)

    def latest(self) -> float:
        """The later of `wall` and `system`, to compute an age that is not too low.

        The boot clock of a virtual machine stands still while the machine is frozen.
        """
        return self.wall() if self.system is None else max(self.wall(), self.system())
