"""A ComfyUI server for tests: start it, ask it, run a prompt, listen, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running ComfyUI; ``texts`` are those shown on nodes, ``(node id, text)``."""

    url: str
    out: Path
    process: subprocess.Popen[bytes]
    texts: list[tuple[str, str]] = field(default_factory=list)

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def text(self, path: str) -> str:
        """Text of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def post(self, path: str, data: Any) -> Any:
        """JSON of a POST; a refusal's own JSON too."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def run(self, prompt: dict[str, Any], timeout: float = 240) -> dict[str, Any]:
        """Queue an API prompt, listen until it is done, return its history entry."""
        import websocket

        client = uuid.uuid4().hex
        self.texts.clear()
        channel = websocket.create_connection(
            f"{self.url.replace('http', 'ws')}/ws?clientId={client}", timeout=timeout
        )
        try:
            queued = self.post("/prompt", {"prompt": prompt, "client_id": client})
            if "prompt_id" not in queued:
                raise RuntimeError(json.dumps(queued))
            while True:
                message = channel.recv()
                if isinstance(message, bytes):
                    continue
                event = json.loads(message)
                if event["type"] == "sage_diffusion.text":
                    self.texts.append((event["data"]["node"], event["data"]["text"]))
                if event["type"] in (
                    "execution_success",
                    "execution_error",
                    "execution_interrupted",
                ):
                    break
        finally:
            channel.close()
        while queued["prompt_id"] not in (history := self.get(f"/history/{queued['prompt_id']}")):
            time.sleep(0.05)
        return history[queued["prompt_id"]]

    def last_text(self, node: str) -> str:
        """What a node shows after the run."""
        return [text for at, text in self.texts if at == node][-1]


@contextlib.contextmanager
def serve(comfy: Path, models: Path, out: Path, *arguments: str) -> Iterator[Server]:
    """A server on a free port with the pack, the test pack and the tiny models."""
    for name in ("user", "output", "custom_nodes"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for name, target in (
        ("sage_diffusion", ROOT),
        ("tiny_conditioning", HERE / "custom_nodes" / "tiny_conditioning"),
    ):
        link = out / "custom_nodes" / name
        if not link.exists():
            link.symlink_to(target)
    folders = (
        "checkpoints",
        "diffusion_models",
        "vq_tokenizers",
        "vq_fill",
        "kv_calibrations",
        "text_encoders",
        "vae",
        "vae_approx",
        "sage_plans",
    )
    paths = {f: str(models / f) for f in folders} | {"custom_nodes": str(out / "custom_nodes")}
    lines = ["tests:", *(f"  {name}: {path}" for name, path in paths.items())]
    (out / "paths.yaml").write_text("\n".join(lines) + "\n")
    port = free_port()
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-api-nodes", "--extra-model-paths-config", str(out / "paths.yaml")]
    command += ["--output-directory", str(out / "output"), "--temp-directory", str(out)]
    command += ["--user-directory", str(out / "user"), "--database-url", "sqlite:///:memory:"]
    with open(out / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=comfy,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        server = Server(f"http://127.0.0.1:{port}", out, process)
        try:
            _wait(server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            server.get("/system_stats")
            return
        time.sleep(0.25)
    log = (server.out / "server.log").read_text(errors="replace")
    raise RuntimeError(f"ComfyUI did not start:\n{log[-3000:]}")
