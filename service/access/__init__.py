"""Who may ask: API keys, what each role is allowed, and TLS."""
