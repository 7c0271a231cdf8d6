"""URLs that may be fetched, from a server of the test that stands for a public host; and what is refused before or after."""

from __future__ import annotations

import http.server
import io
import socket
import ssl
import tempfile
import threading

import numpy as np
import pytest
from PIL import Image

from qwen35_jax.errors import UserError
from qwen35_jax.vision_io import Picture, VisionSettings, messages, read_image, read_picture, remote
from tests.vision_checkpoint import picture

PUBLIC = "93.184.216.34"
REMOTE = VisionSettings(image_min_pixels=1024, allow_remote_media=True)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        file = io.BytesIO()
        Image.fromarray(picture(64, 96)).save(file, "PNG")
        bodies = {"/a.png?size=1": file.getvalue(), "/text": b"no image", "/large": bytes(5000), "/open": bytes(5000)}
        bodies["/half"] = bytes(50)
        status = {"/moved": 302, "/absent": 404}.get(self.path, 200)
        body = bodies.get(self.path, b"")
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1/a.png")
        if self.path == "/slow":
            self.server.slow.wait(20)
        if self.path == "/open":  # as long as it likes: it ends with the connection
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body) * (2 if self.path == "/half" else 1)))
            self.close_connection = self.path == "/half"
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Plain(socket.socket):
    """A socket that needs no handshake."""

    def do_handshake(self):
        pass


@pytest.fixture
def host(monkeypatch):
    """What was connected to, and the names that certificates were asked for; every name resolves to a public address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked: list = []

    def connect(address, timeout=None):
        asked.append(address)
        end = Plain()
        end.connect(server.server_address)
        return end

    def wrapped(self, sock, server_hostname, do_handshake_on_connect):
        asked.append(server_hostname)
        return sock

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (PUBLIC, port))])
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrapped)
    server.slow = threading.Event()
    yield asked
    server.slow.set()
    server.shutdown()
    server.server_close()


def test_an_image_and_frames_of_a_public_host(host):
    url = "https://example.com/a.png?size=1"
    found = read_picture(Picture("image", url), REMOTE)
    local = read_picture(Picture("image", picture(64, 96)), REMOTE)
    np.testing.assert_array_equal(found.patches, local.patches)
    assert host == [(PUBLIC, 443), "example.com"]  # the address that was checked, the certificate of the name
    clip = read_picture(Picture("video", [url, picture(64, 96)], 2.0), REMOTE)
    assert clip.kind == "video" and len(host) == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/moved", r"answers with a redirect \(302\), which is not followed"),
        ("/absent", "answers 404"),
        ("/large", "it has 5,000 bytes; at most 4,000 are read"),
        ("/open", "it has more than 4,000 bytes"),
        ("/half", "it breaks off after 50 of 100 bytes"),
    ],
)
def test_answers_that_are_refused(host, path, message):
    with pytest.raises(UserError, match=message) as error:
        remote.fetch(f"https://example.com{path}", 4000)
    assert "\n" not in str(error.value) and len(host) == 2


def test_the_frames_of_a_video_are_bounded_together(host, monkeypatch):
    url = "https://example.com/a.png?size=1"
    size = len(remote.fetch(url, 10**6))
    monkeypatch.setattr(messages, "MAX_BYTES", 3 * size)
    assert read_picture(Picture("video", [url] * 3), REMOTE).kind == "video"
    before = len(host)
    with pytest.raises(UserError, match=r"video https://example.com/a.png\?size=1: with it the frames have more than"):
        read_picture(Picture("video", [url] * 9), REMOTE)
    assert len(host) - before == 8  # the fifth is not asked for


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (Picture("image", "https://example.com/text"), "image https://example.com/text is no image that can be read"),
        (Picture("video", ["https://example.com/text"]), "image https://example.com/text is no image that can be read"),
        (Picture("video", "https://example.com/text"), "video https://example.com/text: it cannot be read: Invalid data"),
    ],
)
def test_what_is_no_picture(host, shown, message):
    """The error names the URL, and not the file that its content was written to."""
    if isinstance(shown.source, str) and shown.kind == "video":
        pytest.importorskip("av", reason="reading video files needs PyAV (av)")
    with pytest.raises(UserError, match=message) as error:
        read_picture(shown, REMOTE)
    assert tempfile.gettempdir() not in str(error.value)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
     "fe80::1%1", "fec0::1", "::a00:1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "255.255.255.255"],
)  # fmt: skip
def test_addresses_that_are_not_public(host, monkeypatch, address):
    """Even beside a public one; nothing is connected to."""
    found = [(0, 0, 0, "", (PUBLIC, 443)), (0, 0, 0, "", (address, 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UserError, match="image https://example.com/a.png: the host example.com has the address .* not public"):
        read_picture(Picture("image", "https://example.com/a.png"), REMOTE)
    assert not host


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/a.png", "only https"),
        ("https:///a.png", "must name a host"),
        ("https://user@example.com/a.png", "without a user"),
        ("https://example.com:99999999/a.png", "malformed"),
        ("https://example.com/a b.png", "plain characters"),
        ("https://example.com/a.png\r\nHost: x", "plain characters"),
        ("https://exämple.com/a.png", "plain characters"),
    ],
)
def test_urls_that_are_refused(host, url, message):
    with pytest.raises(UserError, match=message):
        remote.fetch(url, 4000)
    assert not host


def test_a_host_that_is_silent(host, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    with pytest.raises(UserError, match="it was not there after 0.5 seconds"):
        remote.fetch("https://example.com/slow", 10**6)


def test_a_name_that_does_not_resolve(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="the host nowhere.invalid is not found"):
        remote.fetch("https://nowhere.invalid/a.png", 10)


def test_nothing_is_fetched_unless_it_is_allowed(host):
    for read in (read_image, lambda source: read_picture(Picture("image", source), VisionSettings())):
        with pytest.raises(UserError, match="remote URLs are not fetched unless allow_remote_media is set"):
            read("https://example.com/a.png")
    assert not host
