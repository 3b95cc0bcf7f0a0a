"""Virtual time, and what the engine works with in tests: replies, transports, deliveries, and runs that have ended."""

from fakes.deliveries import RUN_TARGET, UNLIMITED, Desk, count, lines, make_batch, outcomes
from fakes.replies import absent, created, envelope, error, fault, found, reply
from fakes.runs import HEADER, memory_folder, reseal, write_run
from fakes.transports import TARGET, Leave, ScriptedTransport, Sent, ServiceTransport, call, ids_of, received, service
from fakes.virtual_time import EPOCH, DeadlockError, Machine, VirtualLoop, clock, now, run_virtual, wall, windows

__all__ = [
    "EPOCH",
    "HEADER",
    "RUN_TARGET",
    "TARGET",
    "UNLIMITED",
    "DeadlockError",
    "Desk",
    "Leave",
    "Machine",
    "ScriptedTransport",
    "Sent",
    "ServiceTransport",
    "VirtualLoop",
    "absent",
    "call",
    "clock",
    "count",
    "created",
    "envelope",
    "error",
    "fault",
    "found",
    "ids_of",
    "lines",
    "make_batch",
    "memory_folder",
    "now",
    "outcomes",
    "received",
    "reply",
    "reseal",
    "run_virtual",
    "service",
    "wall",
    "windows",
    "write_run",
]
