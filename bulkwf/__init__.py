"""Start one Cloudflare Workflow instance for each row of a list: exactly once, under the limits, resumable."""

from bulkwf.api import Results, submit_all, submit_stream
from bulkwf.attempt import Fault, FaultKind, Reply, Request, RequestKind, Slot, Transport
from bulkwf.checkpoint import read_results
from bulkwf.errors import (
    BulkwfError,
    CheckpointError,
    ConfigError,
    InputError,
    ServiceRefused,
    SystemRefused,
    TemporaryStop,
)
from bulkwf.events import Observer
from bulkwf.model import Counts, Instance, Result, Summary
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy
from bulkwf.submission.progress import Progress

__all__ = [
    "BatchLimits",
    "BulkwfError",
    "CheckpointError",
    "ConfigError",
    "Counts",
    "Fault",
    "FaultKind",
    "InputError",
    "Instance",
    "Observer",
    "Options",
    "Progress",
    "RateLimits",
    "Reply",
    "Request",
    "RequestKind",
    "Result",
    "Results",
    "RetryPolicy",
    "ServiceRefused",
    "Slot",
    "Summary",
    "SystemRefused",
    "TemporaryStop",
    "Transport",
    "read_results",
    "submit_all",
    "submit_stream",
]
