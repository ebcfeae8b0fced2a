"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from torchrec_mpe.files.atomic import atomic_directory, atomic_file


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with atomic_file(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["file"]
    with atomic_file(target) as temporary:
        temporary.write_text("two")
    assert target.read_text() == "two"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    target.mkdir()  # an empty folder may be in the way
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").touch(mode=0o600)
        assert not any(target.iterdir())
    assert (target / "sub" / "file").stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileExistsError, match="not an empty folder"), atomic_directory(target):
        pass
