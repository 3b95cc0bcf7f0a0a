"""The minimum of a loop over aiohttp: no checks, no limits, no retries, no checkpoint, no results.

`orjson.loads` each row, `orjson.dumps` each batch, post it, `orjson.loads` the answer; sixteen at a time.
"""

import asyncio
import os
import sys
from itertools import islice

import aiohttp
import orjson


async def main(rows: str, base_url: str) -> None:
    """Submit a list."""
    url = f"{base_url}/accounts/acct/workflows/bench/instances/batch"
    headers = {"Authorization": f"Bearer {os.environ['CLOUDFLARE_API_TOKEN']}", "Content-Type": "application/json"}
    created = 0
    with open(rows, "rb", buffering=1 << 20) as file:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:

            async def work() -> None:
                nonlocal created
                while batch := [orjson.loads(line) for line in islice(file, 100)]:
                    async with session.post(url, data=orjson.dumps(batch)) as response:
                        created += len(orjson.loads(await response.read())["result"])

            await asyncio.gather(*(work() for _ in range(16)))
    print(created)


asyncio.run(main(*sys.argv[1:]))
