"""`python -m model compare`: every method trained and judged under one protocol, in tables and plots."""
