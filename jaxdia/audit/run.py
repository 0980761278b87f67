"""Audits updates: what a server could see in them, with a proof of what it saw."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import msgspec
import numpy as np

from jaxdia import data, evaluation, updates
from jaxdia.attacks import Candidate
from jaxdia.audit.pipeline import AuditResult, audit
from jaxdia.audit.schema import Audit, Finding, Image, UpdateEntry
from jaxdia.audit.settings import KINDS, AuditSettings, validate
from jaxdia.client import Observation, Secret
from jaxdia.closed_form import NO_LABEL
from jaxdia.core.errors import InputError
from jaxdia.core.files import UnreadableFile, read_npz, write_json, write_npz
from jaxdia.core.trees import digest
from jaxdia.core.types import Params
from jaxdia.data import denormalize
from jaxdia.experiment.lock import Lock
from jaxdia.experiment.manifest import manifest
from jaxdia.experiment.network import create_model
from jaxdia.experiment.schema import decode
from jaxdia.models import DropoutModel


def run(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  *,
  say: Callable[[str], None] = print,
) -> Audit:
  """Audits the updates that a config names, and writes what came of it.

  In the work directory are afterwards `audit.json` and, for each update, `update_000.npz` with
  the images that were found as pixels. The same call goes on where it was interrupted, with the
  update that it was at.

  Args:
    config: of `jaxdia.audit.default_config`.
    workdir: made if needed.
    say: called with what a person should read.

  Returns:
    What audit.json holds.

  Raises:
    InputError: something about the input; nothing has been written then.
  """
  settings, workdir = validate(config), pathlib.Path(workdir)
  model = create_model(settings.model, settings.image_shape, settings.num_classes)
  sent = [
    updates.fit(model, updates.read(path), by_order=settings.by_order) for path in settings.before
  ]
  before = settings.each(tuple((updates.use_averages(model, fit.extra), fit) for fit in sent))
  labels = settings.each(settings.labels or (None,))
  truth = [_truth(settings, model, number) for number in range(len(settings.updates))]
  files = zip(settings.updates, before, labels, truth, strict=True)
  seen = [_read(settings, *known, path, *told) for path, known, *told in files]
  lock = Lock(workdir)
  lock.acquire()
  try:
    # In their places, as the files of images are.
    finished = dict(enumerate(_finished(workdir)))
    done: list[UpdateEntry] = []
    for number, one in enumerate(seen):
      pending = [other.name for other in seen[number + 1 :]]
      before_now = finished.get(number)
      if before_now is not None and _is_of(workdir, number, before_now.digest, one.digest):
        say(f"{one.name}: audited before")
        done.append(before_now)
      else:
        say(f"{one.name}: update {number + 1} of {len(seen)}")
        outcome = audit(
          jax.random.fold_in(jax.random.key(settings.seed), number),
          one.model,
          one.observation,
          seconds=settings.seconds,
          training=settings.mode == "training",
          rounding=one.rounding,
          say=lambda text: say(f"  {text}"),
        )
        update, arrays = _result(settings, one, outcome, truth[number])
        write_npz(images_path(workdir, number), arrays | {"digest": np.array(one.digest)})
        done.append(update)
      result = _write(workdir, settings, model, done, pending)
  finally:
    lock.release()
  return result


def _is_of(workdir: pathlib.Path, number: int, *digests: str) -> bool:
  """Returns whether the images of an update were found in the one that has these digests."""
  try:
    arrays = read_npz(images_path(workdir, number))
  except (OSError, UnreadableFile):
    return False
  images = arrays.get("images")
  is_whole = images is not None and images.dtype == np.float32 and images.ndim == 4
  return is_whole and set(digests) == {str(arrays.get("digest"))}


class _Seen(NamedTuple):
  """One update as it was read, and the network with the running averages before it."""

  name: str
  model: DropoutModel
  observation: Observation
  rounding: float
  findings: list[Finding]
  digest: str


def _read(
  settings: AuditSettings,
  model: DropoutModel,
  before: updates.Fit,
  path: str,
  labels: tuple[int, ...] | None,
  truth: Secret | None,
) -> _Seen:
  """Reads an update as a gradient; the truth is part of its digest, and of nothing else."""
  what = "params" if settings.after else "gradient"
  sent = updates.fit(model, updates.read(path), what, by_order=settings.by_order)
  decay = settings.weight_decay
  assumed: tuple[str, ...] = ()
  if settings.gradient:
    update = updates.from_gradient(before.tree, sent.tree, weight_decay=decay)
  else:
    make = updates.from_weights if settings.after else updates.from_difference
    rate, steps = settings.learning_rate or 1.0, settings.local_epochs * settings.local_steps
    update = make(before.tree, sent.tree, rate, local_steps=steps, weight_decay=decay)
    if settings.learning_rate is None:
      assumed += (
        "the learning rate is not known and taken as 1: if a factor of the update is found, it is"
        " the learning rate.",
      )
  assumed += update.assumed
  if settings.mode == "evaluation" and model.network.constants() and not before.extra:
    assumed += (
      "the file of weights holds no running averages, on which a gradient in evaluation mode"
      " depends: those that the network is made with are used.",
    )
  new = updates.find_averages(
    model,
    before.extra,
    {} if settings.gradient else sent.extra,
    is_difference=bool(settings.difference),
    local_steps=settings.local_epochs * settings.local_steps * settings.clients,
  )
  mean, std = settings.statistics
  observation = Observation(
    params=as_floats(before.tree),
    gradient=update.gradient,
    labels=labels,
    mean=mean,
    std=std,
    batch_size=settings.batch_size,
    loss=settings.loss,
    defence=settings.defence,
    averages=new.averages,
    local=settings.local,
  )
  # Of frozen layers and rounding the diagnosis says it.
  notes = dict.fromkeys((*before.notes, *sent.notes, *assumed, *new.notes))
  findings = [Finding(name="as read", effect="noted", text=note) for note in notes]
  name = pathlib.Path(path).name
  digest_now = _digest(settings, before, observation, truth)
  return _Seen(name, model, observation, update.rounding, findings, digest_now)


def as_floats(params: Params) -> Params:
  """Returns params as float32, or float64 if all are that: what networks are computed in.

  Args:
    params: of any floating-point types.
  """
  types = {np.asarray(leaf).dtype for leaf in jax.tree.leaves(params)}
  dtype = np.float64 if types == {np.dtype(np.float64)} else np.float32
  return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)


def _digest(
  settings: AuditSettings, before: updates.Fit, observation: Observation, truth: Secret | None
) -> str:
  """Returns the SHA-256 of an update and of all that its audit depends on."""
  known = settings.to_json()
  for name in ("before", "labels", "truth", *KINDS):
    del known[name]
  sha = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
  scored = None if truth is None else (truth.images, truth.labels)
  seen = (observation.params, observation.gradient, scored, observation.averages)
  sha.update(digest((seen, observation.labels, before.extra)).encode())
  return sha.hexdigest()


def _truth(settings: AuditSettings, model: DropoutModel, number: int) -> Secret | None:
  """Returns the images of an update's batch, to score against; they go nowhere else."""
  if settings.truth is None:
    return None
  source = settings.truth if ":" in settings.truth else f"npz:{settings.truth}"
  size = settings.batch_size
  truth = data.load(source, size, number * size, num_classes=settings.num_classes)
  if truth.images.shape[1:] != tuple(model.image_shape):
    raise InputError(
      f"the images of config.truth={settings.truth} have shape {truth.images.shape[1:]}; expected"
      f" {tuple(model.image_shape)} as config.image_shape."
    )
  images = data.normalize(truth.images, settings.statistics)
  return Secret(images, truth.labels, None)


