"""One verification of the command: from its checkpoint to the exit code."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio

from bulkwf.cli.display import ShownVerification, show_progress
from bulkwf.cli.messages import say
from bulkwf.cli.resume import say_end
from bulkwf.cli.signals import Signals
from bulkwf.cli.summaries import verified_lines, when
from bulkwf.errors import BulkwfError
from bulkwf.options import Options
from bulkwf.transport.credentials import token_source
from bulkwf.verification import VerificationReport, open_verification

__all__ = ["VerifySession"]

LARGE_BYTES = 20_000_000
"""Size of a checkpoint, in bytes, above which reading it takes over a second."""


@dataclass(frozen=True)
class VerifySession:
    """One verification."""

    checkpoint: Path
    account_id: str | None
    base_url: str
    options: Options
    token_file: Path | None
    sample: int | None

    async def run(self, *, quiet: bool) -> VerificationReport:
        """Verify, show the counts, and print what to do next; the report holds the exit code."""
        error: BulkwfError | None = None
        if not quiet and self.checkpoint.is_file() and self.checkpoint.stat().st_size > LARGE_BYTES:
            say("bulkwf: reading the checkpoint …")
        token = token_source(self.token_file)
        async with AsyncExitStack() as stack:
            verification = await stack.enter_async_context(
                open_verification(
                    self.checkpoint,
                    account_id=self.account_id,
                    base_url=self.base_url,
                    token=token,
                    options=self.options,
                    sample=self.sample,
                )
            )
            if verification.store.resumed and not quiet:
                since, path = when(verification.store.begun_at), verification.store.path
                say(f"bulkwf: continuing the verification started {since}; to start over, delete {path}")
            working = anyio.CancelScope()
            signals = Signals(lambda _: working.cancel(), working.cancel, "what was found so far is kept")
            stack.enter_context(signals.caught())
            try:
                with working:
                    async with show_progress(ShownVerification(verification), quiet=quiet):
                        await verification.run()
            except BulkwfError as stopped:
                error = stopped
            report = await verification.report(error, signals.received)
        if not quiet:
            say(*verified_lines(report.counts))
        say_end(error, signals.received, complete=report.counts.complete)
        return report
