"""Public data sets, each turned into the documented data folder."""
