"""What callers meet: connections, bodies, routes, and the form of every answer."""
