"""The transport of one session, and the requests that it sends."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fakes import ids_of

from bulkwf.attempt import Fault, FaultKind, Reply, Request, RequestKind, Slot

if TYPE_CHECKING:
    from simulation.world import World

TIMEOUT_S = 60.0


@dataclass
class Sent:
    """One request of a session."""

    number: int
    session: int
    method: str
    ids: tuple[str, ...]
    at: float
    written_at: float | None = None
    created: tuple[str, ...] = ()
    """Ids that it created."""
    withheld: tuple[str, ...] = ()
    """Ids that a fault kept it from creating, without an error."""
    reply: Reply | Fault | None = None
    """What the session received; None if the session ended before."""
    replied_at: float | None = None
    clean: bool = False
    """The reply is the service's own complete answer to this request."""
    stale: bool = False
    """The reply is a late copy of the answer to another request."""
    fresh: bool = False
    """It was sent over a connection of its own."""


class Network:
    """The transport of one session."""

    def __init__(self, world: "World", session: int) -> None:
        self._world = world
        self._session = session
        self._token = world.token
        self._on_wire: set[str] = set()

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """See `Transport.send`. A run never lists."""
        method = {RequestKind.CREATE: "POST", RequestKind.LOOK_UP: "GET"}[request.kind]
        if not slot.writing():
            return Fault(kind=FaultKind.NOT_SENT, message="the lease was lost")
        world, ids = self._world, tuple(ids_of(request))
        if not world.in_session:
            raise asyncio.CancelledError
        sent = Sent(len(world.sent), self._session, method, ids, world.monotonic(), fresh=request.fresh)
        world.sent.append(sent)
        twice = self._on_wire.intersection(ids) - world.shared
        assert not twice, f"in two requests at the same time: {sorted(twice)}"
        self._on_wire.update(ids)
        try:
            reply = await self._exchange(sent, request, slot.written)
            sent.replied_at = world.monotonic()
            sent.reply = replace(reply, elapsed_s=sent.replied_at - sent.at)
            return sent.reply
        finally:
            self._on_wire.difference_update(ids)

    async def _exchange(self, sent: Sent, request: Request, written: Callable[[], None]) -> Reply | Fault:
        world, chance = self._world, self._world.chance
        failing = world.now < world.plan.healthy_from
        await asyncio.sleep(world.travel_s() / 4)
        if failing and chance.random() < world.plan.refused_connections:
            return Fault(kind=FaultKind.NOT_SENT, message="no connection to the service")
        if failing and chance.random() < world.plan.handshakes:
            return Fault(kind=FaultKind.HANDSHAKE, message="the TLS handshake failed")
        sent.written_at = world.monotonic()
        if sent.method == "GET":
            written()
            return await self._converse(sent, request, failing=failing)
        # A body counts from when it was written; this is known when it is acknowledged, or answered.
        loop = asyncio.get_running_loop()
        left = partial(written, loop.time())
        acknowledgement = loop.call_later(world.travel_s() / 4, left)
        try:
            reply = await self._converse(sent, request, failing=failing)
            left()
            return reply
        finally:
            acknowledgement.cancel()

    async def _converse(self, sent: Sent, request: Request, *, failing: bool) -> Reply | Fault:
        """The reply or fault of a request that was written."""
        world, chance = self._world, self._world.chance
        stale = world.stale
        if failing and stale is not None and not sent.fresh and chance.random() < world.plan.stale:
            await asyncio.sleep(world.travel_s())  # an idle connection delivers a late copy; the request is not read
            sent.stale = True
            if stale.status == 200:
                sent.withheld = tuple(id_ for id_ in sent.ids if id_ not in world.created)
            return stale
        answered: asyncio.Future[Reply | Fault] = asyncio.get_running_loop().create_future()
        token = self._token
        world.schedule(world.travel_s(), lambda: world.arrive(sent, request, token, answered))
        try:
            reply = await asyncio.wait_for(answered, TIMEOUT_S)
        except TimeoutError:
            return Fault(kind=FaultKind.IN_DOUBT, message="no answer in time")
        if sent.method == "POST" and isinstance(reply, Reply) and not sent.fresh:
            world.stale = reply
        return reply

    async def refresh_credential(self, credential: int) -> bool:
        """See `Transport.refresh_credential`."""
        if credential == self._token and self._token + 1 < self._world.plan.tokens:
            self._world.token = self._token = self._token + 1
            return True
        return credential != self._token

    def drop_connections(self) -> None:
        """See `Transport.drop_connections`."""
        self._world.stale = None

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
