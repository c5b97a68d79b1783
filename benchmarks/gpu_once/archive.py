"""Puts a folder's files into one archive, in a few pieces that are small enough to be carried away.

Knows files; knows not what is in them.
"""

import tarfile
from pathlib import Path
from tempfile import TemporaryFile

PIECE_BYTES = 16 << 20
MAX_PIECES = 8
_NAME = "gpu_once.tar.gz"
_TAR_BYTES = 256 << 10
"""Room for the archive's own records."""


def archive(folder: Path, piece_bytes: int = PIECE_BYTES, max_pieces: int = MAX_PIECES) -> tuple[list[Path], list[str]]:
    """Writes `gpu_once.tar.gz.0`, `.1` and so on, which `cat` puts together; returns them, and the files that are too
    large for what room there is. Smaller files come first."""
    for old in folder.glob(f"{_NAME}.*"):
        old.unlink()
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    room, left_out = max_pieces * piece_bytes - min(_TAR_BYTES, piece_bytes), list[str]()
    with TemporaryFile() as whole:
        with tarfile.open(fileobj=whole, mode="w:gz") as packed:
            for path in files:
                name = str(path.relative_to(folder))
                room -= path.stat().st_size + 2 * tarfile.BLOCKSIZE
                if room < 0:
                    left_out.append(name)
                else:
                    packed.add(path, name)
        whole.seek(0)
        pieces: list[Path] = []
        while part := whole.read(piece_bytes):
            pieces.append(folder / f"{_NAME}.{len(pieces)}")
            pieces[-1].write_bytes(part)
    assert len(pieces) <= max_pieces
    return pieces, left_out
