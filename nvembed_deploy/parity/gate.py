"""The gate of a bundle's graphs and plan: what this machine can run is judged by the reference's vectors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import CPU_NOTES, OrtBackend
from nvembed_deploy.backends.trt import TrtBackend
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PlanInfo
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.console import program, say
from nvembed_deploy.errors import DeviceMismatchError, MissingExtra
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.parity.compare import compare, require, require_mask
from nvembed_deploy.parity.probes import Truth
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.tokenization import TextEncoder


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What candidates are measured by."""

    truth: Truth
    text: TextEncoder
    model: ModelConfig
    precision: Precision
    largest: Shape

    def graphs(self, folder: Path) -> list[ParityReport]:
        """Judges the graphs that ONNX Runtime can run: the engine's own, node by node, and the CPU's.

        Raises:
            ParityError: One is outside the tolerance.
        """
        reports = []
        if self.precision is not Precision.BF16:  # ONNX Runtime has no kernels for it
            with step("comparing ONNX with PyTorch"):
                reports.append(self._judge(OrtBackend(folder / GRAPH, as_written=self.precision.quantized)))
        if self.precision.has_cpu_graph:
            with step("comparing the CPU's graph with PyTorch"):
                reports.append(self._judge(OrtBackend(folder / CPU_GRAPH, note=CPU_NOTES[self.precision.base])))
        return reports

    def plan(self, content: memoryview, info: PlanInfo, graph: Path) -> list[ParityReport]:
        """Runs a plan where there is a GPU for it; elsewhere nothing is judged, and it is said.

        Raises:
            ParityError: It is outside the tolerance.
            EngineError: TensorRT refuses to load or to run it.
        """
        try:
            cuda = CudaRuntime.load()
            device = cuda.device(0)
            width = self.model.hidden_size
            candidate = TrtBackend(content, info, dimension=width, device=device, cuda=cuda, graph=graph)
        except (DeviceMismatchError, MissingExtra) as err:
            cure = f"On its GPU: {program('check')} BUNDLE --device cuda"
            say(f"  the plan was not run ({err}); its graph was compared. {cure}")
            return []
        with step("comparing the plan with PyTorch"):
            return [self._judge(candidate)]

    def _judge(self, candidate: Backend) -> ParityReport:
        require_mask(candidate, self.text, self.model.mask)  # first: vectors can hide it
        report = compare(self.truth, candidate, self.text, precision=self.precision, largest=self.largest)
        say(f"  {report.summary()}")
        return require(report)


def verdict(reports: Sequence[ParityReport], info: PlanInfo | None) -> str:
    """What the reports say of a bundle, in words: a graph that passed is no plan that ran."""
    if not reports:
        return "parity NOT checked: the bundle was exported with --no-parity"
    if info is None or any(info.runtime in report.candidate for report in reports):
        return "parity passed"
    return "parity of its graph passed, the plan was not run"


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what is being done, and then how long it took."""
    started = time.monotonic()
    say(f"  {what} ...")
    yield
    say(f"  {what}: {time.monotonic() - started:.1f} s")
