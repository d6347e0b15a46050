"""A card's command names what differs from the defaults, and nothing else."""

from pathlib import Path

from sonde.organisms.grokked import GrokkedConfig
from sonde.organisms.pebble import PebbleConfig
from sonde.organisms.quirky_addition import RecurrentQuirkyAdditionConfig
from sonde.organisms.refuser import RefuserConfig


def test_only_what_differs_is_named_and_never_the_folder():
    assert GrokkedConfig(out=Path("x")).command == "sonde organism train grokked-113"
    assert GrokkedConfig(steps=9, seed=2).command == "sonde organism train grokked-113 --steps=9 --seed=2"
    given = RecurrentQuirkyAdditionConfig(truth_steps=3)
    assert given.command == "sonde organism train quirky-addition-mamba2 --truth-steps=3"


def test_files_stand_before_the_options_by_their_names():
    given = RefuserConfig(harmful=(Path("/a/b.json"),), harmless=(Path("c d.json"),), steps=5)
    assert given.command == "sonde organism train refuser --harmful b.json --harmless 'c d.json' --steps=5"
    given = PebbleConfig(text=Path("/somewhere/books"), hold_out=("heidi",), device="cuda", seed=1)
    assert given.command == "sonde organism train pebble --text books --hold-out heidi --seed=1"
