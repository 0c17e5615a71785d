"""What a training is made of: its split of time, its steps, its checkpoints, its workers and where it starts."""
