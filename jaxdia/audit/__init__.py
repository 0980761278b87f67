"""Audits of real updates: what a server could see, and how sure that is."""

from jaxdia.audit.pipeline import AuditResult, audit
from jaxdia.audit.run import images_path, run
from jaxdia.audit.settings import AuditSettings, default_config, validate

__all__ = [
  "AuditResult",
  "AuditSettings",
  "audit",
  "default_config",
  "images_path",
  "run",
  "validate",
]
