"""Runs one scenario of `uplink.test_uplink`, given in JSON; see the package."""

import asyncio
import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from bulkwf import Options, submit_all
from uplink.server import PORT

NEAR, FAR = "10.66.0.1", "10.66.0.2"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
BATCH = 100


def open_tun(name: str) -> int:
    """A new TUN device. Its file descriptor stays valid when the device is moved to another namespace."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def set_up(name: str, address: str, peer: str, pid: int | None = None) -> None:
    """Give a device its addresses, in the namespace of process *pid* if that is given."""
    there = () if pid is None else ("nsenter", f"--net=/proc/{pid}/ns/net")
    for words in (f"address add {address} peer {peer} dev {name}", f"link set {name} up"):
        subprocess.run([*there, "ip", *words.split()], check=True)


def rows(batches: int, sizes: list[int]):
    """Batches of rows of these sizes, in turn."""
    for number in range(batches * BATCH):
        size = sizes[number // BATCH % len(sizes)]
        yield {"instance_id": f"row-{number}", "params": {"filler": "x" * size}}


async def submit(scenario: dict, folder: str) -> None:
    await submit_all(
        rows(scenario["batches"], scenario["row_bytes"]),
        workflow="resize",
        account_id="acct",
        base_url=f"https://{FAR}:{PORT}",
        api_token="token-of-this-test",
        checkpoint=Path(folder, "run.bulkwf"),
        options=Options(ca_file=scenario["authority"]),
    )


def main() -> None:
    scenario = json.loads(sys.argv[1])
    for name, value in scenario["sysctl"].items():
        Path("/proc/sys/net/ipv4", name).write_text(value)
    near, far = open_tun("near"), open_tun("far")
    module = (sys.executable, "-m")
    with contextlib.ExitStack() as ends:
        server = ends.enter_context(
            subprocess.Popen(
                ("unshare", "--net", *module, "uplink.server", scenario["certificate"], scenario["key"], FAR),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        ends.callback(server.kill)
        server.stdout.readline()
        subprocess.run(["ip", "link", "set", "far", "netns", str(server.pid)], check=True)
        set_up("near", NEAR, FAR)
        set_up("far", FAR, NEAR, server.pid)
        link = [str(scenario[name]) for name in ("rate", "delay_s", "buffer")]
        words = (*module, "uplink.router", str(near), str(far), *link)
        router = ends.enter_context(subprocess.Popen(words, pass_fds=(near, far)))
        ends.callback(router.kill)
        server.stdin.write("\n")
        server.stdin.flush()
        server.stdout.readline()
        folder = ends.enter_context(tempfile.TemporaryDirectory())
        if scenario["loop"] == "uvloop":
            import uvloop  # noqa: PLC0415 - it is optional

            uvloop.run(submit(scenario, folder))
        else:
            asyncio.run(submit(scenario, folder))
        server.stdin.close()
        sys.stdout.write(server.stdout.readline())


if __name__ == "__main__":
    main()
