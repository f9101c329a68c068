"""Benchmarks: ``python -m bench`` lists them, ``python -m bench NAME`` runs one.

Each ``bench_NAME.py`` opens with one line that says what it measures, and has a function
``run(rounds) -> Report``.  Cases run interleaved, so that a busy moment of the machine hits all of
them, and medians are compared.  A report prints its table, is written as JSON, and fails the
command if a bar is missed.
"""
