"""A script around httpx: the list in memory, a gather under a semaphore, one line of JSON per result."""

import asyncio
import json
import os
import sys

import httpx


async def main(rows: str, base_url: str, results: str) -> None:
    """Submit a list."""
    url = f"{base_url}/accounts/acct/workflows/bench/instances/batch"
    with open(rows, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    semaphore, created = asyncio.Semaphore(16), 0
    headers = {"Authorization": f"Bearer {os.environ['CLOUDFLARE_API_TOKEN']}"}
    async with httpx.AsyncClient(headers=headers, timeout=60) as client:
        with open(results, "w", encoding="utf-8") as file:

            async def send(batch: list[dict]) -> None:
                nonlocal created
                async with semaphore:
                    response = await client.post(url, json=batch)
                for one in response.json()["result"]:
                    file.write(json.dumps({"id": one["id"], "status": one["status"]}) + "\n")
                    created += 1

            await asyncio.gather(*(send(items[start : start + 100]) for start in range(0, len(items), 100)))
    print(created)


asyncio.run(main(*sys.argv[1:]))
