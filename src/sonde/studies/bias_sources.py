"""Where the rows of the study of bias come from: a table of texts with two labels each, and their embeddings."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sonde.errors import SondeError

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.data.biographies import ConceptTable
    from sonde.runs.run import Run
    from sonde.studies.bias_erasure import BiasErasureConfig


def read_table(config: "BiasErasureConfig") -> "tuple[ConceptTable, str]":
    """The table of `config`, made up where none is given, and what to call it.

    Raises `SondeError` for files that cannot be read, columns that do not exist and missing values.
    """
    from sonde.data.biographies import ConceptTable, biographies

    if config.table is None:
        if config.embeddings:
            raise SondeError("--embeddings need --table, the concept and the task of each row")
        return biographies(config.rows, seed=config.seed), f"{config.rows:,} made-up biographies"
    columns = _columns(Path(config.table).expanduser(), config)
    return ConceptTable.of(*columns), Path(config.table).name


def _columns(path: Path, config: "BiasErasureConfig") -> tuple[list[str], list[str], list[str]]:
    """Texts, concepts and tasks of a file; rows in which one is missing are left out where texts are embedded."""
    import polars as pl

    readers = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}
    if path.suffix.lower() not in readers:
        raise SondeError(f"{path} is no table: give a {', '.join(readers)} file")
    try:
        frame = readers[path.suffix.lower()](path)
    except FileNotFoundError as error:
        raise SondeError(
            f"{path} does not exist: give a table with a text, a concept and a task in each row"
        ) from error
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise SondeError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    wanted = [config.concept or "concept", config.task or "task"]
    if not config.embeddings:
        wanted.insert(0, config.text or "text")
    for name in wanted:
        if name not in frame.columns:
            raise SondeError(f"{path} has no column {name!r}; its columns are {', '.join(frame.columns)}")
        if frame[name].null_count():
            raise SondeError(
                f"{path}, column {name!r}: {frame[name].null_count()} rows are empty; fill or leave them out"
            )
    columns = [frame[name].cast(pl.String).to_list() for name in wanted]
    if config.embeddings:
        columns.insert(0, [""] * len(frame))
    return columns[0], columns[1], columns[2]


def read_embeddings(name: str, table: "ConceptTable") -> "Tensor":
    """Embeddings from a file, checked against the table. Raises `SondeError` for others."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(name).expanduser()
    try:
        if path.suffix == ".npy":
            x = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        elif path.suffix == ".safetensors":
            x = next(iter(load_file(path).values())).float()
        else:
            raise SondeError(f"{path} holds no embeddings: give a .npy or .safetensors file")
    except (OSError, ValueError, SafetensorError, StopIteration) as error:
        raise SondeError(f"the embeddings {path} cannot be read: {error}") from error
    if x.ndim != 2 or len(x) != len(table):
        raise SondeError(
            f"{path} has the shape {tuple(x.shape)}; the table has {len(table)} rows, one for each embedding"
        )
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise SondeError(f"row {row} of {path} holds nan or infinity")
    return x


def encoder_name(config: "BiasErasureConfig") -> str:
    """What to call the embeddings."""
    name = config.embeddings or config.encoder
    return Path(name).name if name else "all-MiniLM-L6-v2"


def embedded(run: "Run", config: "BiasErasureConfig", table: "ConceptTable") -> "Tensor":
    """Embeddings of the texts, from the run folder where they are there: mean over tokens, length 1."""
    import torch

    from sonde.lm.sentence_embedding import SentenceEmbedder

    if run.done("embeddings"):
        return run.result("embeddings")
    encoder = SentenceEmbedder(config.encoder, device=config.device or "cpu", progress="embedding")
    x = torch.from_numpy(encoder(table.texts))
    run.finish("embeddings", x)
    return x
