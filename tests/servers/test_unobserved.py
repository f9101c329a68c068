"""With everything off, observability costs less than one instruction in a hundred."""

from benches import import_bench
from programs import program

import_bench()

from bench.bench_observe import run  # noqa: E402  # it is importable now


def test_instructions_beside_a_build_without():
    program("valgrind")
    report = run(rounds=5)
    assert len(report.rows) == 3
    assert report.holds, str(report)
