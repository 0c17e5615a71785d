"""The loops that no sequence of torch's operations does well on a CPU, in C++, compiled where they run."""
