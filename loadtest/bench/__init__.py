"""What a score costs beside what it replaces, in one process on one thread. No HTTP: `python -m loadtest.bench`."""
