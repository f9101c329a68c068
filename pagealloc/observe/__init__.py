"""What pagealloc does, shown: profiles, metrics, snapshots, a doctor.

Rooms, bottom up: system_report (the machine's memory, as the kernel tells it), snapshot (all that
the process counts, read once), readings (every figure of it, named), profiles (values by stack),
pprof (their files), flamegraph (their pages), dashboard (what Grafana and Prometheus import).
"""
