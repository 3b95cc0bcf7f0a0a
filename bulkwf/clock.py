"""Time and random numbers, as arguments."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["UNKNOWN_BOOT", "Boot", "Clock"]


class Boot(NamedTuple):
    """One boot of a machine, and the reference for the times that a file stores during it.

    The system's clock can be set at any moment; the boot clock can't. So each time that is written during one boot is
    `at` plus the boot clock: the differences between these times are right, even if the system's clock is set.

    Attributes:
        id: Id of the boot; empty if the system gives none. Then times are those of the system's clock.
        at: Unix time at which the boot clock was zero, by the system's clock at the boot's first write to the file.
    """

    id: str
    at: float

    def shift_s(self, other: "Boot") -> float:
        """Seconds to add to a time with the reference *other* to convert it to this one; 0 if the boots differ."""
        return self.at - other.at if self.id and self.id == other.id else 0.0

    def going_on(self, stored: "Boot") -> "Boot":
        """The reference for a file whose last reference is *stored*: *stored* if it is of this boot, else this one."""
        return stored if self.id and self.id == stored.id else self


UNKNOWN_BOOT = Boot("", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Time and random numbers, as arguments.

    Attributes:
        now: Returns monotonic seconds. The event loop's timers must use the same clock.
        wall: Returns the Unix time in seconds, by the system's clock or by the boot clock (see `counted_by`).
        sleep: Sleeps for a number of seconds, as `now` counts them.
        random: Returns a random number from 0 to 1.
        boot_id: Id of this boot; empty if the system gives none.
        uptime: Returns the seconds since the boot, including time in suspension. Valid only if there is a `boot_id`.
        system: Returns the Unix time of the system's clock; None if `wall` does that.
        shared: Whether `now` is the clock of the whole process. Runs with such a clock share their limits.
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
        """This boot; its `at` follows from `wall`, which must be the system's clock."""
        return Boot(self.boot_id, self.wall() - self.uptime()) if self.boot_id else UNKNOWN_BOOT

    def counted_by(self, boot: Boot) -> "Clock":
        """This clock, with a `wall` that returns `boot.at` plus `uptime`.

        *boot* must be this boot. If it is unknown, this clock is returned unchanged.
        """
        if not boot.id:
            return self
        return replace(self, wall=lambda: boot.at + self.uptime(), system=self.wall)

    def latest(self) -> float:
        """The later of `wall` and `system`, so that an age computed from it is not too low.

        The boot clock of a virtual machine stands still while the machine is frozen.
        """
        return self.wall() if self.system is None else max(self.wall(), self.system())
