"""A process of one's own for a measurement: a job in, events out, the last of them the result.

The process is a fresh interpreter that runs ``main()`` of a module: it reads the job from standard
input, and writes a JSON object a line to standard output.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from pagealloc.demo.errors import DemoError

__all__ = ["run_child"]

START_CHILD = """
import sys
from importlib import import_module
name, *sys.path[:] = sys.argv[1:]  # the same pagealloc as ours, wherever that was found
import_module(name).main()
"""

ERROR_TAIL_LINES = 15


def run_child(
    module_name: str, job_text: str, on_event: Callable[[dict[str, Any]], None], title: str
) -> dict[str, Any]:
    """Run a module's ``main()`` in a fresh interpreter, and return its result.

    Parameters
    ----------
    module_name : str
        The module.
    job_text : str
        Its standard input.
    on_event : callable
        Called with each event that is not the result.
    title : str
        What the process is, for the message of an error.

    Raises
    ------
    DemoError
        If the process failed; the message ends with what it wrote to standard error.
    """
    result: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile("w+") as error_output,
        subprocess.Popen(
            [sys.executable, "-c", START_CHILD, module_name, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=error_output,
            text=True,
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise DemoError(f"the process of {title} has no pipes")
        try:
            process.stdin.write(job_text)
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "result":
                    result = event["result"]
                else:
                    on_event(event)
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0 or result is None:
            error_output.seek(0)
            tail = "".join(error_output.readlines()[-ERROR_TAIL_LINES:]).rstrip()
            raise DemoError(
                f"the process of {title} ended with exit code {process.returncode}:\n{tail}"
            )
    return result
