"""Other people's machine code: where it is looked for, and that it is never executed."""

import subprocess
import sys
import zipfile

import pytest

from sage_diffusion.speed import libraries as finder
from sage_diffusion.speed.libraries import LibraryError, libraries


def wheel(folder, name="some_peer-1.0-py3-none-any.whl", files=("some_peer/_C.so",)):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as z:
        z.writestr("some_peer/__init__.py", "raise RuntimeError('executed')")
        for file in files:
            z.writestr(file, b"machine code")
    return folder / name


def found(target, **options):
    with libraries(str(target), **options) as (package, paths):
        assert all(path.read_bytes() for path in paths)
        return package, [path.name for path in paths]


def test_files(tmp_path):
    (tmp_path / "my.cubin").write_bytes(b"code")
    assert found(tmp_path / "my.cubin") == ("my", ["my.cubin"])
    files = ("p/cuda/_C.cpython-311.so", "p/hip/_C.so", "p/k.cubin", "p/readme.txt")
    assert found(wheel(tmp_path, files=files)) == ("some_peer", ["_C.cpython-311.so", "k.cubin"])


def test_an_installed_package_comes_before_a_wheel(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "some_peer").mkdir(parents=True)
    (site / "some_peer" / "lib.so").write_bytes(b"code")
    info = site / "some_peer-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-peer\nVersion: 2.0\n")
    (info / "RECORD").write_text("some_peer/lib.so,,\nsome_peer/__init__.py,,\n")
    folder = wheel(tmp_path / "wheels").parent
    assert found("Some-Peer", wheels=folder) == ("some_peer", ["_C.so"])
    monkeypatch.syspath_prepend(str(site))
    assert found("some-peer", wheels=folder) == ("some_peer", ["lib.so"])


def test_a_download_is_asked_for_and_kept(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    commands = []

    def pip(command, **options):
        commands.append(command)
        wheel(folder / command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(finder.subprocess, "run", pip)
    monkeypatch.setattr(finder, "default_folder", lambda: folder)
    with pytest.raises(
        LibraryError, match=f"some_peer must be installed, or its wheel be in {folder}"
    ):
        found("some_peer")
    assert not commands and not folder.exists()
    for _ in range(2):
        assert found("some_peer", download=True) == ("some_peer", ["_C.so"])
    assert len(commands) == 1 and commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(commands[0])  # builds, that is runs, nothing
    assert [path.name for path in folder.iterdir()] == ["some_peer-1.0-py3-none-any.whl"]


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    said = "WARNING: x\nERROR: No matching distribution found for some_peer\n"
    monkeypatch.setattr(
        finder.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", said)
    )
    with pytest.raises(
        LibraryError, match="could not download a wheel of some_peer: ERROR: No match"
    ):
        found("some_peer", wheels=tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path, monkeypatch):
    no_zip = tmp_path / "some_peer-1.0-py3-none-any.whl"
    no_zip.write_bytes(b"PK but no zip")
    with pytest.raises(LibraryError, match="must be a wheel, it is no zip file"):
        found(no_zip)
    with pytest.raises(LibraryError, match=r"must hold machine code, found no \.so, \.pyd"):
        found(wheel(tmp_path, files=()))
    for missing in ("missing.whl", "missing.so", "no/such/kernel"):
        with pytest.raises(LibraryError, match=f"{missing} must be a file"):
            found(missing)
