"""A file that cannot be read, or a place: a bad file is data to leave out, a disk that is away is none.

A read that fails is looked at again with plain system calls: are the folder and the bytes of the file there? Where they
are not, the place is waited for; where they are, the file itself is bad.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

import av

T = TypeVar("T")
# What a network file system, a pulled disk or an exhausted process answers; a damaged video is none of these.
PLACE_ERRORS = {
    getattr(errno, name)
    for name in (
        "EIO ESTALE ENODEV ENXIO ETIMEDOUT ENOTCONN EREMOTEIO EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ECONNRESET "
        "ECONNABORTED ECONNREFUSED ESHUTDOWN EMFILE ENFILE ENOMEM"
    ).split()
    if hasattr(errno, name)
}
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between looks


class Outage(RuntimeError):
    """A place that should hold videos cannot be read now; the message says which, and what the system answers."""


def find_outage(path: str | os.PathLike, error: BaseException) -> Outage | None:
    """The place's fault in `error`, a failed reading of the file at `path`; None when it is the file's own."""
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        # FFmpeg says EIO of some damaged files as well; what reading the bytes says decides on that.
        if number in PLACE_ERRORS and not (number == errno.EIO and isinstance(cause, av.FFmpegError)):
            return Outage(f"{os.fspath(path)}: {os.strerror(number)}")
        cause = cause.__cause__
    return look(path)


def look(path: str | os.PathLike) -> Outage | None:
    """What is wrong with the place of a file that was there: its folder, or reading any byte of it."""
    path = os.path.realpath(path)  # the folder that counts is that of the file itself, not of a link to it
    folder = os.path.dirname(path)
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is None:
                return Outage(f"{folder}: the folder is empty")  # what is left where a file system was mounted
        try:
            os.stat(path)
        except PermissionError:  # a folder that may be listed but not entered; the file's own permissions do not matter
            return Outage(f"{folder}: its files may not be read")
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        if error.filename == folder or error.errno in PLACE_ERRORS:
            return Outage(f"{error.filename or path}: {error.strerror}")
    return None


def patiently(read: Callable[[], T], failed: Callable[[T], bool], minutes: float, beat: Callable[[Outage], None]) -> T:
    """What `read` gives, called again for as long as it raises Outage; raises that once `minutes` of it have passed.

    What `failed` is read a second time: a place that was away for a moment has come back before anyone could look.
    beat: called while waiting, every two seconds at least.
    """
    twice, since, pause = False, time.monotonic(), FIRST_PAUSE
    while True:
        try:
            found = read()
        except Outage as outage:
            if time.monotonic() - since > 60 * minutes:
                raise
            beat(outage)
            time.sleep(pause)
            twice, pause = False, min(2 * pause, LONGEST_PAUSE)
            continue
        if twice or not failed(found):
            return found
        twice, since, pause = True, time.monotonic(), FIRST_PAUSE
