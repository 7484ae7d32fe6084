"""forkring: a gRPC server whose requests are worked on by processes, over lock-free rings in shared memory.

    # app.py
    def handle(item):
        return hashlib.sha256(item.payload).digest()

    $ forkring serve app:handle --workers 4

`forkring.Client` and `forkring.aio.Client` talk to such a server; `forkring.Work` is an item with more than a payload, and
`forkring.Error` what they raise. They need grpcio and protobuf, which are the wheel's extra `client`.
"""

from __future__ import annotations

# Before all else: see there.
import forkring._interrupts  # isort: skip

import importlib
from typing import TYPE_CHECKING, Any

from forkring._codes import Code
from forkring._core import Item, Payload, Reply, __version__, late_views
from forkring._errors import Abort
from forkring._forms import batch, concurrency
from forkring._serve import serve

# Not the clients: a program that imports all of this must not need grpcio.
__all__ = ["Abort", "Code", "Item", "Payload", "Reply", "batch", "concurrency", "late_views", "serve"]

if TYPE_CHECKING:
    from forkring import aio as aio
    from forkring import client as client
    from forkring.client import Client as Client
    from forkring.client import Error as Error
    from forkring.client import Work as Work
else:
    # Handlers' processes never ask for these, and so load nothing of gRPC.
    _FROM_CLIENT = ("Client", "Error", "Work")
    _MODULES = ("aio", "client")

    def __getattr__(name: str) -> Any:
        if name in _FROM_CLIENT:
            return getattr(importlib.import_module("forkring.client"), name)
        if name in _MODULES:
            return importlib.import_module(f"forkring.{name}")
        raise AttributeError(f"module 'forkring' has no attribute {name!r}")

    def __dir__() -> list[str]:
        # Names whose import would fail are left out, because `help` and `inspect` ask for every name in the list.
        extra = importlib.import_module("forkring._extra")
        clients = (*_FROM_CLIENT, *_MODULES) if extra.is_installed() else ()
        special = (name for name in globals() if name.startswith("__"))
        return sorted({*__all__, *clients, *special})
