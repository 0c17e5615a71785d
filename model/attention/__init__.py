"""One file per attention over a user's behaviours, one idea each."""
