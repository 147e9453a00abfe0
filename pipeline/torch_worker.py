"""The other end of ``pipeline.torch_process``: a torch network in a process of its own, timed when it is told to.

Requests are JSON, one a line, on standard input; an answer to each goes to what was standard output at the start. What
torch and its compilers print goes to standard error. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import NetworkConfig
from pipeline.errors import PipelineError
from pipeline.metrics.clock import gpu_milliseconds, gpu_spans, host_milliseconds
from pipeline.networks import build_network, fastest_device

if TYPE_CHECKING:
    from torch import Tensor, nn

TRANSFERS = 20


class TorchClock:
    """Events of torch's current stream."""

    def event(self) -> Any:
        import torch

        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, event: Any) -> None:
        event.record()

    def between(self, before: Any, after: Any) -> float:
        return float(before.elapsed_time(after))

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def close(self, event: Any) -> None:
        """Torch does it."""


class Work:
    """One network; its methods are the requests, and return the answers.

    Args:
        network: as in a configuration.
        precision: fp32, tf32 or fp16; the last in channels-last memory.
        mode: of torch.compile; None for eager.
        wants_gpu: refuse to run on the CPU.
        factor, offset: what turns a uint8 (N, H, W, C) image into the network's input, by channel; None where the
            input is that input.
        output: logits, probabilities or labels, as the graph's.
    """

    def __init__(
        self,
        network: dict[str, Any],
        precision: str,
        mode: str | None,
        wants_gpu: bool,
        factor: list[float] | None,
        offset: list[float] | None,
        output: str,
    ) -> None:
        import torch

        if wants_gpu and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU")
        self.device = fastest_device()
        if precision == "tf32" and self.device.type == "cpu":
            raise RuntimeError("TF32 is an arithmetic of GPUs")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = True
        module = build_network(NetworkConfig.model_validate(network)).to(self.device)
        if precision == "fp16":
            module = module.half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scaled = None
        if factor is not None and offset is not None:
            shape = (1, len(factor), 1, 1)
            scaled = tuple(torch.tensor(values, device=self.device).reshape(shape) for values in (factor, offset))
        run = _whole(module, precision == "fp16", scaled, output)
        self.run = run if mode is None else torch.compile(run, mode=mode)
        self.where = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"

    def about(self) -> dict[str, Any]:
        import torch

        return {"ran": f"torch {torch.__version__}, {self.where}", "on_gpu": self.device.type == "cuda"}

    def feed(self, source: str, target: str) -> dict[str, Any]:
        """Take the array in one file from now on; the first inference's output goes into the other."""
        import torch

        self.host = torch.from_numpy(np.load(source))
        self.fed = self.host.to(self.device)
        np.save(target, self.run(self.fed).cpu().numpy())
        return {}

    def on_host(self, seconds: float, warmup_seconds: float) -> dict[str, Any]:
        """From host array to host array."""
        times = host_milliseconds(lambda: self.run(self.host.to(self.device)).cpu(), seconds, warmup_seconds)
        return {"milliseconds": times.tolist()}

    def on_gpu(self, seconds: float, warmup_seconds: float) -> dict[str, Any]:
        times = gpu_milliseconds(TorchClock(), lambda: self.run(self.fed), seconds, warmup_seconds)
        return {"milliseconds": times.tolist()}

    def transfers(self) -> dict[str, Any]:
        """Milliseconds of the copies to the GPU and back, from and to pageable memory, and the GPU memory held."""
        import torch

        result = self.run(self.fed)
        steps: list[Callable[[], object]] = [lambda: self.host.to(self.device), result.cpu]
        up, down = gpu_spans(TorchClock(), steps, TRANSFERS)
        return {"up": up.tolist(), "down": down.tolist(), "bytes": torch.cuda.max_memory_reserved()}


def _whole(module: nn.Module, half: bool, scaled: Any, output: str) -> Callable[[Tensor], Tensor]:
    """From the graph's input to the graph's output."""
    import torch

    def run(x: Tensor) -> Tensor:
        if scaled is not None:
            x = x.permute(0, 3, 1, 2) * scaled[0] + scaled[1]
        if half:
            x = x.to(torch.float16, memory_format=torch.channels_last)
        y: Tensor = module(x)
        if output == "labels":
            return y.argmax(1).to(torch.uint8)
        return y.float().softmax(1) if output == "probabilities" else y.float()

    return run


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work: Work | None = None
    for line in sys.stdin:
        do, arguments = json.loads(line)
        try:
            import torch

            with torch.inference_mode():
                if work is None:
                    work = Work(**arguments)
                    answer = work.about()
                else:
                    answer = getattr(work, do)(**arguments)
        except PipelineError as error:
            answer = {"error": error.problem}
        except Exception as error:  # whatever torch, a network or a compiler raises is told, and ends nothing else
            answer = {"error": f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"}
        print(json.dumps(answer), file=answers, flush=True)
