"""From a checked request to scores: what may wait, what is gathered into one forward, and the forward."""
