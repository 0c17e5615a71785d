"""How good a model is on held-out time, and whether what is served is what was trained."""
