"""Faults made on purpose while the service is asked: real processes, every answer checked (docs/reliability.md)."""
