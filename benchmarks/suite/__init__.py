"""What benchmarks/gpu_suite.py runs: the list of steps, how one is run, and the steps."""
