"""What a launch must know of the network: a free port, the way to the head node, who has come.

Standard library only, since it runs before the trainer. For shell scripts:
`python launch/network.py port JOBID`, `python launch/network.py way HEAD` and
`python launch/network.py meet ADDRESS:PORT NODES IS_HEAD -- COMMAND ...`.
"""

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

HELLO = b"lockstep\n"  # what the head says first; torch's store on that port would be silent
MINUTE = 60.0
LATECOMERS = 30.0  # seconds that a launch of MIN:MAX nodes waits for more of them
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def port_range() -> range:
    """Ports below those the kernel gives to outgoing connections, which come and go at random."""
    low = 32768
    with suppress(OSError, ValueError):
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        low = int(text.split()[0])
    return range(10_000, low) if low > 11_000 else range(20_000, 30_000)


def is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port(job: int) -> int:
    """The port of a job: a function of its number, or the next one that is free on this host."""
    ports = port_range()
    for offset in range(len(ports)):
        port = ports[(job + offset) % len(ports)]
        if is_free(port):
            return port
    raise OSError("no free port")


def is_local(address: str) -> bool:
    """Whether a name or address is this host: only then can a socket be bound to it."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def source_address(head: str) -> str:
    """This host's address as the head node sees it; nothing is sent to find out."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect((head, 9))
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The network interface that holds an address; '' where the system does not tell."""
    with suppress(ImportError, OSError):
        import fcntl

        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):
                    request = struct.pack("256s", name.encode()[:15])
                    reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                    if socket.inet_ntoa(reply[20:24]) == address:
                        return name
    return ""


# --- a roll call before the launch: torch would wait for nodes, and for the head, in silence ------


class Alone(Exception):
    """The nodes do not come together; says who is there and what to look at."""


def say(text: str) -> None:
    print(f"lockstep: {text}", file=sys.stderr, flush=True)


def wait_limit() -> float:
    return float(os.environ.get("LOCKSTEP_TIMEOUT", "600"))


def span(nodes: str) -> tuple[int, int]:
    """`2` as (2, 2), `1:4` as (1, 4)."""
    least, _, most = nodes.partition(":")
    return int(least), int(most or least)


def receive(port: int, nodes: str) -> None:
    """On the head: until all nodes have come; at once and each minute, all are told who has.

    Of MIN:MAX nodes MIN are enough after a while; later ones are torch's to take in.
    """
    least, most = span(nodes)
    wanted = nodes.replace(":", " to ")
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("", port))
        except OSError:
            raise Alone(
                f"port {port} is taken on this node; choose another for --head, on all nodes"
            ) from None
        door.listen(most)
        here: dict[socket.socket, str] = {}
        began, said_at = time.monotonic(), -MINUTE
        while len(here) < most - 1:
            now = time.monotonic()
            if len(here) + 1 >= least < most and now - began > LATECOMERS:
                break
            came = f"{len(here) + 1} of {wanted} nodes came: " + ", ".join(
                [f"{socket.gethostname()} (the head)", *sorted(here.values())]
            )
            if now - began > wait_limit():
                text = f"{came}; the others did not in {now - began:.0f} s: was the same command "
                text += "typed on each of them, and do their terminals say why they ended?"
                tell_all(here, "no", text)
                raise Alone(text)
            if now - said_at >= MINUTE:
                said_at = now
                say(f"{came}; waiting for the others, where the same command is to be typed")
                tell_all(here, "wait", came)
            ready, _, _ = select.select([door, *here], [], [], 1.0)
            for one in ready:
                said_at = -MINUTE  # somebody came or left: say so
                if one is door:
                    node, (address, _) = door.accept()
                    node.settimeout(5)
                    if (name := name_of(node, address, nodes, here)) is not None:
                        here[node] = name
                elif not one.recv(1024):
                    say(f"{here.pop(one)} has left")
                    one.close()
    tell_all(here, "go", f"{len(here) + 1} of {wanted} nodes came")
    for node in here:  # they close first, so that nothing of this lingers on the port
        with suppress(OSError):
            node.settimeout(2)
            node.recv(1024)
        node.close()


def name_of(
    node: socket.socket, address: str, nodes: str, here: dict[socket.socket, str]
) -> str | None:
    """Who has come; None for a stranger, and for a node of another launch, which is told why."""
    with suppress(OSError, ValueError, KeyError):
        node.sendall(HELLO)
        about = json.loads(node.recv(4096))
        if about["nodes"] == nodes:
            return f"{about['host']} ({address})"
        text = f"{about['host']} was started with --nnodes {about['nodes']}, the head with {nodes}"
        say(f"{text}: the same command is meant on all nodes")
        tell_all({node: ""}, "no", f"{text}: the same command is meant on all nodes")
    node.close()
    return None


def tell_all(nodes: dict[socket.socket, str], kind: str, text: str) -> None:
    for node in nodes:
        with suppress(OSError):
            node.sendall(json.dumps([kind, text]).encode() + b"\n")


def knock(head: str, port: int) -> socket.socket:
    """On another node: a connection to the head, whoever listens there; waits for it in words."""
    began, said_at = time.monotonic(), time.monotonic() - MINUTE + 3  # heads may be a moment later
    while True:
        try:
            return socket.create_connection((head, port), timeout=5)
        except OSError as error:
            now = time.monotonic()
            if now - began > wait_limit():
                raise Alone(
                    f"the head node does not answer at {head}:{port} after {now - began:.0f} s "
                    f"({error}); is it the head's address (`hostname -I` there), was the same "
                    "command typed there, does a firewall stand between?"
                ) from None
            if now - said_at >= MINUTE:
                said_at = now
                say(
                    f"waiting for the head node at {head}:{port} ({error}); there the same "
                    "command is to be typed"
                )
            time.sleep(0.5)


def join(head: str, port: int, nodes: str) -> None:
    """On another node: until the head says that all have come, and torch's store is there."""
    with knock(head, port) as line:
        line.settimeout(3)
        try:
            greeted = line.recv(len(HELLO)) == HELLO
        except OSError:
            greeted = False
        if not greeted:  # torch's store: the launch has begun
            return
        about = {"host": socket.gethostname(), "nodes": nodes}
        line.sendall(json.dumps(about).encode())
        line.settimeout(3 * MINUTE)
        for kind, text in words_of(line):
            if kind == "go":
                break
            if kind == "no":
                raise Alone(text)
            say(text)
        else:
            raise Alone(f"the head node at {head}:{port} has left; its terminal may say why")
    time.sleep(1)
    knock(head, port).close()


