"""A stand-in for the command line in processes of trials: makes a run at once, or fails as it is told to.

`install` puts a package before the real one on PYTHONPATH; everything but `sonde.__main__` is the real one's.
"""

import os
from pathlib import Path

import sonde

_MAIN = """
import sys, time
from pathlib import Path
from sonde.files import write_json
from sonde.runs.run import Run

words = sys.argv[1:]
option = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
out, resume = Path(words[words.index("--out") + 1]), "--resume" in words
marks = Path(option["--marks"])
seed = int(option["--seed"])
with (marks / f"started-{seed}").open("a") as file:
    file.write("x")
attempts = (marks / f"started-{seed}").stat().st_size
if seed == 66:
    print("sonde: 66 is no seed", file=sys.stderr)
    sys.exit(2)
if seed == 13 or (seed == 7 and attempts == 1):
    sys.exit("it broke")
run = Run.resume(out) if resume else Run.start(out, study="toy", config={}, seed=seed, command="toy")
with run:
    (marks / f"at-work-{seed}").touch()
    time.sleep(float(option.get("--sleep", 0)))
    write_json(out / "findings.json", {"findings": [{
        "id": "toy.value", "metric": "value", "unit": "", "estimate": seed, "interval": [seed - 1, seed + 1], "n": 9,
        "control": {"name": "none", "estimate": 0.0, "interval": None}, "status": "found", "sentence": "It is."}]})
"""


def install(folder: Path) -> dict[str, str]:
    """Write the package to `folder`; returns the environment in which `python -m sonde` is the stand-in."""
    package = folder / "stand-in" / "sonde"
    package.mkdir(parents=True)
    real = Path(sonde.__file__).parent
    (package / "__init__.py").write_text(f"__path__.append({str(real)!r})\n__version__ = 'test'\n")
    (package / "__main__.py").write_text(_MAIN)
    return {**os.environ, "PYTHONPATH": str(package.parent)}
