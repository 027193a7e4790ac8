import io

from rich.console import Console

from vitds.progress import ConsoleWatcher, Watcher


def test_a_terminal_shows_rate_and_total_and_lines_stay():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with ConsoleWatcher(console) as watcher:
        watcher.begin("train", 100, done=40)
        watcher.advance("train", 60)
        watcher.say("something to know")
    shown = stream.getvalue()
    assert "something to know" in shown and "100/100" in shown and "images/s" in shown


def test_without_a_terminal_nothing_but_lines_is_written_and_nobody_needs_to_watch():
    stream = io.StringIO()
    with ConsoleWatcher(Console(file=stream, width=100)) as watcher:
        for told in (watcher, Watcher()):
            told.begin("val", 10, unit="shards")
            told.advance("val", 10)
            told.say("done")
    assert stream.getvalue() == "done\n"
