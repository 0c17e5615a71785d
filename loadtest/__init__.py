"""Load for a running service, over HTTP: who asks, for which items, and whether the answers are right."""
