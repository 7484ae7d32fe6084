"""Bad arguments: each error names the argument, the value with its type, and what is allowed; none is pyo3's, CPython's,
gRPC's or protobuf's."""

import asyncio
import math
import mmap
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
from harness import PATIENCE, error_of
from serving import FORKRING, App, run

import forkring
from forkring import aio

RAW = [
    "bad argument type",
    "built-in operation",
    "while processing",
    "cannot be interpreted as an integer",
    "can't convert",
    "too big to convert",
    "is a int",
    "has no attribute",
    "object is not iterable",
    "not supported between",
    "unsupported operand",
    "invalid slice key",
    "descriptor",
    "expected bytes",
    "Value out of range",
]
SIZE = "it must be a number of bytes, an integer of 0 or more"
INDEX = "a payload is indexed by an integer or a slice of integers"


def check(told, says):
    assert says in told, told
    for words in RAW:
        assert words not in told, told
    assert len(told) < 600, told


@pytest.fixture(scope="module")
def evaluates(messages):
    app = App(messages, "arguments.py:evaluate")
    yield app
    app.close()


@pytest.mark.parametrize(
    "expression, says",
    [
        ("item.reply(-1)", f"ValueError: nbytes is -1, of type int: {SIZE}"),
        ("item.reply(-(2**70))", f"ValueError: nbytes is -1180591620717411303424, of type int: {SIZE}"),
        ("item.reply(1.5)", f"TypeError: nbytes is 1.5, of type float: {SIZE}"),
        ("item.reply('7')", f"TypeError: nbytes is '7', of type str: {SIZE}"),
        ("item.reply(None)", f"TypeError: nbytes is None, of type NoneType: {SIZE}"),
        ("item.reply(True)", f"TypeError: nbytes is True, of type bool: {SIZE}"),
        ("item.reply([])", f"TypeError: nbytes is [], of type list: {SIZE}"),
        ("item.reply(b'x')", f"TypeError: nbytes is b'x', of type bytes: {SIZE}"),
        ("item.reply(float('nan'))", f"TypeError: nbytes is nan, of type float: {SIZE}"),
        ("item.reply(numpy.arange(3))", f"TypeError: nbytes is array([0, 1, 2]), of type ndarray: {SIZE}"),
        ("item.reply(nbytes=-1)", f"ValueError: nbytes is -1, of type int: {SIZE}"),
        ("item.reply(2**40)", "Abort: RESOURCE_EXHAUSTED (RESULT_TOO_LARGE): a result of 1099511627776 bytes is too large"),
        ("item.reply(2**70)", "Abort: RESOURCE_EXHAUSTED (RESULT_TOO_LARGE): a result of "),
        ("item.reply(numpy.int64(3))", "fine: <forkring.Reply of 3 bytes>"),
        ("item.numpy(object)", "dtype is <class 'object'>, of type type; NumPy says: "),
        ("item.numpy('nope')", "TypeError: the payload of 6 bytes cannot be seen as such an array: dtype is 'nope', of type str;"),
        ("item.numpy(7)", "TypeError: the payload of 6 bytes cannot be seen as such an array: dtype is 7, of type int;"),
        ("item.numpy('i4')", "ValueError: the payload of 6 bytes cannot be seen as such an array: dtype is 'i4', of type str;"),
        ("item.numpy('S0')", "ValueError: the payload of 6 bytes cannot be seen as such an array: dtype is 'S0'"),
        ("item.numpy(None, 7)", "ValueError: the payload of 6 bytes cannot be seen as such an array: shape is 7, of type int;"),
        ("item.numpy(shape='x')", "shape is 'x', of type str; NumPy says: "),
        ("item.numpy('u2', (-1, -1))", "dtype is 'u2', of type str; shape is (-1, -1), of type tuple; NumPy says: "),
        ("item.numpy('u2', 1.5)", "dtype is 'u2', of type str; shape is 1.5, of type float; NumPy says: "),
        ("item.numpy('u2', (3, 1)).shape", "fine: (3, 1)"),
        ("item.payload['x']", f"TypeError: the index is 'x', of type str: {INDEX}"),
        ("item.payload[None]", f"TypeError: the index is None, of type NoneType: {INDEX}"),
        ("item.payload[1.5]", f"TypeError: the index is 1.5, of type float: {INDEX}"),
        ("item.payload['a':]", f"TypeError: the index is slice('a', None, None), of type slice: {INDEX}"),
        ("item.payload[6]", "IndexError: the index is 6, of type int: the payload is not that long, it has 6 bytes"),
        ("item.payload[-7]", "IndexError: the index is -7, of type int: the payload is not that long, it has 6 bytes"),
        ("item.payload[2**70]", "the index is 1180591620717411303424, of type int"),
        ("item.payload[-1]", "fine: 102"),
    ],
)
def test_what_a_handler_asks_of_an_item(evaluates, expression, says):
    told = evaluates.call("evaluate", b"abcdef", metadata={"expression": expression}).decode()
    if "NumPy says" in told:
        # What it says is its own.
        told, _, numpys = told.partition("NumPy says: ")
        assert numpys
        told += "NumPy says: "
    check(told, says)


