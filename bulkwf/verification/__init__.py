"""Whether the instances that a checkpoint calls created or existed are really there."""

from bulkwf.verification.store import Findings, Scope, read_past
from bulkwf.verification.verify import Verification, Verified, open_verification

__all__ = ["Findings", "Scope", "Verification", "Verified", "open_verification", "read_past"]
