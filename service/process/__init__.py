"""The processes: one that serves, several below a parent, how they listen and how they stop."""
