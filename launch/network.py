"""What a launch must know of the network: a free port, the way to the head node.

Standard library only, since it runs before the trainer. For shell scripts:
`python launch/network.py port JOBID` and `python launch/network.py way HEAD`.
"""

import socket
import struct
import sys
from contextlib import closing, suppress
from pathlib import Path

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


def main(argv: list[str]) -> int:
    match argv:
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
            print("network.py port JOBID | network.py way HEAD", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
