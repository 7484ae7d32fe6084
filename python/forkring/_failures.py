"""Logs each distinct start-up failure of a pool's workers once.

The server starts a worker that cannot start again and again, each time as a new process. What they share is a file in memory
whose descriptor `FORKRING_WORKER_FAILURES` names. It has the digest of what the last of them said, and how many said it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Optional

VARIABLE = "FORKRING_WORKER_FAILURES"
# More than a record has.
_LONGEST = 4096
# Where in memory an object is differs from process to process, and its default `repr` says so.
_ADDRESS = re.compile("0x[0-9a-f]{6,}")


class Failures:
    """The memory of a pool's failures to start, if there is one."""

    def __init__(self) -> None:
        """Takes what the server has left for it, so that no program that is started from now on inherits it."""
        self._file: Optional[int] = None
        number = os.environ.pop(VARIABLE, "")
        if number.isdecimal() and int(number) > 2:
            try:
                os.set_inheritable(int(number), False)
                self._file = int(number)
            except OSError:
                # It was set by something else than a server.
                pass

    def told(self, text: str) -> str:
        """Notes a failure, and returns what to say of it: the text, or how often it was said before."""
        if self._file is None:
            return text
        digest = hashlib.sha256(_ADDRESS.sub("0x", text).encode("utf-8", "backslashreplace")).hexdigest()
        try:
            with self._locked():
                before, count = self._record()
                count = count + 1 if before == digest else 1
                self._write(json.dumps([digest, count]).encode())
        except OSError:
            return text
        if count == 1:
            return text
        return f"forkring: the same error as before, {count} times now: {text.rstrip().splitlines()[-1]}"

    def forget(self) -> None:
        """Notes that a worker has started: the next failure is news."""
        if self._file is not None:
            try:
                with self._locked():
                    self._write(b"")
            except OSError:
                pass

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps the other workers of the pool from the record. The kernel also unlocks it when the process ends."""
        assert self._file is not None
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _record(self) -> tuple[str, int]:
        assert self._file is not None
        try:
            digest, count = json.loads(os.pread(self._file, _LONGEST, 0))
            return str(digest), int(count)
        except (ValueError, TypeError):
            # There is none, or a worker died while it wrote it.
            return "", 0

    def _write(self, record: bytes) -> None:
        assert self._file is not None
        # Not by the file's position, which is one for all processes.
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, record, 0)
