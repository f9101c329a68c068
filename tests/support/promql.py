"""PromQL, as far as tests ask it: which metrics an expression reads."""

import re

# What a `$` stands for when no Grafana is there to fill it in.
_TEMPLATES = {"$__rate_interval": "5m", "$__range": "1h"}

_NOT_READ = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # strings first: they may hold any bracket
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
)
_KEYWORDS = {"and", "bool", "by", "group_left", "offset", "on", "or", "unless"}


def metrics_of(expr: str) -> set[str]:
    """Return the names an expression reads: neither functions nor labels nor keywords."""
    bare = _NOT_READ.sub(" ", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    names = re.findall(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\(|[\w:])", bare)
    return set(names) - _KEYWORDS


def filled_in(expr: str) -> str:
    """Return an expression of a dashboard with its template variables replaced."""
    for name, value in _TEMPLATES.items():
        expr = expr.replace(name, value)
    return re.sub(r"\$\w+", ".+", expr)
