"""The text of single tokens: what a token adds to a document, with the bytes of half a character written out."""

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The UTF-8 bytes that each token stands for. Special tokens give the bytes of their names."""
    special = set(tokenizer.all_special_ids)
    alphabet = _byte_alphabet() if _is_byte_level(tokenizer) else None
    found = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if token is None:  # an id beyond the tokenizer, as in models with a padded vocabulary
            found.append(f"<{token_id}>".encode())
        elif token_id in special:
            found.append(token.encode())
        elif alphabet is not None and all(sign in alphabet for sign in token):
            found.append(bytes(alphabet[sign] for sign in token))
        elif match := _BYTE_TOKEN.fullmatch(token):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(token.replace("▁", " ").encode())
    return found


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; bytes that are no character alone are written like `⟨E2 80⟩`."""
    return [_readable(data) for data in token_bytes(tokenizer, ids)]


def _readable(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "⟨" + data.hex(" ").upper() + "⟩"


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
