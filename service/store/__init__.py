"""Redis, as the service reads it: lines, connections made of them, when not to ask, and what is read."""
