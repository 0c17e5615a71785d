"""The scoring service: HTTP in front, the cache of compressed users behind, one forward per batch between."""
