"""What `import pagealloc.observe` loads, and that its names and rooms are told of."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pagealloc.observe

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {"matplotlib", "opentelemetry", "prometheus_client", "rich"}


def loaded_by(imports: str) -> set[str]:
    code = f"import json, sys, {imports}; print(json.dumps(list(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(process.stdout))


def test_who_imports_pagealloc_loads_no_observability():
    assert not {name for name in loaded_by("pagealloc, pagealloc.kv") if "observe" in name}


def test_importing_observe_loads_none_of_its_rooms():
    loaded = loaded_by("pagealloc.observe")
    assert "pagealloc.observe" in loaded
    assert not {name for name in loaded if name.startswith("pagealloc.observe.")}


def test_what_needs_no_extra_loads_none():
    rooms = "doctor, feed, feed_reader, pprof_server, profiling, script, web"
    loaded = loaded_by(", ".join(f"pagealloc.observe.{room}" for room in rooms.split(", ")))
    assert OPTIONAL.isdisjoint(name.partition(".")[0] for name in loaded)


@pytest.mark.parametrize("name", pagealloc.observe.__all__)
def test_every_public_name_is_there_and_in_the_docs(name):
    if name in ("PageallocCollector", "start_http_server"):
        pytest.importorskip("prometheus_client")
    found = getattr(pagealloc.observe, name)
    documented = (ROOT / "docs/api.md").read_text()
    places = (f"pagealloc.observe.{name}", found.__module__)
    assert any(re.search(rf":: {re.escape(place)}$", documented, re.MULTILINE) for place in places)


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pagealloc.observe.nothing  # noqa: B018


def test_every_room_is_in_the_list_of_rooms():
    listed = re.findall(r"^    (\w+) {2,}\S", pagealloc.observe.__doc__, re.MULTILINE)
    folder = ROOT / "pagealloc/observe"
    rooms = {path.stem for path in folder.iterdir() if path.suffix in (".py", ".pyx")}
    assert sorted(listed) == sorted(rooms - {"__init__", "__main__"})
