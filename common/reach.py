"""Whether a server on the network answers at all: asked once, with a deadline of seconds."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def unreached(address: str, seconds: float) -> str:
    """`HOST cannot be reached (why)` of a URL's server, or of the proxy in front of it; "": it can.

    Libraries would try again for minutes, where a cluster's node has no way out.
    """
    server = urlsplit(address)
    proxy = getproxies().get(server.scheme)
    first = urlsplit(proxy) if proxy else server
    port = first.port or (443 if first.scheme == "https" else 80)
    try:
        socket.create_connection((first.hostname, port), timeout=seconds).close()
    except OSError as error:
        return f"{first.hostname} cannot be reached ({error})"
    return ""
