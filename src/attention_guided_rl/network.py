"""Network: the rules for what leaves this machine, and the folder that keeps what came back.

In: NetworkConfig. Out: HTTP clients that refuse private addresses and endless replies, and repetition with a deadline.
What a user names (a server on this machine, say) is trusted; an address that came from elsewhere is not.
"""

import email.utils
import functools
import ipaddress
import logging
import math
import os
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import tenacity

from attention_guided_rl.config import NetworkConfig
from attention_guided_rl.errors import ConfigError, RemoteError, StorageError, UnsafeError

MAX_REPLY = 2**26  # bytes, unpacked
MAX_RETRY_AFTER = 120.0  # seconds; a server that asks for more is as good as closed
MAX_BACKOFF = 30.0  # seconds between repetitions
CONNECT_TIMEOUT = 5.0  # seconds
SILENCES = 4  # a reply may take this many times the longest silence
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # variables of the environment
QUIET_WAIT = 5.0  # seconds of waiting before a word is said about it
WIKIMEDIA = (
    *("wikipedia.org", "wikimedia.org", "wikibooks.org", "wikinews.org", "wikiquote.org", "wikisource.org"),
    *("wikiversity.org", "wikivoyage.org", "wiktionary.org", "wikidata.org", "mediawiki.org"),
)

_PIECE = 2**16  # bytes unpacked at once
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96")))  # they end in an IPv4 address
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Transient(Exception):
    """A failure that may pass. `retry_after`: seconds to wait, if the server said so."""

    def __init__(self, cause: str, retry_after: float | None = None) -> None:
        super().__init__(cause)
        self.retry_after = retry_after


class Network:
    """What corpora and embedders are lent for reaching other machines."""

    def __init__(
        self, config: NetworkConfig, *, account: str = "untitled", goes_on: bool = False, private_text: bool = False
    ) -> None:
        self.config = config
        self.account = account
        """Under which spending is added up; every run has its own."""
        self.goes_on = goes_on
        """Whether the run was begun before, so that the cache must know what it has spent."""
        self.private_text = private_text
        """Whether the articles are files of this machine, which may be nobody else's business."""
        self.sleep: Callable[[float], None] = time.sleep
        self.until = math.inf
        """When a request that `retry` has begun must be over, whatever it has read by then (time.monotonic)."""

    def cache(self, name: str) -> Path:
        """Return the path of a file or folder in the cache; the cache is readable by this user only."""
        root = self.config.cache or Path(
            os.environ.get("AGRL_CACHE")
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "attention-guided-rl")
        )
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"network.cache: cannot make {root}: {error.strerror}") from error
        return root / name

    def require_online(self, what: str) -> None:
        """Raise RemoteError if connections are not allowed."""
        if self.config.offline:
            raise RemoteError(f"{what} is not in the cache, and --offline allows no connection")

    def client(self, address: str, *, trusted: bool, redirects_to: tuple[str, ...] = WIKIMEDIA) -> httpx2.Client:
        """Return a client for one service.

        `trusted`: the user has named this address, so it may be private. Any other address that a redirect leads to
        must be an https page in one of the domains `redirects_to` and resolve to public addresses.
        """
        home = web_address(address)
        return httpx2.Client(
            transport=_GuardedTransport(home, trusted, redirects_to, self),
            headers={"User-Agent": self._user_agent(), "Accept-Encoding": "gzip"},
            timeout=httpx2.Timeout(self.config.timeout_s, connect=CONNECT_TIMEOUT),
            follow_redirects=True,
            max_redirects=5,
        )

    def retry(self, service: str, attempt: Callable[[], Result]) -> Result:
        """Call `attempt` until it raises no Transient, with growing random waits. Says so if it takes long.

        Raises:
            RemoteError: the deadline would pass before the next repetition; names the service and the last cause.
        """
        backoff = tenacity.wait_random_exponential(multiplier=self.config.backoff_s, max=MAX_BACKOFF)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            named = error.retry_after if isinstance(error, Transient) else None
            return max(named or 0.0, backoff(state))  # some servers ask for 0 seconds, again and again

        said = False

        def say_what_is_waited_for(state: tenacity.RetryCallState) -> None:
            nonlocal said
            waited = max(
                state.idle_for, (state.seconds_since_start or 0.0) + state.upcoming_sleep
            )  # this wait included
            if not said and waited >= QUIET_WAIT:
                said = True
                cause = state.outcome.exception() if state.outcome else None
                left = self.config.deadline_s - waited + state.upcoming_sleep
                logger.warning("%s: %s; trying again for up to %.0f s", service, cause, left)

        stop_early = tenacity.stop_before_delay(self.config.deadline_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=wait,
            stop=lambda state: stop_early(state) or state.upcoming_sleep > MAX_RETRY_AFTER,
            before_sleep=say_what_is_waited_for,
            sleep=lambda seconds: self.sleep(seconds),
        )
        self.until = time.monotonic() + self.config.deadline_s
        try:
            return retrying(attempt)
        except tenacity.RetryError as error:
            last, tries = error.last_attempt.exception(), error.last_attempt.attempt_number
            asked = getattr(last, "retry_after", None)
            asked = f"; it asks to wait {asked:.0f} s" if asked else ""
            raise RemoteError(f"{service}: gave up after {tries} attempts: {last}{asked}") from last
        finally:
            self.until = math.inf

    def _user_agent(self) -> str:
        contact = self.config.contact or "set network.contact to say who you are"
        if not (contact.isascii() and contact.isprintable()):
            raise ConfigError(f"network.contact must be one line of plain ASCII, got {contact!r}")
        versions = (metadata.version("attention-guided-rl"), metadata.version("httpx2"))
        return f"attention-guided-rl/{versions[0]} ({contact}) httpx2/{versions[1]}"


