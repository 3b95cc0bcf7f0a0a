"""The service on this machine: its rules, its limits, and the faults that a script asks for.

`answers`, `limits`, `batch`, `admission`, `instances`, `state` and `faults` are pure, and so is `exchange`, which plays
one request over them. `server` puts it on a socket; `log` keeps what was really created. Nothing here is shared with
the client, so that the two do not share mistakes.

`tests/contract` compares it with Cloudflare's own engine on this machine (miniflare). These are the differences; the
last column gives the emulator's evidence, in the words of `state.py`:

    what                           | emulator                   | local engine              | evidence for the emulator
    -------------------------------+----------------------------+---------------------------+---------------------------
    more instances than the rate   | 429 10429                  | created                   | documented; unknown code
    more requests than the rate    | 429 971                    | answered                  | documented
    headers with the rate          | ratelimit ratelimit-policy | none                      | documented
    a queue that is full           | omitted                    | created                   | unknown; our choice
    params of over 1 MiB           | 400 10002                  | created                   | documented; believed code
    a body of over 32 MiB          | 413 10002                  | 500 10001 *               | unknown; the engine's size
    an id past its retention       | is free                    | is taken                  | documented
    a retention that is none       | 400 10002                  | created                   | documented; newer form
    an id that is reserved         | 400 10002                  | created                   | documented; newer form
    an item that is no object      | 400 10002                  | created                   | documented; newer form
    an item that is null           | 400 10002                  | 500 10001 *               | documented; newer form
    a location_hint of no text     | 400 10002                  | created                   | documented; newer form
    an object around the array     | 400 10002                  | created                   | documented
    params that are absent         | absent                     | {}                        | their bytes are logged
    an integer of 30 digits        | kept                       | rounded                   | its bytes are logged
    version_id and workflow_id     | its own                    | zero *                    | documented
    an instance that ends well     | queued                     | complete                  | nothing runs; `queued_s`
    an instance that throws        | queued                     | errored                   | nothing runs; fault `fail`
    an instance that sleeps        | queued                     | running                   | nothing runs
    changing an instance's status  | 404 7003                   | is possible               | nothing runs
    an instance that is missing    | 404 10400                  | 404 10501                 | believed
    ... that was asked for         | is not counted             | is counted                | our choice
    a workflow that is missing     | 404 10200                  | 404 10501                 | believed
    a question that is refused     | 400 10002                  | 400 10001                 | believed
    ... for its dates              | 400 10002                  | 400 10502                 | believed
    a path that leads nowhere      | 404 7003                   | 404, no JSON              | believed
    an Authorization of no scheme  | 400 6003                   | 401 10000 *               | believed
    an instance lacks              | params                     | 4 of 13 keys              | documented; keeps none
    a listed instance lacks        | nothing                    | 5 of 8 keys               | documented
    a workflow lacks               | nothing                    | 4 of 8 keys               | documented
    more keys of result_info       | count                      | status_counts total_pages | documented
    simple=true                    | without steps              | as ever                   | documented
    a cursor when one more began   | names none twice           | names one twice *         | documented; none is local

Numbers are the status, then the code. An asterisk: the answer is not the engine's but that of the tests' worker in
front of it (`tests/real_engine/worker.mjs`), because the engine has no batch-create in REST; no evidence. Newer form:
the engine's own `{instances: [...]}`, which REST does not take so far, refuses it too. Not in the table, because it
happens by chance: if two callers send the same batch at the same moment, the engine sometimes names the same instance
as created to both.
"""

from bulkwf.emulator.admission import Caller, Target
from bulkwf.emulator.answers import Answer
from bulkwf.emulator.batch import params_crc
from bulkwf.emulator.exchange import Call, Exchange, Outgoing
from bulkwf.emulator.faults import FaultScriptError, Rule, parse_script
from bulkwf.emulator.limits import Limits
from bulkwf.emulator.log import Created, read_log
from bulkwf.emulator.server import Emulator, emulate, serve
from bulkwf.emulator.state import Service, Tampering

__all__ = [
    "Answer",
    "Call",
    "Caller",
    "Created",
    "Emulator",
    "Exchange",
    "FaultScriptError",
    "Limits",
    "Outgoing",
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
