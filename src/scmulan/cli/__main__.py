"""Entry point: run a verb, and turn whatever ends it into one line and an exit code."""

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
        0 when all went well; 1 when a check failed; 2 when something cannot be used as given; 130 after Ctrl-C.
        A defect of scmulan itself keeps its traceback.
    """
    try:
        with _ended_by_signals():
            # Imports can be interrupted like anything else, so they are in here.
            from scmulan.cli.app import run

            code = run(sys.argv[1:] if args is None else list(args))
            sys.stdout.flush()
            if code and args is None:
                # HDF5 that found no room on the disk crashes when Python frees its objects at the end.
                sys.stderr.flush()
                os._exit(code)
            return code
    except KeyboardInterrupt:
        print("scmulan: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever reads us (head, a pager) has seen enough; Python would complain while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Clean up as after Ctrl-C when a scheduler or a closed terminal ends the process."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        wanted = []  # Python lets no other thread decide about signals
    ours = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
