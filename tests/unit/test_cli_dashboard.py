import json

import yaml

from pagealloc.cli.main import main


def test_it_prints_the_dashboard(capsys):
    assert main(["dashboard"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["title"] == "pagealloc"
    assert out.endswith("}\n")


def test_it_prints_the_rules(capsys):
    assert main(["dashboard", "--rules"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert yaml.safe_load(out)["groups"]
