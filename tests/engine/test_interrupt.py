"""Every signal that asks for a stop, when it takes effect, and the handlers afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from fastbyol.cli import main
from fastbyol.engine import interrupt as module
from fastbyol.engine.interrupt import SIGNALS, Ended, Interrupt, Stopped, behind


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_once_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        send(number)
        assert interrupt.requested == number.name
        send(signal.SIGTERM)
        assert interrupt.requested == number.name
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_only_a_second_ctrl_c_breaks_off_a_step() -> None:
    with Interrupt() as interrupt:
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGHUP)
        send(signal.SIGHUP)
        assert interrupt.requested == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """Under nohup; the other signals take effect."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with module.ending(), Interrupt() as interrupt:
        send(signal.SIGHUP)
        assert interrupt.requested is None
        send(signal.SIGXCPU)
        assert interrupt.requested == "SIGXCPU"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [number for number in SIGNALS if number != signal.SIGINT])
def test_what_would_end_the_process_at_once_lets_it_clean_up(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the shell's SIGHUP comes on the heels of the terminal's, and must not break off the
    cleaning up.
    """
    monkeypatch.setattr(module, "SAME_S", 600.0)  # however slow the machine is
    done = []
    with pytest.raises(Ended) as caught, module.ending():  # noqa: PT012
        try:
            send(number)
        finally:
            send(number)
            send(signal.SIGHUP)
            done.append("cleaned up")
    assert caught.value.number == number
    assert done == ["cleaned up"]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_one_that_a_finalizer_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(module, "SAME_S", 0.05)
    with pytest.raises(Ended, match="SIGTERM"), module.ending():  # noqa: PT012
        Finalizer()
        time.sleep(100 * module.AGAIN_S)


def test_what_can_be_done_again_is_left_at_once() -> None:
    done = []
    with Interrupt() as interrupt:
        with interrupt.abortable():
            done.append("whole")
        with pytest.raises(Stopped), interrupt.abortable():
            done.extend(["begun", send(signal.SIGTERM), "not reached"])
        with pytest.raises(Stopped), interrupt.abortable():
            done.append("not begun")
    assert done == ["whole"]


class Finalizer:
    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


def test_a_request_that_a_finalizer_swallows_is_raised_at_the_end() -> None:
    with Interrupt() as interrupt, pytest.raises(Stopped), interrupt.abortable():
        Finalizer()


def test_a_request_that_compiled_code_turns_into_another_error_is_still_one() -> None:
    """torch made "could not determine the shape" of one that came while it read a checkpoint."""
    with Interrupt() as interrupt, pytest.raises(Stopped, match="SIGTERM"), interrupt.abortable():  # noqa: PT012
        try:
            send(signal.SIGTERM)
        except Stopped:
            raise ValueError("could not determine the shape") from None
    with Interrupt() as interrupt, pytest.raises(ValueError, match="wrong"), interrupt.abortable():
        raise ValueError("wrong")


def test_outside_the_abortable_part_a_request_waits() -> None:
    with Interrupt() as interrupt:
        with interrupt.abortable():
            pass
        send(signal.SIGINT)
        assert interrupt.requested == "SIGINT"


def swallow_one_and_wait() -> None:
    Finalizer(signal.SIGINT)
    time.sleep(100 * module.AGAIN_S)


def test_ctrl_c_that_a_finalizer_swallows_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), module.sent_again():
        swallow_one_and_wait()
    monkeypatch.setattr(module, "AGAIN_S", 60.0)
    with module.sent_again():
        Finalizer(signal.SIGINT)
    # What was swallowed at the very end is let go.
    for timer in (
        thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)
    ):
        timer.join(10.0)
        assert not timer.is_alive()
    assert capsys.readouterr().err == ""


def test_an_import_error_after_ctrl_c_is_recognised() -> None:
    """A compiled module that is interrupted while it is imported says ImportError, "initialization
    failed".
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(ImportError) as caught:  # noqa: PT012
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt as interrupted:
            raise ImportError("initialization failed") from interrupted
    assert behind(caught.value)
    assert not behind(ImportError("no such module"))


def test_the_command_line_ends_for_it_as_for_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**options: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as reason:
            raise ImportError("initialization failed") from reason

    monkeypatch.setattr(main, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fastbyol: error: interrupted\n"
