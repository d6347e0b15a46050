"""`organism:pebble-mamba2` and `organism:pebble-rwkv`: pebble as a recurrent network.

The same texts, tokenizer, windows, seed and optimizers, width 192 and as many blocks as match pebble's 4.2 million
parameters: 11 of Mamba-2 (6 heads of 64 channels, 32 states each), 6 of RWKV-4. What a method finds in all three is
not a matter of attention, and what differs is. Trained on the chunked scans of `sonde.lm.scan`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from sonde.organisms.pebble import PebbleConfig, make
from sonde.organisms.registry import organism


@dataclass(frozen=True)
class PebbleMamba2Config(PebbleConfig):
    """Train the Mamba-2 twin of pebble, with pebble's tokenizer, in about 50 minutes on one core.

    The folder that is written loads as any model does. An interrupted training goes on when the same command is given.

    Example: sonde organism train pebble-mamba2 --text books/ --hold-out heidi --out my-pebble
    """

    organism: ClassVar[str] = "pebble-mamba2"

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("pebble-mamba2")
    """Where model, tokenizer, card and checkpoint are written."""
    steps: Annotated[int, arg(metavar="N")] = 1600
    """Training steps, of 4096 tokens each."""


@dataclass(frozen=True)
class PebbleRwkvConfig(PebbleConfig):
    """Train the RWKV-4 twin of pebble, with pebble's tokenizer, in about 50 minutes on one core.

    The folder that is written loads as any model does. An interrupted training goes on when the same command is given.

    Example: sonde organism train pebble-rwkv --text books/ --hold-out heidi --out my-pebble
    """

    organism: ClassVar[str] = "pebble-rwkv"

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("pebble-rwkv")
    """Where model, tokenizer, card and checkpoint are written."""
    steps: Annotated[int, arg(metavar="N")] = 2500
    """Training steps, of 4096 tokens each."""


@organism("pebble-mamba2", summary="pebble as a Mamba-2 network: the same texts, tokenizer and size, a recurrent state")
def train_pebble_mamba2(config: PebbleMamba2Config) -> Path:
    """Train, export, evaluate and describe the Mamba-2 twin; see `sonde.organisms.pebble.train_pebble`."""
    from transformers import Mamba2ForCausalLM

    return _make(config, lambda vocab_size: Mamba2ForCausalLM(mamba2_architecture(vocab_size)))


@organism("pebble-rwkv", summary="pebble as an RWKV-4 network: the same texts, tokenizer and size, a recurrent state")
def train_pebble_rwkv(config: PebbleRwkvConfig) -> Path:
    """Train, export, evaluate and describe the RWKV-4 twin; see `sonde.organisms.pebble.train_pebble`."""
    from transformers import RwkvForCausalLM

    return _make(config, lambda vocab_size: RwkvForCausalLM(rwkv_architecture(vocab_size)))


def mamba2_architecture(vocab_size: int) -> Any:
    """The configuration of the Mamba-2 twin over `vocab_size` tokens."""
    from transformers import Mamba2Config

    return Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=11,
        num_heads=6,
        head_dim=64,
        state_size=32,
        n_groups=1,
        chunk_size=64,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def rwkv_architecture(vocab_size: int) -> Any:
    """The configuration of the RWKV-4 twin over `vocab_size` tokens."""
    from transformers import RwkvConfig

    return RwkvConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        attention_hidden_size=192,
        intermediate_size=672,
        context_length=512,
        rescale_every=0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def _make(config: PebbleConfig, build: Any) -> Path:
    from transformers import AutoTokenizer

    from sonde.lm.chunked import chunked_scans
    from sonde.organisms.registry import folder_of

    return make(config, build, tokenizer=AutoTokenizer.from_pretrained(folder_of("pebble")), running=chunked_scans)
