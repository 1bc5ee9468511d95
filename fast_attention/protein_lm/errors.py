"""The error that most of the application raises for what a user can change."""

from __future__ import annotations


class UsageError(ValueError):
    """Options of a command contradict each other, or one is missing: exit status 2."""


class RunError(RuntimeError):
    """A run cannot be started, resumed or read; the message says why and what to do."""
