"""Functions of Python that begin with an underscore though its documentation has them, or that it does not document.

Read in Python 3.11 and 3.13. `os._exit` and `sys._getframe` are documented; `atexit._run_exitfuncs` is not.
"""

from __future__ import annotations

import atexit
import os
import sys

end_process = os._exit
"""`end_process(code)`: end this process at once, without exit functions, `finally` blocks or flushed streams.

For a process whose other threads would keep or abort a Python that takes itself apart: `sys.exit` waits for them.
"""

run_exit_functions = atexit._run_exitfuncs
"""Call what was registered with `atexit`, before `end_process` leaves it out. There is no public way to call it early."""

calling_frame = sys._getframe
"""`calling_frame(depth)`: the frame `depth` calls above. `inspect.currentframe` is the same and takes no depth."""
