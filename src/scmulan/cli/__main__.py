"""Entry point: run a command and return its exit code; errors become one line."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    args
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success; 1 when a check failed; 2 when an input, output or option cannot be used; 130 after Ctrl-C.

    Raises
    ------
    Exception
        For a defect of scmulan itself, which keeps its traceback.
    """
    try:
        with _exit_on_signals():
            # Imports can be interrupted too, so they are inside.
            from scmulan.cli.app import run

            code = run(sys.argv[1:] if args is None else list(args))
            sys.stdout.flush()
            if code and args is None:
                # After a full disk HDF5 crashes when Python frees its objects at exit.
                sys.stderr.flush()
                os._exit(code)
            return code
    except KeyboardInterrupt:
        print("scmulan: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (head, a pager) has closed the pipe; Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Clean up, as after Ctrl-C, when a scheduler or a closed terminal ends the process."""

    def exit_(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python allows signal handlers in the main thread only
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, exit_)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
