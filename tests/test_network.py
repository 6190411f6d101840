"""Network: when it repeats, where it connects to, and how much it reads."""

import gzip
import re
import socket
import time
from pathlib import Path

import fake_mediawiki as fake
import httpx2
import pytest
from fake_mediawiki import FakeMediaWiki

from attention_guided_rl import network as network_module
from attention_guided_rl.config import NetworkConfig
from attention_guided_rl.errors import ConfigError, RemoteError, StorageError, UnsafeError
from attention_guided_rl.network import Network, Transient, is_loopback, public_addresses, retry_after, web_address

PUBLIC = "93.184.215.14"


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path_factory):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path_factory.getbasetemp()))  # no certificates: nothing to load


@pytest.fixture
def server():
    with FakeMediaWiki({}) as wiki:
        yield wiki


def make(**options) -> Network:
    return Network(NetworkConfig(**{"timeout_s": 0.3, "deadline_s": 5.0, "backoff_s": 0.001, **options}))


def get(address: str, *, trusted: bool = True, **options) -> httpx2.Response:
    with make(**options).client(address, trusted=trusted) as client:
        return client.get(address)


def resolve_to(monkeypatch, *addresses: str) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: found)


def connect_to(monkeypatch, port: int, *, dead: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """Lead every connection to a server on this machine; return where they were meant to go."""
    meant = []

    def connect_here(address, *_, **__):
        meant.append(address)
        if address[0] in dead:
            raise TimeoutError("timed out")
        connection = socket.socket()
        connection.connect(("127.0.0.1", port))
        return connection

    monkeypatch.setattr(socket, "create_connection", connect_here)
    return meant


class Failing:
    """Raises Transient a number of times, then returns 7."""

    def __init__(self, network: Network, failures: int, retry_after: float | None = None) -> None:
        self.waits: list[float] = []
        self.calls, self._failures, self._retry_after = 0, failures, retry_after
        network.sleep = self.waits.append

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise Transient("it rains", self._retry_after)
        return 7


def test_waits_are_random_below_a_bound_that_doubles_up_to_30_s():
    network = make(backoff_s=0.5, deadline_s=600)
    attempt = Failing(network, 10)

    assert network.retry("rain", attempt) == 7
    assert len(attempt.waits) == 10
    for wait, bound in zip(attempt.waits, (0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30), strict=True):
        assert 0 <= wait <= bound
    assert len(set(attempt.waits)) == 10


@pytest.mark.parametrize("asked", [3.0, 120.0])
def test_what_the_server_asks_to_wait_is_waited(asked):
    network = make(deadline_s=600)
    attempt = Failing(network, 2, asked)

    assert network.retry("rain", attempt) == 7
    assert attempt.waits == [asked, asked]


def test_a_server_that_asks_for_no_wait_is_not_besieged():
    network = make(backoff_s=30.0, deadline_s=600)
    attempt = Failing(network, 5, 0.0)
    network.retry("rain", attempt)

    assert max(attempt.waits) > 1  # of five draws between 0 and 30


@pytest.mark.parametrize(("asked", "deadline_s"), [(121.0, 600.0), (1e9, 600.0), (10.0, 5.0)])
def test_a_wait_that_is_too_long_is_not_begun(asked, deadline_s):
    network = make(deadline_s=deadline_s)
    attempt = Failing(network, 9, asked)

    with pytest.raises(RemoteError, match=f"^rain: gave up after 1 attempts: it rains; it asks to wait {asked:.0f} s$"):
        network.retry("rain", attempt)
    assert attempt.waits == []


def test_repetition_ends_with_the_deadline():
    network = make(backoff_s=0.01, deadline_s=0.1)
    attempt = Failing(network, 10**6)
    network.sleep = time.sleep
    start = time.monotonic()

    with pytest.raises(RemoteError, match=r"rain: gave up after \d+ attempts: it rains$"):
        network.retry("rain", attempt)
    assert time.monotonic() - start < 0.3
    assert attempt.calls > 1


def test_other_errors_end_it_at_once():
    network = make()
    calls = []

    with pytest.raises(ZeroDivisionError):
        network.retry("rain", lambda: calls.append(1 / len(calls)))
    assert calls == []


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        (" 2.5 ", 2.5),
        ("0", 0.0),
        ("-5", None),
        ("nan", None),
        ("1e999", None),
        ("soon", None),
        ("", None),
        ("Mon, 01 Jan 2001 00:00:00 GMT", None),
        ("Fri, 31 Dec 99999999999 23:59:59 GMT", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", None),
    ],
)
def test_retry_after_is_a_number_that_makes_sense(header, seconds):
    assert retry_after(httpx2.Headers({"Retry-After": header})) == seconds


