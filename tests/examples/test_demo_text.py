"""Where the demo's text comes from."""

import json

from scripts import load_script


def test_the_library_wherever_it_lies(tmp_path, monkeypatch):
    """Also below a folder named like one that is left out."""
    library = tmp_path / "test" / "lib"
    for name in ("os.py", "test/no.py", "site-packages/x.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    paths = {"stdlib": str(library), "purelib": str(library / "site-packages")}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    demo = load_script("examples/demo.py")
    for more, want in ((False, {"os.py"}), (True, {"os.py", "site-packages/x.py"})):
        # the first 40 files are held out
        demo.collect_text(tmp_path / "text.jsonl", more=more)
        held_out = (tmp_path / "held-out.jsonl").read_text().splitlines()
        assert {json.loads(line)["text"] for line in held_out} == want
