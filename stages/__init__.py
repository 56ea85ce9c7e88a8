"""The stages. This comes before all other imports of a process that is one, so that Ctrl-C ends it with one line.

torch alone takes seconds to import, and a KeyboardInterrupt there would print what nobody can read.
"""

import os
import signal
import sys

STARTING = b"tiffin: stopped by Ctrl-C while it was starting: nothing has changed, the same command starts again\n"


def _stop(number: int, frame: object) -> None:
    """Say so, unless the command line that started this process does, or another rank; then end at once."""
    if "TIFFIN_COMMAND" in os.environ:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, STARTING)
    os._exit(130)


# of `python -m stages...` (whose name is not known yet) and `tiffin`, and not where a background job ignores it
_ours = sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "tiffin"
if _ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # launcher.run starts its children with it blocked
