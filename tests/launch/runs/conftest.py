"""Real runs, started as users start them, and directories as runs leave them."""

from tests.faults.conftest import runs, site  # noqa: F401 - fixtures
