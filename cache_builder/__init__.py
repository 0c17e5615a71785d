"""The batch job: every user's history, compressed, into the store; published only when it is whole."""
