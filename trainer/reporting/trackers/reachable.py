"""Whether a server answers, within a few seconds whatever the network does."""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request

REQUEST_TIMEOUT_S = 4.0
"""Timeout of a request: for the connection, and again for its answer."""
TOTAL_TIMEOUT_S = 6.0
"""Seconds after which a request is given up: a name server that is out of reach can take a minute."""
SERVER_DOWN_HTTP_CODES = (502, 503, 504)
"""HTTP codes of a gateway whose server is down."""


def unreachable_reason(address: str) -> str | None:
    """Find out, before a tracker's client tries for minutes, whether a server answers at an http(s) address.

    Returns why not, such as "Connection refused"; None if somebody answers, whatever the answer. Returns after
    `TOTAL_TIMEOUT_S` at the latest: the request is made in a thread, since the look-up of a name has no timeout.
    """
    reason: str | None = f"no answer within {TOTAL_TIMEOUT_S:.0f} s"  # unless the thread finds out otherwise in time

    def request_in_thread() -> None:
        nonlocal reason
        reason = _failure_of_request(address)

    thread = threading.Thread(target=request_in_thread, name="reach", daemon=True)
    thread.start()
    thread.join(TOTAL_TIMEOUT_S)
    return reason


def _failure_of_request(url: str) -> str | None:
    """Why a HEAD request to the URL gets no answer; None if it gets one. A gateway's answer that its server is down is none."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code in SERVER_DOWN_HTTP_CODES else None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return None  # a certificate was shown: somebody is there, and the tracker may know whom to trust
        return _failure_reason(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _failure_reason(error)


def _failure_reason(error: BaseException | str) -> str:
    """Why a request failed, in a few words, such as `Connection refused`."""
    if isinstance(error, TimeoutError):
        return f"no answer within {REQUEST_TIMEOUT_S:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
