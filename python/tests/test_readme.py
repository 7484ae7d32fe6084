"""What the READMEs say is run as it is written there, but for ports, which are free ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness import PATIENCE, ROOT, Server
from serving import Started

BIN = Path(sys.executable).parent


def blocks(readme, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / readme).read_text(), re.MULTILINE | re.DOTALL)


def ask(program, server, folder):
    """Runs a client of README's; what it printed."""
    program, count = re.subn(r'"127\.0\.0\.1:\d+"', repr(server.address), program)
    assert count == 1
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE
    ).stdout


@pytest.mark.parametrize("readme", ["README.md", "python/README.md"])
def test_the_quick_start(tmp_path, readme):
    app, client, *_ = blocks(readme, "python")
    assert app.startswith("# app.py\n") and client.startswith("# ask.py\n")
    (tmp_path / "app.py").write_text(app)
    (line,) = [line for block in blocks(readme, "sh") for line in block.splitlines() if "serve app:" in line]
    command = shlex.split(line, comments=True)
    assert command == ["forkring", "serve", "app:handle", "--workers", "4"]
    name = f"readme-{os.getpid()}"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with Started(*command, folder=tmp_path, PATH=path, FORKRING_NAME=name, FORKRING_LISTEN="127.0.0.1:0") as server:
        # sha256sum's own, of the bytes that the client sends.
        sent = re.search(r'call\(b"(.*?)"\)', client)[1]
        digest = subprocess.run(["sha256sum"], input=sent.encode(), stdout=subprocess.PIPE, check=True).stdout
        assert ask(client, server, tmp_path).split() == digest.decode().split()[:1]


def test_a_result_in_place(tmp_path):
    (program,) = [block for block in blocks("README.md", "python") if "item.reply(" in block]
    (tmp_path / "app.py").write_text(program)
    command = [BIN / "forkring", "serve", "app:shout", "--workers", "1", "--listen", "127.0.0.1:0"]
    with Started(*command, "--name", f"readme-{os.getpid()}", folder=tmp_path) as server:
        assert server.call("shout", "hello") == "HELLO"


def test_the_clients():
    (program,) = [block for block in blocks("README.md", "python") if "client.updates(" in block]
    with Server("--pool", "handle:2=sha256") as server:
        said = ask(program, server, ROOT).splitlines()
    # Two items were submitted, and each line of the README is one.
    assert len(said) == 2 + len((ROOT / "README.md").read_bytes().splitlines())
