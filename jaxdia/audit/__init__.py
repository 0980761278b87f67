"""Audits of real updates: what a server could see, and how sure that is."""

from jaxdia.audit.pipeline import Outcome, audit
from jaxdia.audit.run import images_path, run
from jaxdia.audit.settings import AuditSettings, default_config, validate

__all__ = ["AuditSettings", "Outcome", "audit", "default_config", "images_path", "run", "validate"]
