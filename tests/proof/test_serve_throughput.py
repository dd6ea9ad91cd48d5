"""10,000 pictures of 64 pixels through `adagrpo serve` on loopback: each gets its own score, and how many a second.

Writes ``bench/results/cpu/serve-loopback.json``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adagrpo.rewards.pictures import decoded, encoded
from adagrpo.rewards.remote import Remote
from adagrpo.run.machine import describe_machine, processor

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu" / "serve-loopback.json"
COUNT, SIDE = 10_000, 64
# 64 requests of one image, and 8 requests of 8 images.
FORMS = {"one image a request": (1, 64), "eight images a request": (8, 8)}


def pictures() -> torch.Tensor:
    """Smooth ones, no two of one brightness: JPEG keeps smooth pictures nearly as they are."""
    coarse = torch.rand(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").mul(255).round().to(torch.uint8)


@pytest.mark.proof
def test_ten_thousand_pictures() -> None:
    images, prompts = pictures(), ["a picture"] * COUNT
    truth = [float(decoded(encoded(image, "jpeg"), SIDE).double().mean()) / 255 for image in images]
    assert len(set(truth)) > 0.9 * COUNT
    code = "import sys; from adagrpo.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "brightness", "--port", "0", "--rows", "64", "--wait-ms", "2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record: dict = {
        "case": f"{COUNT} JPEG pictures of {SIDE} pixels through `adagrpo serve brightness` on loopback, 64 in flight"
    }
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        for form, (per_request, concurrency) in FORMS.items():
            remote = Remote(url, image="jpeg", per_request=per_request, limits={"concurrency": concurrency})
            started = time.perf_counter()
            found = remote(images, prompts)
            seconds = time.perf_counter() - started
            assert float((found - torch.tensor(truth, dtype=torch.float64)).abs().max()) < 1e-6
            record[form] = {
                "requests_in_flight": concurrency,
                "seconds": round(seconds, 2),
                "images_per_second": round(COUNT / seconds),
            }
        server.send_signal(signal.SIGTERM)
        assert f"{len(FORMS) * COUNT} images scored" in server.communicate(timeout=30)[0]
    finally:
        server.kill()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record |= {"load_average": load, "machine": describe_machine(torch.device("cpu")) | {"processor": processor()}}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
