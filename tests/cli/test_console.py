"""How far long work is, on standard error."""

from scmulan.cli.console import ConsoleProgress


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(capsys):
    progress = ConsoleProgress(every=0)
    with progress.bar(3_000, "steps") as advance:
        advance(1_000)
        progress.note("entity 2.500")
        advance(1_000)
        advance(1_000)
    assert capsys.readouterr().err.splitlines() == ["1,000 of 3,000 steps", "2,000 of 3,000 steps, entity 2.500"]


def test_short_work_writes_no_lines(capsys):
    with ConsoleProgress().bar(2) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err == ""
