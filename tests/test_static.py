"""quantize{mode=static}: ranges from samples, integers in every multiply, and memory that does not grow with the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt.demo import embed
from graphopt.run.ort import session
from models import minilm, minilm_folder
from test_target_quantized import Lowered

Array = np.ndarray[Any, Any]
METHODS = ("minmax", "percentile", "mse", "entropy")
