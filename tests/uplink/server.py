"""A service at the far end that records when each request arrived: `python -m uplink.server CERTIFICATE KEY ADDRESS`.

An arrival has the kernel's time of the packet that completed the data, whenever this process is scheduled. A batch that
would make more than LIMIT instances in WINDOW_S seconds is refused.

A line on stdin says that the device has been set up. Prints a line when it listens, and all arrivals when stdin closes.
"""

import json
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time

PORT = 8443
LIMIT = 100
WINDOW_S = 0.98
ANSWERS_AFTER_S = (0.03, 0.5)
SO_TIMESTAMPNS = 35
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)", re.IGNORECASE)


class Service:
    """What has arrived, over all connections."""

    def __init__(self) -> None:
        self.arrivals = []
        self.lock = threading.Lock()
        self.chance = random.Random(1)

    def arrive(self, began_at: float, at: float, body: bytes) -> bytes:
        """Record a request; returns its answer."""
        ids = [item["instance_id"] for item in json.loads(body)]
        with self.lock:
            recent = sum(one["instances"] for one in self.arrivals if one["at"] > at - WINDOW_S)
            refused = recent + len(ids) > LIMIT
            arrival = {"began_at": began_at, "at": at, "instances": len(ids), "bytes": len(body), "refused": refused}
            self.arrivals.append(arrival)
            time_s = self.chance.uniform(*ANSWERS_AFTER_S)
        time.sleep(time_s)
        if refused:
            return answer(429, [], [{"code": 10429, "message": "too many"}])
        return answer(200, [{"id": id_, "status": "queued"} for id_ in ids], [])


def answer(status: int, result: list, errors: list) -> bytes:
    body = json.dumps({"success": not errors, "errors": errors, "messages": [], "result": result}).encode()
    head = f"HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + ("Retry-After: 1\r\n" if errors else "").encode() + b"\r\n" + body


class Connection:
    """TLS over a socket that notes the kernel's time of each read."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = connected
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.began_at = None
        self.at = 0.0
        connected.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def serve(self, service: Service) -> None:
        self.pump(self.tls.do_handshake)
        data = b""
        while True:
            self.began_at = None
            while (end := data.find(b"\r\n\r\n")) < 0:
                data += self.pump(lambda: self.tls.read(65_536))
            end += 4 + int(_LENGTH.search(data[:end])[1])
            while len(data) < end:
                data += self.pump(lambda: self.tls.read(65_536))
            body, data = data[data.index(b"\r\n\r\n") + 4 : end], data[end:]
            self.tls.write(service.arrive(self.began_at, self.at, body))
            self.socket.sendall(self.outgoing.read())

    def pump(self, step):
        """Run a step of TLS, and send and receive what it needs."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self.socket.sendall(self.outgoing.read())
                self.receive()
            finally:
                self.socket.sendall(self.outgoing.read())

    def receive(self) -> None:
        data, more, _, _ = self.socket.recvmsg(65_536, 64)
        if not data:
            raise ConnectionError
        [stamp] = [struct.unpack("qq", value) for _, kind, value in more if kind == SO_TIMESTAMPNS]
        self.at = stamp[0] + stamp[1] / 1e9
        self.began_at = self.began_at or self.at
        self.incoming.write(data)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    certificate, key, address = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    say("a namespace of its own")
    sys.stdin.readline()
    listening = socket.create_server((address, PORT))
    say("listening")
    service = Service()

    def serve(connected: socket.socket) -> None:
        try:
            Connection(connected, context).serve(service)
        except (OSError, ssl.SSLError):
            connected.close()

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    say(json.dumps(service.arrivals))


if __name__ == "__main__":
    main()
