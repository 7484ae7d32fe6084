"""forkring: a gRPC server whose requests are worked on by processes, over lock-free rings in shared memory.

    # app.py
    def handle(item):
        return hashlib.sha256(item.payload).digest()

    $ forkring serve app:handle --workers 4
"""

from forkring._codes import Code
from forkring._core import Item, Payload, Reply, late_views
from forkring._errors import Abort
from forkring._serve import serve

__all__ = ["Abort", "Code", "Item", "Payload", "Reply", "late_views", "serve"]
