"""The error that most of the application raises for what a user can change."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot be started, resumed or read; the message says why and what to do."""
