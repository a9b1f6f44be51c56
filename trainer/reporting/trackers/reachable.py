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


def unreachable(address: str) -> str | None:
    """Why nobody answers at an http(s) address; None where somebody does, whatever the answer."""
    answer = [f"no answer within {LIMIT_S:.0f} s"]

    def ask() -> None:
        answer[0] = _ask(address)

    thread = threading.Thread(target=ask, name="reach", daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return answer[0] or None


def _ask(address: str) -> str:
    """Why nobody answers; empty if somebody does."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code in DOWN else ""
    except urllib.error.URLError as error:
        # A certificate was shown: somebody is there, and the tracker may know whom to trust.
        return "" if isinstance(error.reason, ssl.SSLError) else _words(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _words(error)


def _words(error: BaseException | str) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_S:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
