"""One HTTP POST whose whole answer has a time limit, through `requests`. Used by the chat client.

`requests` limits each read from the socket, so a server that sends a byte now and then would hold a call for hours. Here every
read gets what is left of the call's own limit: status line, headers, chunks and body together.
"""
import email.utils
import http.client
import io
import re
import time

import requests
import urllib3

MAX_BODY = 16 << 20  # bytes; a chat completion is a few kB


class _Limited(io.RawIOBase):
    """What a socket receives until `seconds` have passed."""

    def __init__(self, sock, raw, seconds):
        self.sock, self.raw = sock, raw
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer takes too long")
            self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer to be read within the time-out that the socket has when the waiting for it begins."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Limited(sock, self.fp.detach(), sock.gettimeout()))


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(requests.adapters.HTTPAdapter):
    POOLS = {"http": _Pool, "https": _SecurePool}

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self.POOLS

    def proxy_manager_for(self, *args, **kwargs):
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self.POOLS
        return manager


def open_session(key=None):
    """A requests.Session for one thread; `key` goes into the Authorization header only, None sends no such header."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter())

    def authorize(prepared):  # a callable also keeps requests from putting a .netrc entry in its place
        if key is not None:
            prepared.headers["Authorization"] = f"Bearer {key}"
        return prepared
    session.auth = authorize
    session.headers.update({"User-Agent": "eimf", "Accept": "application/json"})
    return session


def post(session, url, body, connect_timeout, timeout):
    """(status, headers, body bytes) of a JSON POST. Redirects are not followed.

    connect_timeout, timeout: seconds, the latter from the end of the request to the end of the answer. Raises
    requests.RequestException; a ReadTimeout when the answer takes longer.
    """
    with session.post(url, json=body, timeout=(connect_timeout, timeout), stream=True, allow_redirects=False) as response:
        chunks, size = [], 0
        try:
            while chunk := response.raw.read1(1 << 16, decode_content=True):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BODY:
                    raise requests.ConnectionError("answer larger than 16 MiB")
        except requests.RequestException:
            raise
        except Exception as error:  # urllib3's own types: read time-out, reset, incomplete read, bad encoding
            if "timeout" in type(error).__name__.lower():
                raise requests.ReadTimeout(type(error).__name__) from None
            raise requests.ConnectionError(type(error).__name__) from None
        return response.status_code, response.headers, b"".join(chunks)


def fault(error):
    """A requests.RequestException in words, without its text, which may quote the request."""
    names = {requests.ConnectTimeout: "connecting timed out", requests.ReadTimeout: "no complete answer in time",
             requests.exceptions.SSLError: "TLS failed", requests.exceptions.ProxyError: "the proxy failed"}
    inner = error.args[0] if error.args else ""
    plain = isinstance(inner, str) and re.fullmatch(r"[\w ]{3,40}", inner)
    detail = inner if plain else type(getattr(inner, "reason", inner)).__name__
    return names.get(type(error), f"connection failed ({detail})")


def retry_after(headers):
    """Seconds that a Retry-After header asks for (a number or an HTTP date), or None."""
    value = headers.get("Retry-After")
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if value is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
