"""Train a network in front of a classifier that is only known by its answers over HTTP, in seconds of one CPU core.

A nearest-neighbours classifier of scikit-learn knows handwritten digits and is served on this machine. It has no
gradient, and a client sees nothing of it but class probabilities. A new camera adds a gray veil and noise, and many
digits are no longer recognised. A small denoiser in torch learns to clean them, from the probabilities alone: each step
asks for the answers to a population of perturbed denoisers, all at the same time, and a step whose service does not
answer is skipped.

    python examples/black_box.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import Summary, ZeroOrder, retrying

SIDE = 8


def served(classifier: KNeighborsClassifier) -> ThreadingHTTPServer:
    """Serves class probabilities on a free port: a list of images comes in, a list of lists goes out."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(classifier.predict_proba(images).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def client(port: int) -> Callable[[list[list[float]]], Tensor]:
    """Returns a function that asks the service for class probabilities; it asks again if it fails."""

    def ask(images: list[list[float]]) -> Tensor:
        request = urllib.request.Request(f"http://127.0.0.1:{port}", json.dumps(images).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            return torch.tensor(json.load(answer))

    return retrying(ask, retries=2, pause=0.1)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.layers(images.view(-1, 1, SIDE, SIDE)).view_as(images)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--noise", type=float, default=0.1, help="Standard deviation of the noise on the pixels.")
    args = parser.parse_args()
    torch.manual_seed(0)

    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    neighbours = KNeighborsClassifier(15).fit(images[:900].numpy(), labels[:900].numpy())
    server = served(neighbours)
    ask = client(server.server_port)

    noisy = (0.5 + 0.25 * images + args.noise * torch.randn(images.shape)).clamp(0, 1)
    train, test = slice(900, 1400), slice(1400, None)
    denoiser = Denoiser()
    with torch.no_grad():
        denoiser.layers[2].weight.mul_(0.1)  # it begins by changing little

    def accuracy(inputs: Tensor) -> float:
        return float((ask(inputs.tolist()).argmax(1) == labels[test]).float().mean())

    print(f"accuracy on clean digits {accuracy(images[test]):.3f}, by the new camera {accuracy(noisy[test]):.3f}")

    zo = ZeroOrder(
        denoiser,
        estimator={"name": "es", "shaping": "ranks", "antithetic": True},
        num_probes=args.population // 2,
        maximize=True,
        eps=0.03,
        lr=args.lr,
    )
    summary = Summary()
    zo.listeners.append(summary.add)
    schedule = torch.optim.lr_scheduler.LinearLR(zo.optimizer, 1.0, 0.1, args.steps)
    for step in range(args.steps):
        rows = torch.randint(train.start, train.stop, (64,))

        async def score(rows: Tensor = rows) -> Tensor:
            clean = denoiser(noisy[rows]).tolist()
            probabilities = await asyncio.to_thread(ask, clean)  # the others compute and ask meanwhile
            right = probabilities[torch.arange(len(rows)), labels[rows]]
            return right.clamp_min(0.01).log().mean()

        zo.step(score)
        schedule.step()
        if step % 20 == 19 or step == args.steps - 1:
            line = summary.numbers()
            with torch.no_grad():
                found = accuracy(denoiser(noisy[test]))
            print(
                f"step {step + 1:4d}  score {line['zo_score_mean']:.3f} (members: {line['zo_score_min']:.3f} to "
                f"{line['zo_score_max']:.3f})  accuracy {found:.3f}"
            )
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
