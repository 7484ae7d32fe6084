from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, final

from typing_extensions import Buffer

__all__ = [
    "Item",
    "Nursery",
    "Payload",
    "Reply",
    "Worker",
    "__version__",
    "descriptor_set",
    "inherit",
    "late_views",
    "main",
    "run",
]

__version__: str

@final
class Payload(Buffer):
    """What a client sent: read-only bytes for whatever takes a buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def __getitem__(self, index: int | slice, /) -> Any: ...

@final
class Reply(Buffer):
    """Where a handler writes its result in place: writable bytes for whatever takes a buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...

@final
class Item:
    """One unit of work."""

    @property
    def id(self) -> int:
        """The id that the client gave the item."""
    @property
    def attempt(self) -> int:
        """1 unless earlier workers died of it."""
    @property
    def deadline(self) -> float | None:
        """When it expires, on the clock of `time.monotonic()`; None: never."""
    @property
    def pool(self) -> str:
        """The name of the worker's pool."""
    @property
    def payload(self) -> Payload:
        """What the client sent."""
    @property
    def metadata(self) -> dict[str, str]:
        """What the client sent beside the payload."""
    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the result any more. A handler that takes long does well to ask now and then."""
    def remaining(self) -> float | None:
        """How many seconds are left until the deadline; None: as many as it takes."""
    def numpy(self, dtype: Any = None, shape: int | Sequence[int] | None = None) -> Any:
        """The payload as a read-only NumPy array, with no copy. Of bytes, unless `dtype` says otherwise."""
    def reply(self, nbytes: int) -> Reply:
        """Memory for a result of so many bytes, all zero.

        It, or a view of it, or None for all of it, is what the handler then returns, and is sent with no copy.
        """

@final
class Nursery:
    """What the server wants of a process that has imported an app and forks its workers."""

    def __init__(self) -> None: ...
    def ready(self) -> None: ...
    def wait(self) -> None: ...
    def born(self, pid: int) -> bool: ...
    def stillborn(self, why: str) -> None: ...
    def settle_in(self) -> list[tuple[str, str]]: ...
    def hand_over(self) -> None: ...

def descriptor_set() -> bytes:
    """The compiled protos with all that they import: a serialised `google.protobuf.FileDescriptorSet`."""

def late_views() -> int:
    """How many payloads of this worker were kept after their handlers had returned."""

def inherit() -> None: ...
def main(arguments: Sequence[str], interpreter: str | PathLike[str], *starts: str) -> int: ...
def run(
    handler: Callable[[Item], Any], yields: bool, describe: Callable[[BaseException], tuple[int, str, str, str]]
) -> None: ...

@final
class Worker:
    """This process as a worker of the server that started it, with many items open at once."""

    def __new__(cls) -> Worker: ...
    def take(self) -> Item | None: ...
    def gather(self, most: int, seconds: float) -> list[Item]: ...
    def arm(self, for_items: bool) -> bool: ...
    def disarm(self) -> None: ...
    def fileno(self) -> int: ...
    @property
    def stopping(self) -> bool: ...
    @staticmethod
    def send(item: Item, part: Any) -> bool: ...
    @staticmethod
    def streams(item: Item) -> bool: ...
    @staticmethod
    def write(item: Item, result: Any, may_wait: bool = False) -> bool: ...
    @staticmethod
    def end(item: Item, error: tuple[int, str, str, str] | None = None) -> None: ...
