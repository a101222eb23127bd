"""Measurements that print ratios: ``python -m benchmarks cache``. Nothing here is asserted."""
