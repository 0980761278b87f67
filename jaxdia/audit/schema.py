"""What audit.json holds."""

from typing import Any

import msgspec

# How sure it is that an image is the client's, the surest first; in words for people.
VERDICTS = {
  "certain": "the update determines this image, and the image explains the update",
  "likely": "searches from two starts found it, and it explains nearly all of the update",
  "partial": "it explains a part of the update, or two searches found it in part",
  "none": "nothing was found that explains the update, or each search found something else",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
  """Something about an update that is not as it was said to be, or that limits what it tells.

  Attributes:
    name: what it is, such as "sign".
    effect: "mended" if it was put right, "noted" if not needed, "stops" if the update cannot be
      audited as it is.
    text: for a person: what was seen, and what follows.
    value: the number that was found, if it is one.
  """

  name: str
  effect: str
  text: str
  value: float | None = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
  """Something that was tried on an update.

  Attributes:
    name: of the attack.
    outcome: for a person.
    seconds: that it took, compilation included.
    residual: share of the update that its result leaves unexplained; None if it gave nothing that
      could be held against the whole update.
    iterations: of a search.
  """

  name: str
  outcome: str
  seconds: float
  residual: float | None = None
  iterations: int | None = None


class Image(msgspec.Struct, frozen=True, kw_only=True):
  """One image of an update's batch.

  Attributes:
    verdict: a key of `VERDICTS`.
    by: the attempt that found it; None if none did.
    residual: share of the update, or of the layer that tells the image, left unexplained.
    reason: why the verdict is this one.
    label: its class; None if it is not known.
    label_is_certain: whether the label is known to be this image's.
    scores: against the truth, where that was given.
  """

  verdict: str
  by: str | None
  residual: float | None
  reason: str
  label: int | None = None
  label_is_certain: bool = False
  scores: dict[str, float | None] = {}


class UpdateEntry(msgspec.Struct, frozen=True, kw_only=True):
  """The audit of one update.

  Attributes:
    name: of the file that it came in.
    digest: SHA-256 of what was audited.
    findings: of the diagnosis.
    attempts: in the order in which they were made.
    images: of the batch.
    factor: by which the update exceeds the gradient of the stated loss, if it is known.
    masks: share of the entries of each dropout mask that are known for certain, by site.
  """

  name: str
  digest: str
  findings: list[Finding]
  attempts: list[Attempt]
  images: list[Image]
  factor: float | None = None
  masks: dict[str, float] = {}

  def count(self, *verdicts: str) -> int:
    """Returns how many images have one of these verdicts."""
    return sum(image.verdict in verdicts for image in self.images)


class Audit(msgspec.Struct, frozen=True, kw_only=True):
  """All of audit.json.

  Attributes:
    settings: what was asked, resolved.
    model: what is to be known of the network, for people: name, parameters, dropout sites, ...
    updates: that are done.
    pending: names of those that are not yet.
    manifest: command, versions and device.
  """

  settings: dict[str, Any]
  model: dict[str, Any]
  updates: list[UpdateEntry]
  pending: list[str]
  manifest: dict[str, Any]
