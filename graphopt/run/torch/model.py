"""Run a model by torch: its graph as a module whose parameters are the weights, so that gradients, calibration and fine-tuning work on any model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.graph.questions import all_nodes
from graphopt.run import Feeds, Port, check_feeds, saved
from graphopt.run.torch.program import Program
from graphopt.run.torch.table import Function
from graphopt.run.torch.types import Tensor, to_array, to_tensor

if TYPE_CHECKING:
    import onnx

__all__ = ["TorchModel", "session"]

Edit = Callable[[Tensor], Tensor]


class TorchModel(torch.nn.Module):  # type: ignore[misc]
    """A graph as a differentiable torch module.

    Float initializers of more than one element are parameters; single numbers (a scale, an epsilon) and integers are buffers. A name with dots
    becomes nested modules, as torch writes names, so that `named_parameters`, `state_dict` and `torch.func.functional_call` work; `weights()` gives
    them by their names in the graph. The model that it came from is not changed; `write_back` puts the parameters into a graph.

    Args:
        model: best in normal form (`graphopt.load`); also any graph of standard operators at opset 18 to 28 without functions.
        trainable: names of the float initializers that get gradients; None: all parameters.
        dtype: what float32 becomes everywhere in the graph, e.g. torch.float64 to check a gradient by differences.
        ops: functions for operators that the table lacks, {(domain, op_type): function(*inputs, **attributes)}.

    Raises:
        MissingOp: an operator is not in the table.
        GraphoptError: `trainable` names what is no float initializer.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        trainable: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
        ops: Mapping[tuple[str, str], Function] | None = None,
    ) -> None:
        super().__init__()
        self._program = Program(model.graph, model.opset_imports, ops or {}, dtype)
        self._dtype = dtype
        loose = [str(v.name) for v in self._program.captured if v.const_value is None]
        if loose:
            raise TargetError(f"the graph reads `{loose[0]}` before it is made; load the model by graphopt.load, which sorts it")
        defaults = {str(v.name) for v in model.graph.inputs if v.is_initializer()}
        self.inputs = tuple(Port.of(v) for v in model.graph.inputs if v.name not in defaults)
        self.outputs = tuple(Port.of(v) for v in model.graph.outputs)
        self._kinds = [v.dtype for v in model.graph.outputs]
        self._defaults = frozenset(defaults)
        self._feedable = {str(v.name): place for v, place in zip(model.graph.inputs, self._program.input_places, strict=True)}
        self._inner = frozenset(str(v.name) for n in all_nodes(model) if n.graph is not model.graph for v in n.outputs)
        self._names: dict[str, tuple[torch.nn.Module, str]] = {}
        self._stored: list[tuple[dict[str, Any], str, int]] = []  # (parameters or buffers of a module, key, place)
        given = [pair for pair in zip(model.graph.inputs, self._program.input_places, strict=True) if pair[0].is_initializer()]
        stored = zip(self._program.captured, self._program.captured_places, strict=True)
        self._add_weights([*stored, *given], None if trainable is None else set(trainable))
        del self._program.captured

    def _add_weights(self, values: Iterable[tuple[ir.Value, int]], trainable: set[str] | None) -> None:
        unknown = set(trainable or ())
        for value, place in values:
            name, tensor = str(value.name), self._tensor(value)
            floating = tensor.is_floating_point() and tensor.dtype.itemsize > 1
            wanted = floating and (tensor.numel() > 1 if trainable is None else name in trainable)
            unknown -= {name} if floating else set()
            module, key = self._home(name)
            if wanted or (floating and tensor.numel() > 1):
                module.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=wanted))
                self._names[name] = (module, key)
            else:
                module.register_buffer(key, tensor)
            self._stored.append((module._parameters if key in module._parameters else module._buffers, key, place))
        if unknown:
            raise GraphoptError(f"trainable names `{min(unknown)}`, which is no float initializer that the graph reads")

    def _tensor(self, value: ir.Value) -> Tensor:
        """A copy: an optimizer or load_state_dict writes in place."""
        assert value.const_value is not None
        try:
            tensor = to_tensor(value.const_value.numpy()).clone()
        except TargetError as error:
            raise TargetError(f"the initializer `{value.name}`: {error}") from error
        return tensor.to(self._dtype) if tensor.dtype == torch.float32 else tensor

    def _home(self, name: str) -> tuple[torch.nn.Module, str]:
        """The module and the key under which a weight is kept; what torch cannot name so gets underscores."""
        *path, key = (part or "_" for part in name.split("."))
        module: torch.nn.Module = self
        for part in path:
            while hasattr(module, part) and part not in module._modules:
                part += "_"
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        while hasattr(module, key):
            key += "_"
        return module, key

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """The parameters by the names of their initializers."""
        return {name: module._parameters[key] for name, (module, key) in self._names.items()}

    def forward(self, feeds: Mapping[str, Tensor], *, observe: Iterable[str] = (), edit: Mapping[str, Edit] | None = None) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            feeds: the inputs by name, also weights that are inputs with a default.
            observe: names of values of the main graph (inputs and weights too) that are returned beside the outputs.
            edit: {name: function}: the value is replaced by function(value) as soon as it is there. A mask on heads or neurons is one:
                `edit={"ffn": lambda h: h * mask}`, and mask.grad tells what each neuron is worth.

        Returns:
            the outputs in their order, then what was observed (after its edit).

        Raises:
            TargetError: an input is missing or unknown, or a node failed; one line.
            GraphoptError: a name in `observe` or `edit` is not a value of the main graph.
        """
        self._check(feeds)
        observe = tuple(observe)
        hooks, seen = self._hooks(observe, edit or {})
        frame: list[Any] = [None] * self._program.size
        for store, key, place in self._stored:
            frame[place] = store[key]
        for name, tensor in feeds.items():
            frame[self._feedable[name]] = self._retyped(tensor)
        for place in hooks:
            if frame[place] is not None:
                frame[place] = hooks[place](frame[place])
        self._program.run(frame, hooks)
        outputs = {port.name: frame[place] for port, place in zip(self.outputs, self._program.output_places, strict=True)}
        return outputs | {name: seen[name] for name in dict.fromkeys(observe)}

    def _retyped(self, tensor: Any) -> Any:
        if isinstance(tensor, list):
            return [self._retyped(part) for part in tensor]
        return tensor.to(self._dtype) if tensor.dtype == torch.float32 else tensor

    def _check(self, feeds: Mapping[str, Any]) -> None:
        if len(feeds) != len(self.inputs) or any(port.name not in feeds for port in self.inputs):
            check_feeds({k: v for k, v in feeds.items() if k not in self._defaults}, self.inputs)

    def _hooks(self, observe: tuple[str, ...], edit: Mapping[str, Edit]) -> tuple[dict[int, Callable[[Any], Any]], dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        hooks: dict[int, Callable[[Any], Any]] = {}

        def kept(name: str) -> Callable[[Any], Any]:
            change = edit.get(name)

            def hook(value: Any) -> Any:
                value = value if change is None else change(value)
                if name in watched:
                    seen[name] = value
                return value

            return hook

        watched = set(observe)
        for name in dict.fromkeys((*watched, *edit)):
            if name not in self._program.place:
                where = "is computed inside a subgraph, where it cannot be seen" if name in self._inner else "is no value of the graph"
                raise GraphoptError(f"`{name}` {where}; observe and edit take values of the main graph")
            hooks[self._program.place[name]] = kept(name)
        return hooks, seen

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs by name, in order, as arrays and without gradients: the interface of `run.ort.OrtSession`.

        Raises:
            TargetError: an input is missing or unknown, or a node failed; one line.
        """
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
        with torch.no_grad():
            outputs = self({name: _tensors(array, device) for name, array in feeds.items()})
        return {name: _arrays(value, kind) for (name, value), kind in zip(outputs.items(), self._kinds, strict=True)}

    def write_back(self, model: ir.Model) -> int:
        """Put the parameters into the initializers of the same names; what did not change stays the tensor that it was.

        Returns:
            how many initializers changed.

        Raises:
            GraphoptError: the graph lacks one of them, or it has another shape there.
        """
        changed = 0
        for name, parameter in self.weights().items():
            value = model.graph.initializers.get(name)
            if value is None or value.const_value is None:
                raise GraphoptError(f"the graph has no initializer `{name}`; write back into the model that the parameters came from")
            old = value.const_value
            new = to_array(parameter, old.dtype)
            if tuple(old.shape) != new.shape:
                raise GraphoptError(f"the initializer `{name}` is {list(old.shape)} in the graph and {list(new.shape)} here")
            if np.array_equal(old.numpy(), new):
                continue
            value.const_value = ir.tensor(new.copy(), dtype=old.dtype, name=name)
            changed += 1
        return changed


def session(model: ir.Model | onnx.ModelProto | bytes | str | os.PathLike[str]) -> TorchModel:
    """Load a model (a graph, a ModelProto, its bytes, or a file) to run it without gradients.

    Raises:
        MissingOp: an operator is not in the table.
        TargetError: the model cannot be read; one line.
    """
    return TorchModel(_graph(model), trainable=())


def _graph(model: Any) -> ir.Model:
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        return ir.load(saved(model))
    if isinstance(model, bytes):
        import onnx

        model = onnx.load_model_from_string(model)
    graph: ir.Model = ir.from_proto(model)
    return graph


def _tensors(array: Any, device: torch.device | None) -> Any:
    """A sequence of tensors is a list."""
    return [_tensors(part, device) for part in array] if isinstance(array, list) else to_tensor(np.asarray(array)).to(device)


def _arrays(value: Any, kind: ir.DataType | None) -> Any:
    return [_arrays(part, kind) for part in value] if isinstance(value, list) else to_array(value, kind)