def test_what_a_handler_raises_and_yields(serve):
    app = serve("arguments.py:raises", "arguments.py:yields")
    assert error_of(app.error("raises")) == ("INTERNAL", "HANDLER_RAISED", r"ValueError: no file \udcff.txt")
    code, reason, message = error_of(app.error("yields"))
    assert (code, reason) == ("INTERNAL", "BAD_RESULT")
    check(message, "the handler returned `int`")


TIME = "it must be a number of seconds from 0 to 315576000000, or math.inf"
COUNT = "it must be an integer from 1 to 1048576"


@pytest.mark.parametrize(
    "decorate, kind, says",
    [
        (lambda: forkring.batch(len), TypeError, "write @forkring.batch(), with brackets"),
        (lambda: forkring.batch(0), ValueError, f"max_size is 0: {COUNT}"),
        (lambda: forkring.batch(-1), ValueError, f"max_size is -1: {COUNT}"),
        (lambda: forkring.batch(2**70), ValueError, f"max_size is 1180591620717411303424: {COUNT}"),
        (lambda: forkring.batch(True), TypeError, f"max_size is True, of type bool: {COUNT}"),
        (lambda: forkring.batch(8.0), TypeError, f"max_size is 8.0, of type float: {COUNT}"),
        (lambda: forkring.batch("8"), TypeError, f"max_size is '8', of type str: {COUNT}"),
        (lambda: forkring.batch(None), TypeError, f"max_size is None, of type NoneType: {COUNT}"),
        (lambda: forkring.batch(1, -1), ValueError, f"max_delay is -1: {TIME}"),
        (lambda: forkring.batch(1, math.nan), ValueError, f"max_delay is nan: {TIME}"),
        (lambda: forkring.batch(1, -math.inf), ValueError, f"max_delay is -inf: {TIME}"),
        (lambda: forkring.batch(1, 1e300), ValueError, f"max_delay is 1e+300: {TIME}"),
        (lambda: forkring.batch(1, 10**400), ValueError, "max_delay is 1000"),
        (lambda: forkring.batch(1, "soon"), TypeError, f"max_delay is 'soon', of type str: {TIME}"),
        (lambda: forkring.batch(1, None), TypeError, f"max_delay is None, of type NoneType: {TIME}"),
        (lambda: forkring.batch(1, True), TypeError, f"max_delay is True, of type bool: {TIME}"),
        (lambda: forkring.concurrency(len), TypeError, "write @forkring.concurrency(8)"),
        (lambda: forkring.concurrency(0), ValueError, f"most is 0: {COUNT}"),
        (lambda: forkring.concurrency(2**20 + 1), ValueError, f"most is 1048577: {COUNT}"),
        (lambda: forkring.concurrency(1.5), TypeError, f"most is 1.5, of type float: {COUNT}"),
        (lambda: forkring.concurrency("8"), TypeError, f"most is '8', of type str: {COUNT}"),
        (lambda: forkring.concurrency([]), TypeError, f"most is [], of type list: {COUNT}"),
        (lambda: forkring.concurrency(False), TypeError, f"most is False, of type bool: {COUNT}"),
    ],
)
def test_a_decorators_arguments(decorate, kind, says):
    with pytest.raises(kind) as caught:
        decorate()
    check(str(caught.value), says)


def test_a_decorators_good_arguments():
    for size, delay in [(1, 0), (2**20, math.inf), (numpy.int32(8), numpy.float32(0.5)), (2, Fraction(1, 2))]:
        forkring.batch(size, delay)(lambda items: items)


def handle(item):
    """A handler."""