def _result(
  settings: AuditSettings,
  one: _Seen,
  outcome: AuditResult,
  truth: Secret | None,
) -> tuple[UpdateEntry, dict[str, np.ndarray]]:
  """Returns the audit of an update, and its images as pixels, with the truth in their order."""
  found, model, size = outcome.found, one.model, settings.batch_size
  arrays = {"images": np.full((size, *model.image_shape), np.nan, np.float32)}
  if found is None:
    stops = [f.text for f in outcome.findings if f.effect == "stops"]
    reason = stops[0] if stops else "; ".join(a.outcome for a in outcome.attempts)
    images = [Image(verdict="none", by=None, residual=None, reason=reason)] * size
  else:
    shown = np.array([verdict != "none" for verdict in found.verdicts])
    pixels = np.clip(denormalize(found.images, settings.statistics), 0, 1)
    arrays["images"][shown] = pixels[shown]
    scores: list[dict[str, float | None]] = [{}] * size
    if truth is not None:
      candidate = Candidate(found.images, None, None)
      scored = evaluation.evaluate(
        model, truth, candidate, settings.statistics, found.labels, found=shown
      )
      place = np.argsort(scored.order)  # of each image that was found, among the originals
      arrays["truth"] = scored.originals[place]
      scores = [_numbers(scored.scores[i]) for i in place]
    images = [
      Image(
        verdict=found.verdicts[i],
        by=found.by[i] if shown[i] else None,
        residual=float(found.residuals[i]) if np.isfinite(found.residuals[i]) else None,
        reason=found.reasons[i],
        label=None if found.labels[i] == NO_LABEL else int(found.labels[i]),
        label_is_certain=bool(found.known_labels[i]),
        scores=scores[i],
      )
      for i in range(size)
    ]
  update = UpdateEntry(
    name=one.name,
    digest=one.digest,
    findings=[*one.findings, *outcome.findings],
    attempts=outcome.attempts,
    images=images,
    factor=found.factor if found else None,
    masks=found.masks if found else {},
  )
  return update, arrays


def _numbers(scores: dict[str, Any]) -> dict[str, float | None]:
  """Returns the scores of an image that are single numbers."""
  kept = {name: value for name, value in scores.items() if not isinstance(value, dict)}
  return {name: None if value is None else float(value) for name, value in kept.items()}


def _finished(workdir: pathlib.Path) -> list[UpdateEntry]:
  """Returns the updates that were audited before."""
  path = workdir / "audit.json"
  if not path.exists():
    return []
  try:
    return decode(path.read_bytes(), Audit).updates
  except (OSError, msgspec.DecodeError) as error:
    raise InputError(f"{path} is damaged ({error}). Delete it, or choose another workdir.") from (
      error
    )


def _write(
  workdir: pathlib.Path,
  settings: AuditSettings,
  model: DropoutModel,
  done: list[UpdateEntry],
  pending: list[str],
) -> Audit:
  sites = {site.name: float(site.rate) for site in model.sites}
  size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
  about = {"name": settings.model.name, "parameters": size, "sites": sites}
  audit = Audit(
    settings=settings.to_json(), model=about, updates=done, pending=pending, manifest=manifest()
  )
  write_json(workdir / "audit.json", msgspec.to_builtins(audit))
  return audit


def images_path(workdir: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the file with the images of an update.

  Args:
    workdir: of the audit.
    number: of the update, from 0.
  """
  return workdir / f"update_{number:03d}.npz"
