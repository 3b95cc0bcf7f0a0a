"""A script around Cloudflare's SDK: the list in memory, a gather under a semaphore, one line of JSON per result."""

import asyncio
import json
import sys

from cloudflare import AsyncCloudflare


async def main(rows: str, base_url: str, results: str) -> None:
    """Submit a list."""
    with open(rows, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    semaphore, created = asyncio.Semaphore(16), 0
    async with AsyncCloudflare(base_url=base_url) as client:
        with open(results, "w", encoding="utf-8") as file:

            async def send(batch: list[dict]) -> None:
                nonlocal created
                async with semaphore:
                    page = await client.workflows.instances.bulk("bench", account_id="acct", body=batch)
                for one in page.result:
                    file.write(json.dumps({"id": one.id, "status": one.status}) + "\n")
                    created += 1

            await asyncio.gather(*(send(items[start : start + 100]) for start in range(0, len(items), 100)))
    print(created)


asyncio.run(main(*sys.argv[1:]))
