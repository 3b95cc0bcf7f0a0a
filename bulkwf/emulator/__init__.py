"""The service on this machine: its rules, its limits, and the faults that a script asks for.

`answers`, `limits`, `batch`, `admission`, `state` and `faults` are pure; `server` puts them on a socket, and `log`
keeps what was really created. Nothing here is shared with the client, so that the two do not share mistakes.
"""

from bulkwf.emulator.admission import Caller, Target
from bulkwf.emulator.answers import Answer
from bulkwf.emulator.batch import params_crc
from bulkwf.emulator.faults import FaultScriptError, Rule, parse_script
from bulkwf.emulator.limits import Limits
from bulkwf.emulator.log import Created, read_log
from bulkwf.emulator.server import Emulator, emulate, serve
from bulkwf.emulator.state import Service, Tampering

__all__ = [
    "Answer",
    "Caller",
    "Created",
    "Emulator",
    "FaultScriptError",
    "Limits",
    "Rule",
    "Service",
    "Tampering",
    "Target",
    "emulate",
    "params_crc",
    "parse_script",
    "read_log",
    "serve",
]
