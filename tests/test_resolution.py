"""What the Makefile installs must resolve on every Linux, from the public index alone."""

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from wheels import build_wheel

from sage_diffusion.attend.installation import TRITON_OF_TORCH, triton_requirement

#: Wheels for glibc 2.39 and older, as pip takes them on the machine itself.
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    "manylinux2014_x86_64",
    "linux_x86_64",
)

#: How to reach an index.  Everything else that pip was told of stays out: a folder of wheels or a
#: constraint would make it resolve here and nowhere else.
_KEPT = ("PIP_CERT", "PIP_INDEX_URL", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT")

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("", "=={}.{}.*".format(*min(TRITON_OF_TORCH)))

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux", reason="markers are evaluated on the machine that runs pip"
)


def clean_environment(tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k in _KEPT}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "HOME": str(tmp_path)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    command = [sys.executable, "-m", "pip", "index", "versions", "typer", "--retries", "0"]
    done = subprocess.run(
        command,
        env=clean_environment(tmp_path_factory.mktemp("home")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"no package index is reached: {done.stderr.strip().splitlines()[-1]}")


def interpreter(version):
    """That Python where it is installed, so that markers are its own; else this one."""
    found = shutil.which(f"python{version}")
    works = found and not subprocess.run([found, "-c", ""], capture_output=True).returncode
    return found if works else sys.executable


@pytest.fixture(scope="module")
def reports(wheel, tmp_path_factory):
    """All cases at once: pip mostly waits for the index."""
    with ThreadPoolExecutor(4) as pool:
        yield {
            case: pool.submit(resolve, wheel, tmp_path_factory.mktemp("resolve"), *case)
            for case in itertools.product(PYTHONS, TORCHES)
        }


def resolve(wheel, folder, python, torch):
    """pip's report: name and version of everything that it would install."""
    command = [sys.executable, "-m", "pip", "--python", interpreter(python), "install", "-q"]
    command += ["--dry-run", "--ignore-installed", "--no-cache-dir", "--only-binary=:all:"]
    # Metadata only: a part of each wheel where the index does not serve it by itself.
    command += ["--use-feature=fast-deps", "--target", str(folder), "--report", "report.json"]
    command += ["--python-version", python, *(f"--platform={name}" for name in PLATFORMS)]
    command += [f"torch{torch}", f"sage-diffusion[dev] @ file://{wheel}"]
    environment = clean_environment(folder)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}


@pytest.mark.parametrize("torch", TORCHES, ids=["newest", "oldest"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_set_resolves_without_local_wheels(reports, python, torch):
    found = reports[python, torch].result()
    belongs = triton_requirement(found["torch"], "Linux")
    assert "==" in belongs, f"TRITON_OF_TORCH lacks torch {found['torch']}"
    assert found["triton"].startswith(belongs.split("==")[1].rstrip("*"))
    assert {"diffusers", "transformers", "pytest", "ruff"} <= set(found)
