"""Verifies that the service holds the instances which a checkpoint calls created or existed."""

from bulkwf.verification.opening import open_verification
from bulkwf.verification.report import VerificationReport, Verified
from bulkwf.verification.request_log import read_past
from bulkwf.verification.scope import Scope
from bulkwf.verification.store import VerificationStore
from bulkwf.verification.verify import Verification

__all__ = [
    "Scope",
    "Verification",
    "VerificationReport",
    "VerificationStore",
    "Verified",
    "open_verification",
    "read_past",
]