@pytest.mark.parametrize(
    "named, kind, says",
    [
        ({"workers": 0}, ValueError, "workers is 0: it must be an integer from 1 to 1024"),
        ({"workers": -1}, ValueError, "workers is -1: it must be an integer from 1 to 1024"),
        ({"workers": 1025}, ValueError, "workers is 1025: it must be an integer from 1 to 1024"),
        ({"workers": "two"}, TypeError, "workers is 'two', of type str"),
        ({"workers": 2.0}, TypeError, "workers is 2.0, of type float"),
        ({"workers": True}, TypeError, "workers is True, of type bool"),
        ({"listen": 50051}, TypeError, "listen is 50051, of type int: it must be a str"),
        ({"listen": ("127.0.0.1", 1)}, TypeError, "listen is ('127.0.0.1', 1), of type tuple: it must be a str"),
        ({"name": 7}, TypeError, "name is 7, of type int: it must be a str"),
        ({"name": "\ud800"}, ValueError, r"name is '\ud800': it must be Unicode text, with no lone surrogates"),
        ({"affinity": 3}, TypeError, "affinity is 3, of type int: it must be a list of CPU numbers"),
        ({"affinity": ["0"]}, TypeError, "a CPU of affinity is '0', of type str: it must be an integer from 0 to 1023"),
        ({"affinity": [-1]}, ValueError, "a CPU of affinity is -1: it must be an integer from 0 to 1023"),
        ({"affinity": [1.5]}, TypeError, "a CPU of affinity is 1.5, of type float"),
        ({"worker_env": "A=1"}, TypeError, "worker_env is 'A=1', of type str: it must be a mapping of str to str"),
        ({"worker_env": [("A", "1")]}, TypeError, "of type list: it must be a mapping of str to str"),
        ({"worker_env": {"A": 1}}, TypeError, "worker_env['A'] is 1, of type int: it must be a str"),
        ({"worker_env": {1: "A"}}, TypeError, "a key of worker_env is 1, of type int: it must be a str"),
        ({"worker_env": {"A=B": "1"}}, ValueError, "worker_env has 'A=B': the name of a variable is not empty and has no `=`"),
        ({"worker_env": {"": "1"}}, ValueError, "worker_env has '': the name of a variable is not empty"),
        ({"worker_env": {"A": "x\ny"}}, ValueError, r"worker_env['A'] is 'x\ny': it must have no line break"),
        ({"worker_env": {"A": "x\0y"}}, ValueError, r"worker_env['A'] is 'x\x00y': it must have no line break"),
        ({"preload": "yes"}, TypeError, "preload is 'yes', of type str: it must be True or False"),
        ({"reload": 1}, TypeError, "reload is 1, of type int: it must be True or False"),
        ({"options": "--grace=5s"}, TypeError, "options is '--grace=5s', of type str: it must be a list of str"),
        ({"options": ("--workers", 3)}, TypeError, "an element of options is 3, of type int: it must be a str"),
        ({"options": 7}, TypeError, "options is 7, of type int: it must be a list of str"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_serve_refuses(named, kind, says):
    with pytest.raises(kind) as caught:
        forkring.serve(handle, **named)
    check(str(caught.value), says)


ADDRESS = "is not an address: give HOST:PORT or http://HOST:PORT, with a port from 1 to 65535"
CLIENTS = [
    ((7,), {}, TypeError, f"7, of type int {ADDRESS}"),
    ((None,), {}, TypeError, f"None, of type NoneType {ADDRESS}"),
    ((b"h:1",), {}, TypeError, f"b'h:1', of type bytes {ADDRESS}"),
    (("h:0",), {}, ValueError, f"`h:0` {ADDRESS}"),
    (("h:65536",), {}, ValueError, f"`h:65536` {ADDRESS}"),
    (("h:1",), {"pool": 7}, TypeError, "pool is 7, of type int: it must be a str"),
    (("h:1",), {"pool": None}, TypeError, "pool is None, of type NoneType: it must be a str"),
    (("h:1",), {"pool": "\ud800"}, ValueError, r"pool is '\ud800': it must be Unicode text"),
    (("h:1",), {"retries": -1}, ValueError, "retries is -1: it must be an integer from 0 to "),
    (("h:1",), {"retries": 1.5}, TypeError, "retries is 1.5, of type float: it must be an integer from 0 to "),
    (("h:1",), {"retries": None}, TypeError, "retries is None, of type NoneType"),
    (("h:1",), {"idempotent": 1}, TypeError, "idempotent is 1, of type int: it must be True or False"),
    (("h:1",), {"connect_timeout": -1}, ValueError, f"connect_timeout is -1: {TIME}; None: as long as it takes"),
    (("h:1",), {"connect_timeout": "1"}, TypeError, f"connect_timeout is '1', of type str: {TIME}"),
    (("h:1",), {"connect_timeout": math.nan}, ValueError, f"connect_timeout is nan: {TIME}"),
    (("h:1",), {"options": "x"}, TypeError, "options is 'x', of type str: it must be a list of pairs"),
    (("h:1",), {"options": {"a": 1}}, TypeError, "options is {'a': 1}, of type dict: it must be a list of pairs"),
    (("h:1",), {"options": ["x"]}, TypeError, "an element of options is 'x', of type str: it must be a pair"),
    (("h:1",), {"options": [(1, 2)]}, TypeError, "a name in options is 1, of type int: it must be a str"),
    (("h:1",), {"options": [("a", 1.5)]}, TypeError, "options: a is 1.5, of type float: it must be an integer from -2147"),
    (("h:1",), {"options": [("a", 2**31)]}, ValueError, "options: a is 2147483648: it must be an integer from -2147"),
]


@pytest.mark.parametrize("arguments, named, kind, says", CLIENTS, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("client", [forkring.Client, aio.Client], ids=["sync", "aio"])
def test_what_a_client_refuses(client, arguments, named, kind, says):
    with pytest.raises(kind) as caught:
        client(*arguments, **named)
    check(str(caught.value), says)


ID = "it must be an integer from 0 to 18446744073709551615"
TIMEOUT = f"{TIME}; None: no limit"
RELEASED = memoryview(b"x")
RELEASED.release()
# A method of the client, its arguments, and what it says.
USES = [
    ("call", (7,), {}, TypeError, "a payload is bytes, str or a buffer, not int: 7"),
    ("call", (None,), {}, TypeError, "a payload is bytes, str or a buffer, not NoneType: None"),
    ("call", ({"a": 1},), {}, TypeError, "a payload is bytes, str or a buffer, not dict: {'a': 1}"),
    ("call", ("\ud800",), {}, ValueError, "a payload of text is sent as UTF-8, and this cannot be: surrogates not allowed, at 0"),
    ("call", (RELEASED,), {}, ValueError, "a payload of type memoryview cannot be read: "),
    ("call", (mmap.mmap(-1, 2**31),), {}, ValueError, "a payload has 2147483648 bytes: a message holds at most 2147418112"),
    ("call", (b"",), {"pool": 7}, TypeError, "pool is 7, of type int: it must be a str"),
    ("call", (b"",), {"pool": b"echo"}, TypeError, "pool is b'echo', of type bytes: it must be a str"),
    ("call", (b"",), {"id": -1}, ValueError, f"id is -1: {ID}"),
    ("call", (b"",), {"id": 2**64}, ValueError, f"id is 18446744073709551616: {ID}"),
    ("call", (b"",), {"id": 1.0}, TypeError, f"id is 1.0, of type float: {ID}"),
    ("call", (b"",), {"id": "7"}, TypeError, f"id is '7', of type str: {ID}"),
    ("call", (b"",), {"metadata": "a=b"}, TypeError, "metadata is 'a=b', of type str: it must be a mapping of str to str"),
    ("call", (b"",), {"metadata": {"a": 1}}, TypeError, "metadata['a'] is 1, of type int: it must be a str"),
    ("call", (b"",), {"metadata": {b"a": "1"}}, TypeError, "a key of metadata is b'a', of type bytes: it must be a str"),
    ("call", (b"",), {"metadata": {"a": "\ud800"}}, ValueError, r"metadata['a'] is '\ud800': it must be Unicode text"),
    ("call", (b"",), {"priority": -1}, ValueError, "priority is -1: it must be an integer from 0 to 3"),
    ("call", (b"",), {"priority": 4}, ValueError, "priority is 4: it must be an integer from 0 to 3"),
    ("call", (b"",), {"priority": None}, TypeError, "priority is None, of type NoneType: it must be an integer from 0 to 3"),
    ("call", (b"",), {"timeout": -1}, ValueError, f"timeout is -1: {TIMEOUT}"),
    ("call", (b"",), {"timeout": math.nan}, ValueError, f"timeout is nan: {TIMEOUT}"),
    ("call", (b"",), {"timeout": 1e300}, ValueError, f"timeout is 1e+300: {TIMEOUT}"),
    ("call", (b"",), {"timeout": 10**400}, ValueError, "timeout is 1000"),
    ("call", (b"",), {"timeout": "5"}, TypeError, f"timeout is '5', of type str: {TIMEOUT}"),
    ("call", (b"",), {"timeout": True}, TypeError, f"timeout is True, of type bool: {TIMEOUT}"),
    ("call", (b"",), {"timeout": Decimal(1)}, TypeError, f"timeout is Decimal('1'), of type Decimal: {TIMEOUT}"),
    ("submit", (b"x",), {}, TypeError, "items is an iterable of payloads: write [payload]"),
    ("submit", (7,), {}, TypeError, "items is 7, of type int: it must be an iterable of payloads"),
    ("submit", (None,), {}, TypeError, "items is None, of type NoneType: it must be an iterable of payloads"),
    ("submit", ([7],), {}, TypeError, "a payload is bytes, str or a buffer, not int: 7"),
    ("submit", ([b""],), {"subscription": 7}, TypeError, "subscription is 7, of type int: it must be a str"),
    ("submit", ([b""],), {"timeout": -0.1}, ValueError, f"timeout is -0.1: {TIMEOUT}"),
    ("submit", ([forkring.Work(b"", timeout=-1)],), {}, ValueError, f"timeout is -1: {TIME}; None: none"),
    ("submit", ([forkring.Work(b"", timeout=math.nan)],), {}, ValueError, f"timeout is nan: {TIME}; None: none"),
    ("submit", ([forkring.Work(b"", timeout="1")],), {}, TypeError, "timeout is '1', of type str"),
    ("submit", ([forkring.Work(b"", id=-1)],), {}, ValueError, f"id is -1: {ID}"),
    ("submit", ([forkring.Work(b"", pool=7)],), {}, TypeError, "pool is 7, of type int: it must be a str"),
    ("submit", ([forkring.Work(b"", priority=2**40)],), {}, ValueError, "priority is 1099511627776: it must be an integer"),
    ("updates", (7,), {}, TypeError, "subscription is 7, of type int: it must be a str"),
    ("updates", ("",), {"limit": -1}, ValueError, f"limit is -1: {ID}"),
    ("updates", ("",), {"limit": 2**64}, ValueError, f"limit is 18446744073709551616: {ID}"),
    ("updates", ("",), {"limit": "1"}, TypeError, f"limit is '1', of type str: {ID}"),
    ("updates", ("",), {"timeout": math.nan}, ValueError, f"timeout is nan: {TIMEOUT}"),
    ("process", (7,), {}, TypeError, "items is 7, of type int: it must be an iterable of payloads"),
    ("process", ([b""],), {"timeout": "x"}, TypeError, f"timeout is 'x', of type str: {TIMEOUT}"),
    ("process", ([forkring.Work(None)],), {}, TypeError, "a payload is bytes, str or a buffer, not NoneType: None"),
]


@pytest.mark.parametrize("method, arguments, named, kind, says", USES, ids=lambda value: repr(value)[:30])
def test_what_a_clients_methods_refuse(server, method, arguments, named, kind, says):
    def use():
        with forkring.Client(server.address, pool="echo") as client:
            outcome = getattr(client, method)(*arguments, **named)
            if method in ("updates", "process"):
                next(outcome)

    async def use_aio():
        async with aio.Client(server.address, pool="echo") as client:
            outcome = getattr(client, method)(*arguments, **named)
            await (outcome.__anext__() if method in ("updates", "process") else outcome)

    for way in (use, lambda: asyncio.run(asyncio.wait_for(use_aio(), PATIENCE))):
        with pytest.raises(kind) as caught:
            way()
        check(str(caught.value), says)


def test_the_blocking_client_says_whose_asynchronous_items_are(server):
    async def items():
        yield b"x"

    with forkring.Client(server.address, pool="echo") as client:
        for use in (client.submit, client.process):
            with pytest.raises(TypeError) as caught:
                use(items())
            check(str(caught.value), "it must be an iterable of payloads; forkring.aio.Client takes asynchronous ones")


@pytest.mark.parametrize("timeout", [None, math.inf, 1e9, 1e10, 315_576_000_000, numpy.float32(60), Fraction(120, 2)])
def test_a_timeout_may_be_long(server, timeout):
    # gRPC's own range ends at 292 years, and what is beyond it had been over before it began.
    with forkring.Client(server.address, pool="echo", connect_timeout=timeout) as client:
        assert client.call(b"x", timeout=timeout).payload == b"x"
        (result,) = client.process([forkring.Work(b"x", timeout=timeout)], timeout=timeout)
        assert result.payload == b"x"


def test_numpy_that_is_missing_is_said(serve, monkeypatch, tmp_path):
    (tmp_path / "app.py").write_text(
        "import sys\nsys.modules['numpy'] = None\n\ndef handle(item):\n    return item.numpy()\n"
    )
    app = serve("app.py:handle", apps=tmp_path)
    assert "item.numpy() needs NumPy: pip install numpy" in error_of(app.error("handle"))[2]


def test_an_article_fits_its_word(tmp_path):
    (tmp_path / "app.py").write_text("handle = 7\n")
    outcome = run(FORKRING, "serve", "app:handle", folder=tmp_path)
    check(outcome.stderr, "`app:handle` is 7, of type int: a handler is a function or class")
