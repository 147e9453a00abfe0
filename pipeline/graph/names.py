"""Names that a reader recognises and that stay the same when the network is exported again."""

from __future__ import annotations

import ast
import re
from collections import deque

import onnx
import onnx_graphsurgeon as gs

from pipeline.graph.base import STANDARD, Fired, Pass, PassResult, is_sparse, is_standard
from pipeline.graph.shapes import unique

WEIGHT = re.compile(r"^(?P<stem>[^:/]+)\.weight$")
# "/inc/double_conv/double_conv.0/Conv", as the TorchScript exporter names nodes.
SCOPE = re.compile(r"^/(?P<modules>.+)/[^/]+$")
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
ROLES = {"Conv": ("input", "weight", "bias"), "ConvTranspose": ("input", "weight", "bias")}


class StableNames(Pass):
    """1. A node that reads an initializer ``<module>.weight`` is called ``<module>``; a Conv or ConvTranspose whose
       weight has a made-up name (``onnx::Conv_205``) takes the module path from its own name (TorchScript) or from
       the exporter's metadata (dynamo).
    2. Every other node is called ``<nearest named producer>.<operator>``; nearest by the number of nodes between, and
       of equally near ones the one that the first input leads to. Without one: the graph input's name comes first.
    3. A node's result is called like the node; the second, third, … ``<node>.output1``, ``<node>.output2``.
    4. Initializers are called ``<first reader>.<role>``: weight and bias for convolutions, otherwise the operator's
       own name for that input.
    5. Where a name is taken, ``_1``, ``_2``, … in topological order makes it unique.
    6. The metadata keep the first name of every node result that is renamed (``promises.read_raw_names``): older
       calibration caches speak in these.

    Not: graph inputs and outputs, sparse initializers, anything inside subgraphs and functions.
    """

    name = "stable-names"

    def call(self, graph: gs.Graph) -> PassResult:
        taken = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for part in graph.subgraphs(recursive=True):
            taken |= {t.name for n in part.nodes for t in n.outputs} | {t.name for t in part.inputs}
        outer = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
        names = self._nodes(graph, taken)
        fired = [("node", names[id(node)]) for node in graph.nodes if node.name != names[id(node)]]
        first: dict[str, str] = {}
        for node in graph.nodes:
            node.name = names[id(node)]
            for position, tensor in enumerate(node.outputs):
                if tensor.is_empty() or id(tensor) in outer:
                    continue
                wanted = node.name if position == 0 else unique(f"{node.name}.output{position}", taken)
                old = tensor.name
                fired += _rename(tensor, wanted)
                raw = graph.raw_names.get(old, old)
                if raw != wanted and (old in graph.raw_names or old in graph.imported_names):
                    first[wanted] = raw
        graph.raw_names = first
        return PassResult.of(fired + self._initializers(graph, taken, outer))

    def _nodes(self, graph: gs.Graph, taken: set[str]) -> dict[int, str]:
        names: dict[int, str] = {}
        for node in graph.nodes:
            stem = _module(node)
            if stem:
                names[id(node)] = unique(stem, taken)
        stems = dict(names)
        inputs = {id(tensor): tensor.name for tensor in graph.inputs}
        for node in graph.nodes:
            if id(node) not in names:
                producer = _nearest(node, stems, inputs)
                names[id(node)] = unique(f"{producer}.{node.op.lower()}" if producer else node.op.lower(), taken)
        return names

    @staticmethod
    def _initializers(graph: gs.Graph, taken: set[str], outer: set[int]) -> list[Fired]:
        fired: list[Fired] = []
        done: set[int] = set()
        for node in graph.nodes:
            for slot, tensor in enumerate(node.inputs):
                if not isinstance(tensor, gs.Constant) or is_sparse(tensor) or id(tensor) in done | outer:
                    continue
                done.add(id(tensor))
                own = tensor.name.startswith(f"{node.name}.") and tensor.name not in taken and node.op not in ROLES
                suffix = tensor.name[len(node.name) + 1 :] if own else _role(node, slot, graph.opset)
                fired += _rename(tensor, unique(f"{node.name}.{suffix}", taken))
        return fired


def _module(node: gs.Node) -> str:
    """Module path of a node with weights; empty for nodes without, and where nothing tells it."""
    for tensor in node.inputs:
        match = WEIGHT.match(tensor.name) if isinstance(tensor, gs.Constant) else None
        if match:
            return match["stem"]
    if not is_standard(node, "Conv", "ConvTranspose"):
        return ""
    match = SCOPE.match(node.name)
    if match:
        return _joined(match["modules"].split("/"))
    origin = getattr(node, "origin", None)
    for entry in origin.metadata_props if origin is not None else ():
        if entry.key == SCOPES_KEY:
            return _from_metadata(entry.value)
    return ""


def _joined(modules: list[str]) -> str:
    """["inc", "double_conv", "double_conv.0"] -> "inc.double_conv.0": a child of a Sequential repeats its parent."""
    kept: list[str] = []
    for module in modules:
        if kept and module.startswith(f"{kept[-1]}."):
            kept.pop()
        kept.append(module)
    return ".".join(kept)


def _from_metadata(text: str) -> str:
    """ "['', 'inc', 'inc.double_conv.0', 'conv2d']" -> "inc.double_conv.0": the last entry is the operator."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def _nearest(node: gs.Node, stems: dict[int, str], inputs: dict[int, str]) -> str:
    """Name of the nearest producer in ``stems``, or of a graph input where no such producer is upstream."""
    queue, seen, fallback = deque([node]), {id(node)}, ""
    while queue:
        for tensor in queue.popleft().inputs:
            fallback = fallback or inputs.get(id(tensor), "")
            for producer in tensor.inputs:
                if id(producer) in stems:
                    return stems[id(producer)]
                if id(producer) not in seen:
                    seen.add(id(producer))
                    queue.append(producer)
    return fallback


def _role(node: gs.Node, slot: int, opset: int) -> str:
    if is_standard(node, *ROLES) and slot < len(ROLES[node.op]):
        return ROLES[node.op][slot]
    if node.domain in STANDARD:
        try:
            formal = onnx.defs.get_schema(node.op, opset, "").inputs
        except onnx.defs.SchemaError:
            return f"input{slot}"
        if slot < len(formal) and formal[slot].option != onnx.defs.OpSchema.FormalParameterOption.Variadic:
            return formal[slot].name.lower()
    return f"input{slot}"


def _rename(tensor: gs.Tensor, name: str) -> list[Fired]:
    if tensor.name == name:
        return []
    tensor.name = name
    return [("tensor", name)]
