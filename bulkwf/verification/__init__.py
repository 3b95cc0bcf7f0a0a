"""Whether the instances that a checkpoint calls created or existed are really there."""

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
