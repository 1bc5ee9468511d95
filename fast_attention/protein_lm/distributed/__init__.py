"""Several processes and devices, signals, threads of the host."""
