"""``model.onnx`` beside this file on ONNX Runtime's CPU provider, for Triton's Python backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


class TritonPythonModel:
    """What Triton's Python backend loads."""

    def initialize(self, args: dict[str, str]) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # the arithmetic that was validated
        model = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.batches = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request; Triton puts requests of one shape together where the batch is free."""
        import triton_python_backend_utils as triton

        feeds = [{n: triton.get_input_tensor_by_name(one, n).as_numpy() for n in self.inputs} for one in requests]
        if self.batches:
            ends = np.cumsum([len(one[self.inputs[0]]) for one in feeds])[:-1]
            joined = {name: np.concatenate([one[name] for one in feeds]) for name in self.inputs}
            parts = [np.split(array, ends) for array in self.session.run(self.outputs, joined)]
            results = [list(arrays) for arrays in zip(*parts, strict=True)]
        else:
            results = [self.session.run(self.outputs, one) for one in feeds]
        return [
            triton.InferenceResponse([triton.Tensor(n, array) for n, array in zip(self.outputs, arrays, strict=True)])
            for arrays in results
        ]
