"""What Tartarus costs, measured beside its peers in the same run: `python -m benchmarks`.

Nothing here is a test: machines are noisy. Each comparison alternates ours and the peers, and quotes
medians, p99 and ratios.
"""
