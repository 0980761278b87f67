r"""A round of federated learning with Flower, whose updates the server catches and audits.

Two clients train a network with dropout on four handwritten digits each, one step of SGD, and send
their new weights, as Flower's clients do. The server, which may be curious, writes what it sent and
what came back to files. The audit knows the network, these files, and what the server itself chose:
learning rate and batch size. It knows no images, labels or masks.

  pip install -e ".[examples]"
  python examples/flower_digits.py --workdir=runs/flower
  python examples/flower_digits.py --framework=torch --workdir=runs/flower_torch

The second needs PyTorch too (the extra torch). Flower's simulation runs the clients in processes of
their own; FLWR_TELEMETRY_ENABLED=0 in the environment keeps it from reporting that it was used.
"""

import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from digits_nets import IMAGE_SHAPE, NUM_CLASSES, Net, torch_net
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from sklearn.datasets import load_digits

from jaxdia import closed_form, evaluation, models, updates
from jaxdia.attacks import Candidate
from jaxdia.client import Observation, Secret
from jaxdia.core.types import Params, Statistics
from jaxdia.experiment.grid import write_grid

_FRAMEWORK = flags.DEFINE_enum("framework", "flax", ["flax", "torch"], "What the clients train in.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/flower", "Folder for the files and the picture.")

NUM_CLIENTS, BATCH_SIZE, LEARNING_RATE = 2, 4, 0.1
PIXELS = Statistics(mean=(0.0,), std=(1.0,))  # images are not normalised

Train = Callable[[ArrayRecord, int], ArrayRecord]


def digits_of(client: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images f[B, 8, 8, 1] in [0, 1] and the labels i[B] that a client trains on."""
  digits = load_digits()
  mine = slice(client * BATCH_SIZE, (client + 1) * BATCH_SIZE)
  return digits.images[mine, :, :, None].astype(np.float32) / 16, digits.target[mine]


def initial_params() -> Params:
  """Returns params for clients that train in Flax to begin with."""
  return Net().init(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)), train=False)["params"]


def record_of(params: Params) -> ArrayRecord:
  """Returns params as Flower sends them, by their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  return ArrayRecord(
    {n: Array(np.asarray(leaf)) for n, (_, leaf) in zip(names, leaves, strict=True)}
  )


def train_flax(arrays: ArrayRecord, client: int) -> ArrayRecord:
  """Takes one step in Flax, with Flax's own dropout."""
  images, labels = digits_of(client)
  structure = jax.tree.structure(jax.eval_shape(initial_params))
  params = jax.tree.unflatten(structure, [jnp.asarray(a) for a in arrays.to_numpy_ndarrays()])

  def loss(params):
    logits = Net().apply({"params": params}, images, rngs={"dropout": jax.random.key(client)})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  gradient = jax.grad(loss)(params)
  return record_of(jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradient))


def train_torch(arrays: ArrayRecord, client: int) -> ArrayRecord:
  """Takes one step in PyTorch, with PyTorch's own dropout."""
  import torch

  images, labels = digits_of(client)
  net = torch_net()
  net.load_state_dict(arrays.to_torch_state_dict())
  torch.manual_seed(client)
  optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
  logits = net.train()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
  torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
  optimizer.step()
  return ArrayRecord(net.state_dict())


def client_app(train: Train) -> ClientApp:
  """Returns Flower's app of the clients."""
  clients = ClientApp()

  @clients.train()
  def _(message: Message, context: Context) -> Message:
    client = context.node_config["partition-id"]
    arrays = train(message.content["arrays"], client)
    metrics = MetricRecord({"num-examples": BATCH_SIZE, "client": client})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

  return clients


class CuriousServer(FedAvg):
  """Federated averaging that writes down what it sends and what comes back."""

  def __init__(self, folder: pathlib.Path):  # noqa: D107
    super().__init__(fraction_evaluate=0.0)
    self.folder = folder

  def configure_train(
    self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
  ) -> Iterable[Message]:
    """Sends the weights."""
    np.savez(self.folder / "before.npz", **updates.from_flower(arrays))
    return super().configure_train(server_round, arrays, config, grid)

  def aggregate_train(
    self, server_round: int, replies: Iterable[Message]
  ) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Averages what came back."""
    replies = list(replies)
    for reply in replies:
      client = reply.content["metrics"]["client"]
      np.savez(self.folder / f"after_{client}.npz", **updates.from_flower(reply))
    return super().aggregate_train(server_round, replies)


def simulate(folder: pathlib.Path, train: Train, initial: ArrayRecord) -> None:
  """Runs one round, whose weights are then in files of the folder."""
  server = ServerApp()

  @server.main()
  def _(grid: Grid, context: Context) -> None:
    del context
    CuriousServer(folder).start(grid, initial, num_rounds=1)

  run_simulation(server, client_app(train), NUM_CLIENTS)


def audit(before: pathlib.Path, after: pathlib.Path) -> closed_form.Recovery:
  """Returns what two files of weights give away of a client's images."""
  model = models.from_flax(Net(), IMAGE_SHAPE)
  old, new = (updates.fit(model, updates.read(path)) for path in (before, after))
  update = updates.from_weights(old.tree, new.tree, LEARNING_RATE)
  for note in dict.fromkeys((*old.notes, *new.notes, *update.notes)):
    print(f"note: {note}")
  observation = Observation(
    old.tree, update.gradient, None, PIXELS.mean, PIXELS.std, batch_size=BATCH_SIZE
  )
  return closed_form.recover(jax.random.key(0), model, observation)


def main(_: list[str]) -> None:
  """Runs one round, audits each client's update, and compares with the truth."""
  folder = pathlib.Path(_WORKDIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  if _FRAMEWORK.value == "flax":
    simulate(folder, train_flax, record_of(initial_params()))
  else:
    simulate(folder, train_torch, ArrayRecord(torch_net().state_dict()))
  model = models.from_flax(Net(), IMAGE_SHAPE)
  originals, found = [], []
  for client in range(NUM_CLIENTS):
    recovery = audit(folder / "before.npz", folder / f"after_{client}.npz")
    truth = Secret(*digits_of(client), None)
    candidate = Candidate(recovery.parts.images, None, None)
    is_found = np.asarray(recovery.parts.verdict) > 0
    scored = evaluation.evaluate(model, truth, candidate, PIXELS, found=is_found)
    originals.append(scored.originals)
    found.append(scored.reconstructions)
    errors = ", ".join(f"{score['mse_normalized'] or np.nan:.1e}" for score in scored.scores)
    print(f"client {client}: {recovery.summary()}; MSE {errors}")
  rows = {"rebuilt": np.concatenate(found)}
  write_grid(folder / "rebuilt.png", np.concatenate(originals), rows, {})
  print(f"picture: {folder / 'rebuilt.png'}")
  files = ",".join(str(folder / f"after_{client}.npz") for client in range(NUM_CLIENTS))
  network = "Net" if _FRAMEWORK.value == "flax" else "torch_net"
  print(
    f"for a report: python launch/audit.py --config=configs/audit.py"
    f" --config.model.name=examples.digits_nets:{network} '--config.image_shape={IMAGE_SHAPE}'"
    f" --config.num_classes={NUM_CLASSES} --config.before={folder / 'before.npz'}"
    f" --config.after={files} --config.learning_rate={LEARNING_RATE}"
    f" --config.batch_size={BATCH_SIZE} --workdir={folder / 'audit'}"
  )


if __name__ == "__main__":
  app.run(main)
