"""What pagealloc does, shown: profiles, metrics, snapshots, a doctor.

Rooms, bottom up: system_report (the machine's memory, as the kernel tells it), backing_trial (what
of it can be had), straddling (rows in two pages), snapshot (all that the process counts, read
once), readings (every figure of it, named), profiles (values by stack), pprof (their files),
flamegraph (their pages), doctor_evidence (what rules look at), doctor_finding (what they find),
doctor_machine_rules, doctor_use_rules, doctor_watch (evidence gathered), doctor (all rules asked).
"""
