"""The extra `client`: what the clients need beside this package."""

from __future__ import annotations

import importlib.util


def is_installed() -> bool:
    """Returns whether grpcio and protobuf can be imported, without importing grpc."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("grpc", "google.protobuf"))
    except ModuleNotFoundError:
        return False
