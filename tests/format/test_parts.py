"""Limits of the small parts that files are made with."""

import os

import pytest

from diffq.errors import FormatError
from diffq.format import chunks, threads, wire
from tests.format.craft import leb


@pytest.mark.parametrize("number", [0, 1, 127, 128, 2**14, 2**62, 2**63 - 1])
def test_varints(number):
    """Varints are written in their shortest form and read back."""
    assert wire.varint(number) == leb(number)
    cursor = wire.Cursor(leb(number), "here")
    assert cursor.varint("a number") == number
    cursor.end()


@pytest.mark.parametrize("number", [-1, 2**63])
def test_numbers_that_no_varint_holds(number):
    """Numbers below 0 or above 63 bits are not written."""
    with pytest.raises(FormatError, match=f"got {number}"):
        wire.varint(number)


def test_text_that_no_reader_takes():
    """An index or metadata of more than 2**26 bytes is not written."""
    with pytest.raises(FormatError, match="at most 67108864 bytes, got 67108865"):
        chunks.text_body(bytes(chunks.MAX_TEXT + 1))


@pytest.mark.parametrize("cores", [None, 1, 3, 64])
def test_threads_without_affinity(cores, monkeypatch):
    """Where the operating system tells no affinity, its number of cores is used, 8 at most."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert threads.in_threads(abs, list(range(-20, 0)), None) == list(range(20, 0, -1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_first_error_is_raised(count):
    """With any number of threads, the error of the first task that fails is raised."""

    def fail(task):
        if task > 2:
            raise FormatError(f"task {task}")
        return task

    with pytest.raises(FormatError, match="task 3"):
        threads.in_threads(fail, [0, 1, 2, 3, 4, 5], count)
