"""Whether a server answers, within a few seconds whatever the network does."""

from __future__ import annotations

import http.client
import ssl
import threading
import urllib.error
import urllib.request

ANSWER_S = 4.0
"""Seconds for a connection, and again for its answer."""
LIMIT_S = 6.0
"""Seconds after which nobody waits any longer: a name server that is out of reach can take a minute."""
DOWN = (502, 503, 504)
"""HTTP codes of a gateway whose server is down."""


def unreachable_reason(address: str) -> str | None:
    """Why nobody answers at an http(s) address; None if somebody does, whatever the answer.

    Returns after `LIMIT_S` at the latest: the request is made in a thread, since looking up a name has no timeout of its own.
    """
    problem: list[str | None] = [f"no answer within {LIMIT_S:.0f} s"]

    def request_in_thread() -> None:
        problem[0] = _request_problem(address)

    thread = threading.Thread(target=request_in_thread, name="reach", daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return problem[0]


def _request_problem(address: str) -> str | None:
    """Why a HEAD request to the address gets no answer; None if it gets one."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code in DOWN else None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return None  # a certificate was shown: somebody is there, and the tracker may know whom to trust
        return _error_text(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _error_text(error)


def _error_text(error: BaseException | str) -> str:
    """The reason of a failed request, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_S:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
