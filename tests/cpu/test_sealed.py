"""Checkpoints whose files are not what was saved: found before any is believed, and named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import ConfigError, RunFolderError
from tandem.numerics.digest import file_hash
from tandem.run.source import resolve_source
from tandem.train.checkpoint import MANIFEST, seal, verify

MODEL = ("config.json", "model.safetensors", "tokenizer.json")
RESUME = ("optimiser-00001.safetensors", "stale-000002-ab.safetensors", "state.json")


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((*MODEL, *RESUME)):
        (folder / name).write_bytes(bytes(range(number, 200 + number)))
    (folder / MANIFEST).unlink(missing_ok=True)
    seal(folder)
    return folder


@pytest.mark.parametrize("count", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 7])
def test_a_file_is_hashed_whole(tmp_path: Path, count: int) -> None:
    """The end of a file, or of a block of it, is left out of its hash."""
    content = bytes((7 * n + n // 251) % 256 for n in range(count))
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == xxhash.xxh3_128(content).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sealed")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from((*MODEL, *RESUME)), place=st.integers(0, 199), bit=st.integers(0, 7), cut=st.booleans())
def test_any_bit_is_seen(folder: Path, name: str, place: int, bit: int, cut: bool) -> None:
    """A flipped bit or a cut file among those that are read is believed; or one that is not read stops the reader."""
    path = checkpoint(folder) / name
    verify(folder)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content[:place] if cut else content)
    with pytest.raises(RunFolderError, match=re.escape(f"{path} is not what was saved")):
        verify(folder)
    if name in MODEL:
        with pytest.raises(RunFolderError, match=f"Remove {folder} to go on from the checkpoint before it"):
            verify(folder, resumes=False)
    else:
        verify(folder, resumes=False)


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"null", b'{"xxh3_128": 7}', b"{}", b"\0\xff"])
def test_without_hashes_nothing_is_believed(tmp_path: Path, torn: bytes) -> None:
    """A manifest that is damaged or gone turns the check off, or ends in a traceback."""
    folder = checkpoint(tmp_path)
    (folder / MANIFEST).write_bytes(torn)
    with pytest.raises(RunFolderError, match=MANIFEST):
        verify(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(RunFolderError, match=f"{MANIFEST} cannot be read"):
        verify(folder)


def test_files_that_come_and_go(tmp_path: Path) -> None:
    """A shard that is gone is not missed, one that was added is read, or a note beside them makes all of it useless."""
    folder = checkpoint(tmp_path)
    (folder / "notes.txt").write_text("the good one")
    verify(folder)
    (folder / "optimiser-00002.safetensors").write_bytes(b"another run's")
    with pytest.raises(RunFolderError, match="optimiser-00002.safetensors is not what was saved.*has no such file"):
        verify(folder)
    (folder / "optimiser-00002.safetensors").unlink()
    (folder / "optimiser-00001.safetensors").unlink()
    with pytest.raises(RunFolderError, match="optimiser-00001.safetensors cannot be read: No such file"):
        verify(folder)


def test_a_model_of_a_run_is_checked(tmp_path: Path) -> None:
    """`tandem generate RUN` answers with weights that the disk changed."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        resolve_source(str(tmp_path))
    newest = checkpoint(tmp_path / "checkpoints" / "step-3")
    for source in (tmp_path, newest):
        assert resolve_source(str(source)) == str(newest)
    (newest / "state.json").write_text("{}")
    (newest / "model.safetensors").write_bytes(b"0")
    for source in (tmp_path, newest):
        with pytest.raises(RunFolderError, match="model.safetensors is not what was saved"):
            resolve_source(str(source))
    assert json.loads((newest / MANIFEST).read_text())["xxh3_128"].keys() == {*MODEL, *RESUME}
    assert resolve_source("owner/name") == "owner/name"
