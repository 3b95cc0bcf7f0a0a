"""The public API as a typed program uses it. Nothing runs this file: `make lint` checks it with mypy and pyright.

What must not be accepted bears a `type: ignore`, which is an error itself as soon as it is not needed.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, assert_type

import bulkwf
from bulkwf import (
    BatchLimits,
    BulkwfError,
    CheckpointError,
    ConfigError,
    Fault,
    FaultKind,
    InputError,
    Instance,
    Options,
    Progress,
    RateLimits,
    Reply,
    Request,
    Result,
    Results,
    RetryPolicy,
    ServiceRefused,
    Slot,
    Summary,
    TemporaryStop,
    Transport,
)

# --- submitting ---------------------------------------------------------------------------------------------------


def mappings() -> Iterator[Mapping[str, Any]]:
    yield {"instance_id": "order-17", "params": {"order_id": 17}}


def instances() -> list[Instance]:
    return [
        Instance(),
        Instance(params=[1, None], instance_id="a", location_hint="weur"),
        Instance(params={}, instance_retention={"success_retention": "7 days", "error_retention": 86_400_000}),
    ]


async def drawn() -> AsyncIterator[dict[str, object]]:
    yield {"params": {"n": 1}}


def show(progress: Progress) -> None:
    assert_type(progress.counts.created, int)
    assert_type(progress.read_share, float | None)


def token() -> str:
    return "from a vault"


OPTIONS = Options(
    batch=BatchLimits(instances=50, rows=1_000, bytes=1 << 20, linger_s=0.5),
    rate=RateLimits(instances_per_s=None, requests_per_5m=1_000, concurrency=8),
    retry=RetryPolicy(base_s=0.5, max_wait_s=60.0, max_outage_s=600.0),
    row_shape="params",
    id_template="order-{order_id}",
    in_doubt="resend",
    first=10,
    proxy=None,
    ca_file=None,
)


async def submits_lists_of_every_kind() -> int:
    summary = assert_type(await bulkwf.submit_all("rows.jsonl", workflow="fulfil"), Summary)
    await bulkwf.submit_all(Path("rows.jsonl.gz"), workflow="fulfil", checkpoint=Path("night.bulkwf"))
    await bulkwf.submit_all(mappings(), workflow="fulfil", account_id="a", api_token="t", checkpoint="night.bulkwf")
    await bulkwf.submit_all(instances(), workflow="fulfil", api_token=token, options=OPTIONS, on_progress=show)
    await bulkwf.submit_all(
        drawn(), workflow="fulfil", base_url="http://127.0.0.1:8787/client/v4", transport=Recorder()
    )
    assert_type(summary.created + summary.existed + summary.rejected + summary.invalid + summary.pending, int)
    assert_type((summary.complete, summary.elapsed_s, summary.paused_s), tuple[bool, float, float])
    return summary.exit_code


async def streams() -> None:
    async with bulkwf.submit_stream(mappings(), workflow="fulfil", checkpoint="night.bulkwf") as results:
        assert_type(results, Results)
        async for result in results:
            assert_type(result, Result)
    assert_type(results.summary, Summary | None)


async def refuses_what_is_no_argument() -> None:
    await bulkwf.submit_all(mappings())  # type: ignore[call-arg]
    await bulkwf.submit_all("rows.jsonl", "fulfil")  # type: ignore[call-arg]
    await bulkwf.submit_all([b"rows"], workflow="fulfil")  # type: ignore[list-item]
    bulkwf.submit_stream(instances(), workflow="fulfil", api_token=b"t")  # type: ignore[arg-type]
    Options(in_doubt="ask")  # type: ignore[arg-type]
    OPTIONS.first = 20  # type: ignore[misc]


# --- results ----------------------------------------------------------------------------------


def reads() -> list[str]:
    assert_type(bulkwf.read_results("night.bulkwf"), Iterator[Result])
    bulkwf.read_results(Path("night.bulkwf"), outcome="lost")  # type: ignore[arg-type]
    return [describe(result) for result in bulkwf.read_results(Path("night.bulkwf"), outcome="rejected")]


def describe(result: Result) -> str:
    assert_type(result.outcome, Literal["created", "existed", "rejected", "invalid", "pending"])
    assert_type((result.row, result.id, result.code), tuple[int, str | None, int | str | None])
    match result.outcome:
        case "created" | "existed":
            return f"{result.id} {result.status}"
        case "rejected" | "invalid":
            return f"{result.row}: {result.code}: {result.message}"
        case "pending":
            return f"{result.row} after {result.attempts} attempts"


async def handles_each_error() -> int:
    try:
        await bulkwf.submit_all("rows.jsonl", workflow="fulfil")
    except (ConfigError, ServiceRefused) as error:
        assert_type(error.exit_code, int)
    except (InputError, CheckpointError, TemporaryStop) as error:
        assert_type(error.summary, Summary | None)
    except BulkwfError as error:
        return error.exit_code
    return 0


# --- a transport --------------------------------------------------------------------------------------------------


class Recorder:
    """A custom transport: a class with these four methods, without a base class."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        if not slot.writing():
            return Fault(kind=FaultKind.NOT_SENT, message="the limits took their leave back")
        self.requests.append(request)
        slot.written()
        return Reply(status=200, headers={"content-type": "application/json"}, body=b'{"success":true,"result":[]}')

    async def refresh_credential(self, credential: int) -> bool:
        return False

    def drop_connections(self) -> None: ...

    async def aclose(self) -> None: ...


class Half:
    async def aclose(self) -> None: ...


RECORDER: Transport = Recorder()
HALF: Transport = Half()  # type: ignore[assignment]