def test_retry_after_may_be_a_date(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 784_111_747.0)  # thirty seconds before the date

    assert retry_after(httpx2.Headers({"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"})) == 30.0


def test_no_header_asks_for_nothing():
    assert retry_after(httpx2.Headers()) is None


def test_offline_opens_no_connection(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket, "create_connection", fail)

    with pytest.raises(RemoteError, match=r"--offline: refused to connect to 127\.0\.0\.1"):
        get("http://127.0.0.1:9/", offline=True)
    with pytest.raises(RemoteError, match=r"^A page is not in the cache, and --offline allows no connection$"):
        make(offline=True).require_online("A page")
    make().require_online("A page")


PASSWORDS = ["https://me:hunter2@a.example/", "ftp://me:hunter2@a.example/", "https://me:hunter2@", "me:hunter2@a b:c"]
KEYS = [
    "https://a.example/?key=hunter2",
    "https://a.example/#hunter2",
    "ftp://a.example?a@hunter2",
    "a.example?hunter2",
]


@pytest.mark.parametrize(
    "address",
    ["", "a.example", "ftp://a.example/", "https://", "http://[::1", "http://a.example:99999/", *PASSWORDS, *KEYS],
)
def test_what_is_no_web_address_is_refused_without_repeating_a_password(address):
    with pytest.raises(ConfigError, match="address") as caught:
        web_address(address)
    assert "hunter2" not in str(caught.value)


def test_web_address_is_read():
    assert str(web_address("https://A.example:443/w/api.php")) == "https://a.example/w/api.php"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("", False),
    ],
)
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected


PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
    *("::1", "::", "fd00::1", "fe80::1", "fec0::1", "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378::"),
]


@pytest.mark.parametrize("host", [*PRIVATE, "2130706433", "0x7f000001", "127.1", "017700000001"])
def test_private_addresses_are_refused(host):
    with pytest.raises(UnsafeError, match="leads to the private address"):
        public_addresses(host)


@pytest.mark.parametrize("host", [PUBLIC, "2620:0:861:ed1a::1", "64:ff9b::5db8:d70e"])  # the last: NAT64 of PUBLIC
def test_public_addresses_are_returned(host):
    assert public_addresses(host) == [host]


def test_one_private_address_among_public_ones_is_one_too_many(monkeypatch):
    resolve_to(monkeypatch, PUBLIC, "10.0.0.1")

    with pytest.raises(UnsafeError, match=r"^wiki\.example leads to the private address 10\.0\.0\.1; refused$"):
        public_addresses("wiki.example")


