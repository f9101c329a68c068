"""Limits that several panels are coloured by, as the alerts of prometheus_rules.yml have them."""

from panels import Limits

LATENCY_LIMITS = Limits(50e-6, 100e-6)
REFUSED_LIMITS = Limits(0.001, 0.01)
BUDGET_LIMITS = Limits(0.8, 0.9)
