"""What both sides share: the maths, the contracts and the training. Imports neither `service` nor `cache_builder`."""