def test_unknown_host_is_a_connection_error(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    with pytest.raises(httpx2.ConnectError, match=r"cannot resolve wiki\.example"):
        public_addresses("wiki.example")


def test_private_server_is_reached_only_if_the_user_named_it(server):
    assert get(server.url).status_code == 200
    with pytest.raises(UnsafeError, match=r"127\.0\.0\.1 leads to the private address"):
        get(server.url, trusted=False)
    assert len(server.requests) == 1


def test_connection_goes_to_the_checked_address_under_the_name_of_the_host(server, monkeypatch):
    resolve_to(monkeypatch, PUBLIC)
    meant = connect_to(monkeypatch, server.port)

    assert get("http://wiki.example/w/api.php", trusted=False).status_code == 200
    assert meant == [(PUBLIC, 80)]
    assert server.requests[0].headers["host"] == "wiki.example"


def test_second_address_is_tried_when_the_first_does_not_answer(server, monkeypatch):
    resolve_to(monkeypatch, "2620:0:861:ed1a::1", PUBLIC)
    meant = connect_to(monkeypatch, server.port, dead=("2620:0:861:ed1a::1",))

    assert get("http://wiki.example/w/api.php", trusted=False).status_code == 200
    assert meant == [("2620:0:861:ed1a::1", 80), (PUBLIC, 80)]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:9/w/api.php",
        "https://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "https://evil.example/",
        "https://en.wikipedia.org.evil.example/",
        "https://evil-wikipedia.org/",
        "http://en.wikipedia.org/w/api.php",
        "ftp://127.0.0.1/",
        "//localhost/",
    ],
)
def test_redirect_elsewhere_is_refused(server, target):
    server.always = fake.redirect(target)

    with pytest.raises(UnsafeError, match=r"^127\.0\.0\.1 redirects to [a-z]+://.*; refused$"):
        get(server.url)
    assert len(server.requests) == 1


def test_redirect_to_a_wikimedia_host_at_a_private_address_is_refused(server, monkeypatch):
    server.always = fake.redirect("https://en.wikipedia.org/w/api.php")
    resolve_to(monkeypatch, "10.0.0.1")
    meant = connect_to(monkeypatch, server.port)

    with pytest.raises(UnsafeError, match=r"^en\.wikipedia\.org leads to the private address 10\.0\.0\.1; refused$"):
        get(server.url)
    assert meant == [("127.0.0.1", server.port)]


def test_redirect_at_home_is_followed_but_not_in_a_circle(server):
    server.faults = [fake.redirect("/w/api.php?again")]
    assert get(server.url).status_code == 200

    server.always = fake.redirect("/w/api.php")
    with pytest.raises(httpx2.TooManyRedirects):
        get(server.url)
    assert len(server.requests) == 2 + 6


ZEROS = gzip.compress(bytes(10**7))  # ten thousand bytes
GZIP = {"Content-Encoding": "gzip"}


@pytest.mark.parametrize(
    "fault",
    [
        fake.body(b"x" * 1001),
        fake.body(gzip.compress(b"x" * 1001), GZIP),
        fake.body(ZEROS, GZIP),
        fake.redirect("/w/api.php", ZEROS, GZIP),
    ],
    ids=["plain", "gzip", "bomb", "bomb in a redirect"],
)
def test_long_reply_is_refused_as_soon_as_it_is_too_long(server, monkeypatch, fault):
    monkeypatch.setattr(network_module, "MAX_REPLY", 1000)
    server.faults = [fault]

    with pytest.raises(httpx2.ReadError, match="the reply is longer than 1000 bytes"):
        get(server.url)


def test_reply_of_just_the_longest_length_is_read(server, monkeypatch):
    monkeypatch.setattr(network_module, "MAX_REPLY", 1000)
    server.faults = [fake.body(b"x" * 1000), fake.body(gzip.compress(b"y" * 1000), GZIP), fake.body(b"", GZIP)]

    assert [get(server.url).content for _ in range(3)] == [b"x" * 1000, b"y" * 1000, b""]


@pytest.mark.parametrize(
    ("data", "encoding", "cause"),
    [
        (gzip.compress(b"A mill grinds.", mtime=0)[:-3], "gzip", "cut off"),
        (b"A mill grinds.", "gzip", "damaged"),
        (ZEROS, "gzip, gzip", "not asked for"),
        (b"A mill grinds.", "br", "not asked for"),
    ],
)
def test_reply_that_cannot_be_unpacked_is_an_error_of_the_server(server, data, encoding, cause):
    server.faults = [fake.body(data, {"Content-Encoding": encoding})]

    with pytest.raises(httpx2.RemoteProtocolError, match=cause):
        get(server.url)


