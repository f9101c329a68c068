"""HostCheck: a WSGI app answers those alone who mean this machine by the name they used.

Purpose
    A page in a browser may not read what a server on loopback tells.  DNS rebinding gives the name
    of an attacker's site the address of this machine: the browser then takes the server for that
    site, and lets the site's page read the answers.  The Host header still has the site's name.
Source
    RFC 9110, 7.2 (Host).
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["LOOPBACK_HOSTS", "HostCheck"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::[0-9]{0,5})?")


class HostCheck:
    """A WSGI app in front of another: 403 for requests to a host that is not ours.

    Parameters
    ----------
    app : WSGI application
        Who answers the others.
    hosts : iterable of str
        Names and addresses by which it may be asked besides ``localhost``, ``127.0.0.1`` and
        ``::1``, such as the address it listens at.  ``"0.0.0.0"`` and ``"::"``, that is every
        address of the machine, allow any that is written as a number: no DNS answer changes what
        that means.

    Notes
    -----
    Ports are not compared.  A request without a Host header, or with several, is refused.
    Thread-safe.
    """

    def __init__(self, app: WSGIApplication, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {_canonical(host) for host in (*LOOPBACK_HOSTS, *hosts)}
        self._allows_addresses = not self._hosts.isdisjoint(("0.0.0.0", "::"))  # noqa: S104

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer, or have the app answer."""
        host = environ.get("HTTP_HOST", "")
        if self.allows(host):
            return self._app(environ, start_response)
        answer = (
            f"403: this server is not {host[:100]!r}. Ask for it by localhost or the address it "
            "listens at; it can be given more names (hosts=).\n"
        ).encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(answer))),
        ]
        start_response("403 Forbidden", headers)
        return [answer]

    def allows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = _canonical(found[1] or found[2])
        return name in self._hosts or (self._allows_addresses and _is_address(name))


def _canonical(host: str) -> str:
    """Return one way to write a host: names in lower case, addresses as `ipaddress` has them."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
