"""Progress for people: a bar with an estimate on a terminal, a line now and then in a log."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line that nobody has to act on; brackets in it are text."""
    console.print(f"note: {text}", markup=False)


class Bar:
    """A progress bar over `total` updates; silent unless `show`."""

    def __init__(self, title: str, total: int, done: int = 0, *, show: bool = True) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not show,
            transient=not console.is_terminal,
        )
        self._show = show
        self.done = done
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> int:
        """Count `count` more; returns how many are done."""
        self.done += count
        self._progress.update(self._task, completed=self.done)
        return self.done

    def note(self, text: str) -> None:
        """A few words beside the bar."""
        self._progress.update(self._task, note=text)

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._show:
            self._progress.console.print(text)


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop at the next good place.

    A second one stops at once. Works in the main thread only; elsewhere it does nothing.
    """

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self.requested = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                return self
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self.show:
            console.print("stopping: saving the state of the epoch's start (once more: at once)")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
