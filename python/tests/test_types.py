"""The package's types: in themselves, and of the native module, whose stub is written by hand."""

import subprocess
import sys

import pytest
from harness import PATIENCE


def check(folder, *arguments):
    # Not from the sources, which would be found before what is installed.
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5 * PATIENCE)


def test_the_package_is_typed_strictly(tmp_path):
    outcome = check(tmp_path, "mypy", "--strict", "--package", "forkring", "--cache-dir", "cache")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_stub_is_what_the_native_module_is(tmp_path):
    # By this name Python has it from 3.12 on.
    (tmp_path / "allowed").write_text("forkring._core.(Payload|Reply).__buffer__\n")
    allowed = ["--allowlist", "allowed", "--ignore-unused-allowlist"]
    outcome = check(tmp_path, "mypy.stubtest", "forkring._core", *allowed)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "use, says",
    [
        ("item.payload[0] + len(item.metadata['a'])", ""),
        ("item.nothing", '"Item" has no attribute "nothing"'),
        ("item.reply('7')", 'Argument 1 to "reply" of "Item" has incompatible type "str"'),
    ],
)
def test_a_handler_is_checked_against_them(tmp_path, use, says):
    (tmp_path / "app.py").write_text(
        "import forkring\n\n\ndef handle(item: forkring.Item) -> bytes:\n"
        f"    print({use})\n    return bytes(item.payload)\n"
    )
    outcome = check(tmp_path, "mypy", "--strict", "app.py", "--cache-dir", "cache")
    assert (says in outcome.stdout) and (outcome.returncode == 0) == (says == ""), outcome.stdout
