"""Files of other hosts, for whoever allows it: https only, from public addresses only, without redirects, within limits."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from urllib.parse import SplitResult, urlsplit

from qwen35_jax.errors import UserError
from qwen35_jax.text import one_line

TIMEOUT = 30.0  # seconds for all of a file
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that is assigned of IPv6 to the public
TRANSLATED = ipaddress.ip_network("2002::/16")  # 6to4: public by its number, and yet it leads to an IPv4 address of any kind


def is_remote(source: object) -> bool:
    """Whether a source is a URL that names a host of the web."""
    return isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE) is not None


def fetch(url: str, limit: int) -> bytes:
    """The bytes behind an https URL, at most `limit`.

    The name is resolved once; every address of it must be public (no loopback, private, link-local, multicast or translated one),
    and the connection goes to one that was checked. Raises UserError, one line, without the URL: for all of this, for any answer
    but 200 (redirects are not followed), for a file that is too large, and after 30 seconds.
    """
    parts = _parts(url)
    port = parts.port or 443
    connection = _Connection(parts.hostname, port, _address(parts.hostname, port))
    timer = threading.Timer(TIMEOUT, connection.expire)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", headers={"Accept": "*/*"})
        body = _body(connection.getresponse(), limit)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not connection.expired:
            raise UserError(f"it cannot be fetched: {one_line(error)}") from error
    finally:
        timer.cancel()
        connection.close()
    if connection.expired:  # what came before need not be all
        raise UserError(f"it was not there after {TIMEOUT:g} seconds")
    return body


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # says so here if it is no number
    except ValueError as error:
        raise UserError(f"the URL is malformed: {one_line(error)}") from error
    if parts.scheme.lower() != "https":
        raise UserError("only https URLs are fetched")
    if not parts.hostname or parts.username is not None or not url.isascii() or re.search(r"[\x00-\x20\x7f]", url):
        raise UserError("the URL must name a host, without a user, in plain characters (%-encoded where it needs to be)")
    return parts


def _address(host: str, port: int) -> str:
    """The first address of a host. UserError where it has none, or one that is not public."""
    try:
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise UserError(f"the host {host} is not found: {one_line(error)}") from error
    for text in found:
        if not _public(text):
            raise UserError(f"the host {host} has the address {text}, which is not public: it is not fetched from there")
    return found[0]


def _public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 6 and (address not in GLOBAL_UNICAST or address in TRANSLATED):
        return False
    return address.is_global and not address.is_multicast


class _Connection(http.client.HTTPSConnection):
    """A connection to one address, whose certificate must be the host's, and which `expire` cuts off."""

    def __init__(self, host: str, port: int, address: str):
        self._verifier = ssl.create_default_context()
        super().__init__(host, port, timeout=TIMEOUT, context=self._verifier)
        self._address, self._held, self.expired = address, None, False

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        # Held here too: the parent lets go of it once the answer has begun.
        self._held = self.sock = self._verifier.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        if self.expired:  # while there was nothing to cut off
            raise TimeoutError
        self._held.do_handshake()

    def expire(self) -> None:
        self.expired = True
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    if 300 <= response.status < 400:
        raise UserError(f"the host answers with a redirect ({response.status}), which is not followed: give the final URL")
    if response.status != 200:
        raise UserError(f"the host answers {response.status} {one_line(response.reason)}"[:160])
    size = response.getheader("Content-Length", "")
    if size.isdigit() and int(size) > limit:
        raise UserError(f"it has {int(size):,} bytes; at most {limit:,} are read")
    body = response.read(limit + 1)
    if len(body) > limit:
        raise UserError(f"it has more than {limit:,} bytes, the most that are read")
    if response.length:  # of the announced ones, those that did not come
        raise UserError(f"it breaks off after {len(body):,} of {len(body) + response.length:,} bytes: try again")
    return body
