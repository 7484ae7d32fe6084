"""Work that keeps the GIL, on real input: which are the most intricate functions of the standard library?

    forkring serve --pool complexity:4=complexity.py:complexity
    python complexity.py HOST:PORT [FOLDER]

Each item is a Python file. A worker parses it and counts, for each function, the ways through it (McCabe's number). Threads
would take turns at this; processes do not. The client reads files while it receives results, on one stream.
"""

import ast
import json
import sys
import sysconfig
import time
from pathlib import Path

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def complexity(item):
    """The file's functions, as JSON: pairs of complexity and name."""
    try:
        tree = ast.parse(bytes(item.payload))
    except (SyntaxError, ValueError):
        # The standard library has such files, too: for its own tests.
        return "[]"
    return json.dumps([(ways(node), node.name) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)])


def ways(function):
    """One way through, and one more for each place where it parts."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


def main(address, folder):
    # A worker needs nothing of this.
    from forkring.client import Client

    files = sorted(path for path in Path(folder).rglob("*.py") if path.is_file())
    found = []
    begin = time.monotonic()
    with Client(address, pool="complexity") as client:
        for result in client.process(path.read_bytes() for path in files):
            if result.error:
                raise result.error
            found += [(count, name, files[result.id]) for count, name in json.loads(result.payload)]
    seconds = time.monotonic() - begin
    for count, name, path in sorted(found, reverse=True)[:10]:
        print(f"{count:5} {name:30} {path}")
    print(f"{len(found)} functions of {len(files)} files in {seconds:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else sysconfig.get_path("stdlib"))