def web_address(address: str) -> httpx2.URL:
    """Return a checked http or https address.

    Raises:
        ConfigError: it is none, or holds what may be a password or a key (which would end in files and messages).
    """
    shown = "one with '@', '?' or '#'" if set("@?#") & set(address) else repr(address[:100])
    try:
        url = httpx2.URL(address)
    except httpx2.InvalidURL:
        raise ConfigError(f"not a web address: {shown}") from None
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 443) < 2**16:
        raise ConfigError(f"not a web address: {shown}; it begins with https://")
    if url.userinfo:
        raise ConfigError(f"the address of {url.host} holds a user name or password; remove it")
    if "?" in address or "#" in address:
        raise ConfigError(f"the address of {url.host} has more behind a '?' or '#', which may be a key; remove it")
    return url


def is_loopback(host: str) -> bool:
    """Return whether a host name can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def public_addresses(host: str) -> list[str]:
    """Resolve a host name.

    Raises:
        UnsafeError: one of its addresses is of this machine or a private network.
        httpx2.ConnectError: there is no such host.
    """
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise httpx2.ConnectError(f"cannot resolve {host}: {error}") from error
    for address in found:
        if not _is_public(address):
            raise UnsafeError(f"{host} leads to the private address {address}; refused")
    return found


def retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds that a reply asks to wait (a number or a date), or None where it makes no sense."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


@functools.cache
def _certificates(*_where: str | None) -> ssl.SSLContext:
    """Return what TLS trusts, read once for each place where the environment says it is: that takes 20 ms."""
    return httpx2.create_ssl_context(trust_env=True)


class _GuardedTransport(httpx2.BaseTransport):
    """Opens a connection only where it may go, to the very address that was checked, and never waits for ever."""

    def __init__(self, home: httpx2.URL, trusted: bool, redirects_to: tuple[str, ...], network: Network) -> None:
        self._home, self._trusted, self._redirects_to, self._network = home, trusted, redirects_to, network
        self._until = math.inf
        self._direct = httpx2.HTTPTransport(verify=_certificates(*map(os.environ.get, CERTIFICATES)))
        self._proxies = _proxies()
        self._proxied: dict[str, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if self._network.config.offline:
            raise RemoteError(f"--offline: refused to connect to {url.host}")
        at_home = (url.scheme, url.host, url.port) == (self._home.scheme, self._home.host, self._home.port)
        if not at_home and not (url.scheme == "https" and _ends_in(url.host, self._redirects_to)):
            raise UnsafeError(f"{self._home.host} redirects to {url.scheme}://{url.host}; refused")
        self._until = min(time.monotonic() + SILENCES * self._network.config.timeout_s, self._network.until)
        request.extensions = {**request.extensions, "trace": self._bound}
        response = self._send(request, check=not (at_home and self._trusted))
        encoding = response.headers.pop("content-encoding", "").lower() or "identity"
        if encoding not in ("identity", "gzip"):  # not asked for; nested ones can unpack a thousandfold each
            response.close()
            raise httpx2.RemoteProtocolError("the reply is in an encoding that was not asked for")
        kind = response.headers.get("content-type", "").partition(";")[0]
        response.headers["content-type"] = kind  # JSON is UTF-8; "charset=bz2" would have the text unpacked, or fail
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = _BoundedStream(response.stream, gzipped=encoding == "gzip")
        return response

    def _bound(self, event: str, info: Mapping[str, Any]) -> None:
        """Bound all that is read from and written to a new connection by the time that its request has left.

        The client's own timeouts are for each read: a reply that comes byte by byte would never exceed them.
        """
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            stream = info["return_value"]
            stream.read, stream.write = self._in_time(stream.read), self._in_time(stream.write)

    def _in_time(self, transfer: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(what: int | bytes, timeout: float | None = None) -> Any:
            left = self._until - time.monotonic()
            if left <= 0:
                raise httpx2.ReadTimeout("the reply comes too slowly")
            return transfer(what, left if timeout is None else min(timeout, left))

        return bounded

    def _send(self, request: httpx2.Request, *, check: bool) -> httpx2.Response:
        url = request.url
        goes_out = not is_loopback(url.host)  # a proxy would take it for its own machine, and read text and key
        if goes_out and url.scheme in self._proxies and not urllib.request.proxy_bypass(url.host):
            return self._proxy(url.scheme).handle_request(request)  # which resolves the name itself
        if not check:
            return self._direct.handle_request(request)
        addresses = public_addresses(url.host)
        for address in addresses:
            pinned = httpx2.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,  # Host included
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
            try:
                return self._direct.handle_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
        raise httpx2.ConnectError(f"{url.host} has no address")

    def _proxy(self, scheme: str) -> httpx2.HTTPTransport:
        if scheme not in self._proxied:
            address = self._proxies[scheme]
            if not address.startswith(("http://", "https://")):  # to pass it by might tell who is asking
                raise ConfigError(f"{scheme.upper()}_PROXY or ALL_PROXY: only http proxies are supported; name one")
            self._proxied[scheme] = httpx2.HTTPTransport(proxy=address)
        return self._proxied[scheme]

    def close(self) -> None:
        for transport in (self._direct, *self._proxied.values()):
            transport.close()


class _BoundedStream(httpx2.SyncByteStream):
    """The body of a reply, unpacked here; refused when it is too long or cut off."""

    def __init__(self, stream: httpx2.SyncByteStream, *, gzipped: bool) -> None:
        self._stream, self._gzipped = stream, gzipped

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in _unpacked(self._stream) if self._gzipped else self._stream:
            size += len(piece)
            if size > MAX_REPLY:
                raise httpx2.ReadError(f"the reply is longer than {MAX_REPLY} bytes")
            yield piece

    def close(self) -> None:
        self._stream.close()


def _unpacked(stream: httpx2.SyncByteStream) -> Iterator[bytes]:
    """Unpack gzip in small pieces: a few bytes of it can hold a thousand times as many."""
    gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    packed = b""
    try:
        for packed in stream:
            yield gzip.decompress(packed, _PIECE)
            while gzip.unconsumed_tail:
                yield gzip.decompress(gzip.unconsumed_tail, _PIECE)
    except zlib.error as error:
        raise httpx2.RemoteProtocolError(f"the reply is damaged: {error}") from error
    if packed and not gzip.eof:
        raise httpx2.RemoteProtocolError("the reply is cut off")


def _proxies() -> dict[str, str]:
    """Return the proxy of each scheme that the environment names one for."""
    named = urllib.request.getproxies()
    proxies = {scheme: named.get(scheme) or named.get("all") or "" for scheme in ("http", "https")}
    return {scheme: proxy if "://" in proxy else f"http://{proxy}" for scheme, proxy in proxies.items() if proxy}


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        inner += [ip.ipv4_mapped, ip.sixtofour]
        inner += [ipaddress.IPv4Address(int(ip) % 2**32) for network in _EMBEDDING if ip in network]
        if ip.is_site_local or ip in _LOCAL_NAT64:
            return False
    return all(one.is_global and not one.is_multicast for one in inner if one is not None)


def _ends_in(host: str, domains: tuple[str, ...]) -> bool:
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)