def test_a_word_is_said_once_the_waiting_gets_long(caplog):
    network = make(backoff_s=0.001, deadline_s=600)
    attempt = Failing(network, 6, 2.0)  # waits of 2 s: the third makes it 6 s

    network.retry("rain", attempt)
    assert [record.getMessage() for record in caplog.records] == ["rain: it rains; trying again for up to 596 s"]
    assert len(attempt.waits) == 6
    network.retry("hail", Failing(network, 2, 2.0))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("deadline_s", [0.2, 5.0])
def test_a_request_within_a_repetition_ends_at_its_deadline(server, deadline_s):
    """Whether the connection is new or was kept from the request before; and the next request has its own time."""
    network = make(timeout_s=0.1 if deadline_s == 5.0 else 30.0, deadline_s=deadline_s)
    server.faults = [None, fake.drip(0.02)]
    with network.client(server.url, trusted=True) as client:
        network.retry("rain", lambda: client.get(server.url))
        began = time.monotonic()
        with pytest.raises(httpx2.ReadTimeout):
            network.retry("rain", lambda: client.get(server.url))
        assert time.monotonic() - began < 0.8
        assert client.get(server.url).status_code == 200


@pytest.mark.parametrize("fault", [fake.silence, fake.drip(0.02)], ids=["silence", "drip"])
def test_slow_reply_is_given_up(server, fault):
    server.faults = [fault]
    start = time.monotonic()

    with pytest.raises(httpx2.ReadTimeout):
        get(server.url, timeout_s=0.1)
    assert 0.05 < time.monotonic() - start < 1  # four times the timeout for a reply that drips


@pytest.mark.parametrize("named", ["HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_proxy_of_the_environment_is_used(server, monkeypatch, named, scheme):
    monkeypatch.setenv(named, f"{scheme}127.0.0.1:{server.port}")

    assert get("http://wiki.example/w/api.php").status_code == 200
    assert server.requests[0].target == "http://wiki.example/w/api.php"


def test_no_proxy_is_used_where_the_environment_says_so(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "wiki.example")
    meant = connect_to(monkeypatch, server.port)

    assert get("http://wiki.example/w/api.php").status_code == 200
    assert meant == [("wiki.example", 80)]
    assert server.requests[0].target == "/w/api.php"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_goes_to_this_machine_goes_through_no_proxy(server, monkeypatch, host):
    """A proxy would read text and key, and ask its own machine for what is on this one."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)

    assert get(server.url.replace("127.0.0.1", host)).status_code == 200
    assert server.requests[0].target == "/w/api.php"


def test_proxy_of_another_kind_is_not_passed_by_in_silence(server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:9")

    with pytest.raises(ConfigError, match="only http proxies") as caught:
        get("http://wiki.example/w/api.php")
    assert "hunter2" not in str(caught.value)
    assert server.requests == []


def test_user_agent_says_who_is_asking(server):
    get(server.url, contact="mail@a.example")

    sent = server.requests[0].headers["user-agent"]
    assert re.fullmatch(r"attention-guided-rl/\d[\w.]* \(mail@a\.example\) httpx2/\d[\w.]*", sent)
    assert server.requests[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("contact", ["Jürgen", "me\r\nX-Header: you"])
def test_contact_that_cannot_be_sent_is_refused(contact):
    with pytest.raises(ConfigError, match=r"network\.contact"):
        make(contact=contact).client("http://127.0.0.1/", trusted=True)


def test_cache_is_where_the_configuration_or_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("AGRL_CACHE", raising=False)
    assert make().cache("pages") == tmp_path / "user/attention-guided-rl/pages"
    monkeypatch.setenv("AGRL_CACHE", str(tmp_path / "own"))
    assert make().cache("pages") == tmp_path / "own/pages"
    assert make(cache=tmp_path / "named").cache("pages") == tmp_path / "named/pages"

    assert Path(tmp_path / "named").stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"network\.cache: cannot make"):
        make(cache=tmp_path / "file").cache("pages")


@pytest.mark.parametrize("fault", [fake.reset, fake.cut])
def test_connection_that_breaks_is_a_transport_error(server, fault):
    server.faults = [fault]

    with pytest.raises(httpx2.TransportError):
        get(server.url)
