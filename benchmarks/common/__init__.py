"""What the benchmarks share: tasks, networks, rows that survive a kill, measurements."""
