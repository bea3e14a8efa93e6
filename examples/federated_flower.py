"""Federated fine-tuning on Flower: clients send a few numbers per round, and never weights or gradients. Offline.

    pip install flwr
    python examples/federated_flower.py

As in FedKSeed (arXiv 2312.06353) and DeComFL (arXiv 2405.15861): in each round the clients that are present measure how
their own loss changes along a few directions, which everyone derives from the round's number. They send these
coefficients; the server averages them and keeps the list. Everybody's weights follow from it: a client that was absent
for some rounds gets the coefficients that it has missed, and repeats those steps, to the same bits.

The two apps are Flower's own, a ServerApp and a ClientApp. Here they talk within one process, through a `Grid` that
passes messages on; in a deployment ``flwr run`` starts them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a clone works before it is installed

from zo_core import Probe, ZeroOrder

CLIENTS, PRESENT, DIRECTIONS, ROWS = 8, 3, 4, 64


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images, the same images shifted by one pixel, and what they show."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).view(-1, 64) / 16
    return images, images.view(-1, 8, 8).roll(1, dims=2).reshape(-1, 64), torch.tensor(data.target)


def base_model() -> nn.Module:
    """What everyone starts from: a classifier that was trained on images that are not shifted."""
    images, _, wanted = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(images), wanted).backward()
        optimizer.step()
    return model


class Replica:
    """A model, and the rounds that it has applied."""

    def __init__(self, lr: float) -> None:
        self.model = base_model()
        self.zo = ZeroOrder(self.model, lr=lr, eps=1e-3, num_probes=DIRECTIONS)

    def seeds(self) -> list[int]:
        """Those of the next round's directions."""
        return [self.zo.noise.seed(self.zo.seed, self.zo.step_count, index) for index in range(DIRECTIONS)]

    def follow(self, coefficients: np.ndarray) -> None:
        """Applies rounds, given their coefficients ``[rounds, DIRECTIONS]``."""
        for each in coefficients:
            probes = tuple(Probe(seed, float(value)) for seed, value in zip(self.seeds(), each, strict=True))
            self.zo.repeat(probes, loss=0.0)
            self.zo.optimizer.step()

    def measure(self, images: Tensor, wanted: Tensor) -> np.ndarray:
        """The coefficients of the next round for these rows; moves nothing."""
        losses = self.zo.losses([lambda: F.cross_entropy(self.model(images), wanted)])[0]
        self.zo.discard()
        estimate = self.zo.estimator.estimate([float(loss) for loss in losses], self.zo.eps)
        return np.array(estimate.coefficients, dtype=np.float32) / DIRECTIONS


# The client

client = ClientApp()
replicas: dict[int, Replica] = {}  # what each client keeps between rounds


@client.train()
def train(message: Message, context: Context) -> Message:
    """Catches up, and measures a round on the client's own rows."""
    node, task = context.node_id, message.content["task"]
    if node not in replicas:
        replicas[node] = Replica(float(task["lr"]))
    replica = replicas[node]
    missed = np.frombuffer(task["missed"], dtype=np.float32).reshape(-1, DIRECTIONS)
    replica.follow(missed)

    _, shifted, wanted = digits()
    mine = torch.nonzero(wanted % CLIENTS == node % CLIENTS)[:, 0]  # clients have other digits than others
    rows = mine[torch.randint(0, len(mine), (ROWS,), generator=torch.Generator().manual_seed(replica.zo.step_count))]
    found = replica.measure(shifted[rows], wanted[rows])
    return Message(RecordDict({"found": ConfigRecord({"coefficients": found.tobytes()})}), reply_to=message)


# The server

server = ServerApp()
report: dict[str, Any] = {}


@server.main()
def lead(grid: Grid, context: Context) -> None:
    """Averages coefficients, and counts what is sent."""
    rounds, lr = int(context.run_config["rounds"]), float(context.run_config["lr"])
    own, history = Replica(lr), np.zeros((0, DIRECTIONS), dtype=np.float32)
    known: dict[int, int] = {}  # how many rounds each client has applied
    up = down = 0
    for number in range(rounds):
        nodes = sorted(grid.get_node_ids())
        chosen = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(number))[:PRESENT].tolist()
        messages = []
        for node in (nodes[index] for index in chosen):
            missed = history[known.get(node, 0) :]
            task = ConfigRecord({"lr": lr, "missed": missed.tobytes()})
            messages.append(Message(RecordDict({"task": task}), dst_node_id=node, message_type="train"))
            known[node], down = number, down + len(task.deflate())
        found = []
        for reply in grid.send_and_receive(messages):
            record = reply.content["found"]
            up += len(record.deflate())
            found.append(np.frombuffer(record["coefficients"], dtype=np.float32))
        update = np.mean(found, axis=0, dtype=np.float64).astype(np.float32)[None]
        own.follow(update)
        history = np.concatenate([history, update])
    report.update(model=own.model, history=history, known=known, up=up / rounds, down=down / rounds)


class InProcess(Grid):
    """Passes the messages of a ServerApp to a ClientApp in the same process."""

    def __init__(self, app: ClientApp) -> None:
        self.app, self.replies = app, dict[str, Message]()
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0  # as Flower's engine tells a ServerApp
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, CLIENTS + 1)}

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, content: Any, message_type: str, dst_node_id: int, *args: Any, **kwargs: Any) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for index, message in enumerate(messages):
            self.replies[str(index)] = self.app(message, self.contexts[message.metadata.dst_node_id])
        return list(self.replies)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(each) for each in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-2)
    args = parser.parse_args()
    replicas.clear()
    _, shifted, wanted = digits()

    def accuracy(model: nn.Module) -> float:
        return float((model(shifted).argmax(1) == wanted).float().mean())

    server(InProcess(client), Context(1, 0, {}, RecordDict(), {"rounds": args.rounds, "lr": args.lr}))
    model, history = report["model"], report["history"]
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    print(f"{CLIENTS} clients, {PRESENT} of them in each of {args.rounds} rounds, {DIRECTIONS} directions a round")
    print(f"accuracy {accuracy(base_model()):.3f}, then {accuracy(model):.3f}")
    print(f"bytes a round, of all {PRESENT}: {report['up']:.0f} to the server, {report['down']:.0f} from it")
    print(f"the weights, which are not sent: {PRESENT * size} each way")
    for node, replica in replicas.items():
        replica.follow(history[report["known"][node] :])
    same = all(
        torch.equal(a, b)
        for replica in replicas.values()
        for a, b in zip(replica.model.parameters(), model.parameters(), strict=True)
    )
    print(f"all clients hold the server's weights after they have caught up: {same}")


if __name__ == "__main__":
    main()
