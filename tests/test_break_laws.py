"""The mistakes on purpose of scripts/break_laws.py still find what they break; the script itself runs the tests."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "break_laws.py"


def test_every_mistake_finds_its_text_exactly_once():
    script = runpy.run_path(str(SCRIPT))
    package = script["ROOT"] / script["PACKAGE"]
    lost = [
        (mutation.name, name, old)
        for mutation in script["MUTATIONS"]
        for name, old, _ in mutation.edits
        if (package / name).read_text(encoding="utf-8").count(old) != 1
    ]
    assert lost == []
    assert len(script["MUTATIONS"]) > 110