def words_of(line: socket.socket) -> Iterator[tuple[str, str]]:
    """What the head says, until it leaves."""
    with suppress(OSError, ValueError), line.makefile(encoding="utf-8") as lines:
        for words in lines:
            kind, text = json.loads(words)
            yield kind, text


def meet(endpoint: str, nodes: str, is_head: bool, command: list[str]) -> int:
    """Run the command in this process's place once all nodes are there."""
    head, _, port = endpoint.rpartition(":")
    try:
        if is_head:
            receive(int(port), nodes)
        elif nodes != "1":
            join(head, int(port), nodes)
    except Alone as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    os.execvp(command[0], command)


def main(argv: list[str]) -> int:
    match argv:
        case ["meet", endpoint, nodes, is_head, "--", *command]:
            return meet(endpoint, nodes, is_head == "yes", command)
        case ["port", job] if job.isdigit():
            print(free_port(int(job)))
        case ["way", head]:
            try:
                mine = source_address(head)
            except OSError as error:
                message = f"{head}: this host knows no way to the head node ({error})"
                print(
                    f"{message}; give its address, as `hostname -I` prints it there",
                    file=sys.stderr,
                )
                return 2
            print(mine, "yes" if is_local(head) else "no", interface_of(mine))
        case _:
            print("network.py port JOBID | way HEAD | meet ...", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
