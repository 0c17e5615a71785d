"""The service beside the same scorer and the same store behind other servers: `make bench-peers`, docs/peers.md."""
