"""Run a model by torch, differentiably: `TorchModel` and `session`; a file for each kind of operators fills the table."""

from __future__ import annotations

from graphopt.run.torch.model import TorchModel, session
from graphopt.run.torch.table import TABLE, MissingOp

__all__ = ["TABLE", "MissingOp", "TorchModel", "session"]
